"""The ``zeroth_order`` block of a DeepSpeed JSON, as frozen typed objects.

Read once; nothing below reads a dict. Every mistake is a :class:`ConfigError` that names the path in
the JSON, the value, what is allowed and the nearest valid key, before a model is touched. Null means
"decide for me".
"""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from zo_offload.errors import ConfigError

BLOCK = "zeroth_order"
_UNITS = {"": 0, "B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}


def parse_bytes(value: Any) -> Any:
    """A number of bytes from an integer or text such as ``8GiB`` (powers of 1024).

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes(7)
        (1536, 7)
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?\s*", value)
        if match is None:
            raise ValueError(f"expected bytes or text such as '8GiB', found {value!r}")
        return int(float(match[1]) * 1024 ** _UNITS[match[2] or ""])
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrainableConfig(_Strict):
    """What moves."""

    mode: Literal["full"] = "full"


class UpdateConfig(_Strict):
    """How projected gradients become coefficients on directions."""

    type: Literal["sgd"] = "sgd"
    where: Literal["host", "device"] | None = None
    lag: Annotated[int, Field(ge=0, le=0)] = 0


class OffloadConfig(_Strict):
    """Where weights rest; DeepSpeed's ``offload_param`` with its own keys."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True
    buffer_count: Annotated[int, Field(ge=1)] | None = None


class ReplicaConfig(_Strict):
    """The other ranks."""

    probe_parallel: Annotated[int, Field(ge=1, le=1)] = 1
    check_interval: Annotated[int, Field(ge=1)] = 100


class JournalConfig(_Strict):
    """The record of steps."""

    path: str | None = None


class ZOConfig(_Strict):
    """The whole block. Every key is optional.

    Example:
        >>> ZOConfig(eps=1e-2).probes
        1
        >>> parse_config({"zeroth_order": {"probs": 4}})
        Traceback (most recent call last):
        ...
        zo_offload.errors.ConfigError: zeroth_order.probs: unknown key; did you mean 'probes'?
    """

    enabled: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    eps: Positive = 1e-3
    probes: Annotated[int, Field(ge=1, le=2**15)] = 1
    estimator: Literal["spsa"] = "spsa"
    direction: Literal["rademacher", "gaussian"] = "rademacher"
    direction_scale: Literal["none", "rms"] = "none"
    trainable: TrainableConfig = TrainableConfig()
    update: UpdateConfig = UpdateConfig()
    offload_param: OffloadConfig = OffloadConfig()
    device_budget: Bytes | None = None
    host_budget: Bytes | None = None
    unit: Literal["block"] | tuple[str, ...] | None = None
    wire: Literal["identity"] | None = None
    master: Literal["fp32"] = "fp32"
    replica: ReplicaConfig = ReplicaConfig()
    journal: JournalConfig = JournalConfig()

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("unit"), list):
            values = {**values, "unit": tuple(values["unit"])}
        return values

    @property
    def unit_classes(self) -> tuple[str, ...] | None:
        """Class names that are units, or None to search for them."""
        return self.unit if isinstance(self.unit, tuple) else None


def parse_config(config: Mapping[str, Any]) -> ZOConfig:
    """Our block of a DeepSpeed JSON, checked together with the keys beside it.

    Raises:
        ConfigError: On the first mistake.
    """
    block = config.get(BLOCK, {})
    if not isinstance(block, Mapping):
        raise ConfigError(f"{BLOCK}: expected an object, found {block!r}")
    _refuse_auto(block, BLOCK)
    block = _with_offload_param(block, config)
    try:
        parsed = ZOConfig.model_validate(dict(block))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    _check_beside(config)
    return parsed


def load_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: The file is missing, unreadable, malformed, or no object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{path}: cannot read the config: {reason}") from error
    try:
        config = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r} stands twice in one object; keep one")
        seen[key] = value
    return seen


def _refuse_auto(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_auto(inner, f"{path}.{key}")
    elif value == "auto":
        raise ConfigError(
            f'{path}: "auto" belongs to the Trainer\'s integration; write null for "decide for me"'
        )


def _with_offload_param(block: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Honour ``offload_param`` where a DeepSpeed user already has it, under ``zero_optimization``."""
    zero = config.get("zero_optimization", {})
    theirs = zero.get("offload_param") if isinstance(zero, Mapping) else None
    if theirs is None:
        return block
    if "offload_param" in block:
        raise ConfigError(
            f"offload_param stands both in {BLOCK} and in zero_optimization; keep one"
        )
    if not isinstance(theirs, Mapping):
        raise ConfigError(f"zero_optimization.offload_param: expected an object, found {theirs!r}")
    ours = {key: value for key, value in theirs.items() if key in OffloadConfig.model_fields}
    return {**block, "offload_param": ours}


def _check_beside(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        stage = zero.get("stage", 0)
        if stage not in (0, None):
            raise ConfigError(
                f"zero_optimization.stage: {stage} shards gradients and optimizer states, which do not exist here; "
                f'write "stage": 0 and "{BLOCK}": {{"offload_param": {{"device": "cpu"}}}}'
            )
        if "offload_optimizer" in zero:
            raise ConfigError(
                "zero_optimization.offload_optimizer: there is no optimizer state to move; remove the key "
                f'(weights move by "{BLOCK}": {{"offload_param": ...}})'
            )
    for precision in ("bf16", "fp16"):
        if not isinstance(config.get(precision, {}), Mapping):
            raise ConfigError(f"{precision}: expected an object, found {config[precision]!r}")
    if all(config.get(precision, {}).get("enabled") for precision in ("bf16", "fp16")):
        raise ConfigError("bf16.enabled and fp16.enabled are both true; keep one")


def _explain(error: ValidationError) -> str:
    """The first mistake in one line: path, what is wrong, what is allowed, the nearest key."""
    first = error.errors()[0]
    where = [
        str(part)
        for part in first["loc"]
        if not str(part).startswith(("literal[", "tuple[", "function-"))
    ]
    path = ".".join([BLOCK, *where])
    if first["type"] == "extra_forbidden":
        near = get_close_matches(where[-1], _keys_at(where[:-1]), n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"valid keys: {', '.join(_keys_at(where[:-1]))}"
        )
        return f"{path}: unknown key; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower() + message[1:]}, found {json.dumps(first['input'], default=str)}"


def _keys_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = ZOConfig
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
