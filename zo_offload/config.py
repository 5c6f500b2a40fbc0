"""The ``zeroth_order`` block of a DeepSpeed JSON, as frozen typed objects.

Read once; nothing below reads a dict. Every mistake is a :class:`ConfigError` that names the path
in the JSON, the value, what is allowed and the nearest valid key, before a model is touched. Null
means "decide for me".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
)

from zo_offload.config_fields import (
    BLOCK,
    Bytes,
    Limit,
    Paths,
    Positive,
    Strict,
    UnitChoice,
    Wire,
    parse_bytes,
)
from zo_offload.config_guard import ROLLBACK, GuardConfig
from zo_offload.config_trainable import TrainableConfig, check_trainable
from zo_offload.config_update import UpdateConfig, momentum_of
from zo_offload.errors import ConfigError
from zo_offload.estimator import LEAST_PROBES, SIGNS
from zo_offload.journal.record import MAX_PROBES
from zo_offload.natural import LEAST_DAMPING, MOST_PROBES
from zo_offload.offload.aio import BLOCK_BYTES
from zo_offload.wording import hint

_DEEPSPEED_ONLY = ("buffer_size", "max_in_cpu")  # of its offload_param; no effect here


class OffloadConfig(Strict):
    """Where weights rest; DeepSpeed's ``offload_param`` with its own keys."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Paths | None = None
    pin_memory: bool = True
    buffer_count: Annotated[int, Field(ge=1)] | None = None


class AioConfig(Strict):
    """How a disk is asked; DeepSpeed's ``aio``, of which the first three act."""

    block_size: Annotated[
        int, BeforeValidator(parse_bytes), Field(ge=4096, le=2**30, multiple_of=4096)
    ] = BLOCK_BYTES
    queue_depth: Annotated[int, Field(ge=1, le=256)] = 8
    intra_op_parallelism: Annotated[int, Field(ge=1, le=256)] = 1
    thread_count: int | None = None
    single_submit: bool | None = None
    overlap_events: bool | None = None
    use_gds: Literal[False] | None = None


class ReplicaConfig(Strict):
    """The other ranks."""

    probe_parallel: Annotated[int, Field(ge=1)] = 1
    check_interval: Annotated[int, Field(ge=0)] = 100
    on_mismatch: Literal["repair", "stop"] = "repair"


class JournalConfig(Strict):
    """The record of steps."""

    path: str | None = None
    snapshot_interval: Annotated[int, Field(ge=0)] = 1000
    keep_snapshots: Annotated[int, Field(ge=1)] = 2
    checkpoint: Literal["weights", "scalars"] = "weights"


class ZOConfig(Strict):
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
    probes: Annotated[int, Field(ge=1, le=2**14)] = 1
    estimator: Literal["spsa", "one_sided"] = "spsa"
    fitness: Literal["raw", "standardized", "ranks"] = "raw"
    natural: Annotated[float, Field(ge=LEAST_DAMPING, allow_inf_nan=False)] | None = None
    clip: Limit | None = None
    guard: GuardConfig = GuardConfig()
    direction: Literal["rademacher", "gaussian"] = "rademacher"
    direction_scale: Literal["none", "rms", "relative"] = "none"
    trainable: TrainableConfig = TrainableConfig()
    update: UpdateConfig = UpdateConfig()
    offload_param: OffloadConfig = OffloadConfig()
    aio: AioConfig = AioConfig()
    device_budget: Bytes | None = None
    host_budget: Bytes | None = None
    unit: UnitChoice | None = None
    live_lanes: Annotated[int, Field(ge=1)] | None = None
    head_chunk: Annotated[int, Field(ge=1)] | None = None
    joined_rows: Annotated[int, Field(ge=1)] | None = None
    wire: Wire | None = None
    master: Literal["fp32", "bf16+8", "bf16_sr"] = "fp32"
    replica: ReplicaConfig = ReplicaConfig()
    journal: JournalConfig = JournalConfig()

    @property
    def signs(self) -> tuple[int, ...]:
        """Of the lanes of a direction."""
        return SIGNS[self.estimator]

    @property
    def num_lanes(self) -> int:
        """Directions and signs of a step: forwards of a micro-batch."""
        return len(self.signs) * self.probes


def parse_config(config: Mapping[str, Any]) -> ZOConfig:
    """Our block of a DeepSpeed JSON, checked together with the keys beside it.

    Raises:
        ConfigError: On the first mistake.
    """
    block = config.get(BLOCK, {})
    if not isinstance(block, Mapping):
        raise ConfigError(f"{BLOCK}: expected an object, found {_show(block)}")
    _refuse_auto(block)
    theirs = _offload_param_beside(config)
    if theirs is not None and block.get("offload_param") is not None:
        raise ConfigError(
            f"offload_param stands both in {BLOCK} and in zero_optimization; keep one"
        )
    beside: dict[str, Any] = {} if theirs is None else {"offload_param": theirs}
    if config.get("aio") is not None:
        if block.get("aio") is not None:
            raise ConfigError(f"aio stands both in {BLOCK} and beside it; keep one")
        beside["aio"] = config["aio"]
    try:
        parsed = ZOConfig.model_validate({**block, **beside})
    except ValidationError as error:
        raise ConfigError(_explain(error, beside)) from None
    _check_tier(parsed)
    _check_estimator(parsed)
    _check_guard(parsed)
    if parsed.natural is not None:
        _check_natural(parsed)
    _check_replica(parsed)
    check_trainable(parsed.trainable, parsed.wire, parsed.update.lag, parsed.master)
    momentum_of(parsed.update, parsed.trainable.mode)
    _check_beside(config)
    return parsed


def _check_tier(parsed: ZOConfig) -> None:
    device, where = parsed.offload_param.device, parsed.update.where
    if where == "host" and device == "none":
        raise ConfigError(
            f'{BLOCK}.update.where: "host" is for weights that rest there; write "offload_param": '
            '{"device": "cpu"} too, or leave update.where out'
        )
    if where == "device" and device == "nvme":
        raise ConfigError(
            f"{BLOCK}.update.where: weights that rest on NVMe pass through host memory and are "
            'updated there; write "host", or null'
        )
    if device == "nvme" and parsed.offload_param.nvme_path is None:
        raise ConfigError(
            f'{BLOCK}.offload_param.nvme_path: "device": "nvme" needs a directory on the disk, '
            "found null"
            "; write its path"
        )


def _check_replica(parsed: ZOConfig) -> None:
    parallel, lanes = parsed.replica.probe_parallel, parsed.num_lanes
    if lanes % parallel:
        raise ConfigError(
            f"{BLOCK}.replica.probe_parallel: {parallel} ranks cannot share the {lanes} lanes of a "
            f"micro-batch ({parsed.probes} probes, {_signs(parsed)}) evenly; write a divisor of "
            f"{lanes}"
        )
    if parallel > 1 and parsed.joined_rows is not None:
        raise ConfigError(
            f"{BLOCK}.joined_rows: lanes share products within a rank, and probe_parallel "
            f"{parallel} puts them on different ones, which would change bits; keep one of the two"
        )


def _signs(parsed: ZOConfig) -> str:
    return "two signs" if len(parsed.signs) == 2 else "one sign"


def _check_estimator(parsed: ZOConfig) -> None:
    least = LEAST_PROBES[parsed.estimator]
    if parsed.probes < least:
        raise ConfigError(
            f'{BLOCK}.probes: "estimator": "{parsed.estimator}" compares a step\'s probes with '
            f"each other; write at least {least}, found {parsed.probes}"
        )


def _check_guard(parsed: ZOConfig) -> None:
    guard, most = parsed.guard, MAX_PROBES // parsed.probes - 1
    rolls = ROLLBACK in (guard.nonfinite, guard.explosion, guard.divergence)
    if rolls and guard.most_rollbacks > most:
        raise ConfigError(
            f"{BLOCK}.guard.most_rollbacks: each goes on along {parsed.probes} directions of its "
            f"own a step, of which there are {MAX_PROBES:,}; write at most {most}, found "
            f"{guard.most_rollbacks}"
        )


def _check_natural(parsed: ZOConfig) -> None:
    if not 2 <= parsed.probes <= MOST_PROBES:
        raise ConfigError(
            f"{BLOCK}.natural: weighs a step's probes against each other; write probes from 2 to "
            f"{MOST_PROBES}, found {parsed.probes}"
        )
    if parsed.fitness != "raw":
        raise ConfigError(
            f'{BLOCK}.natural: compares the losses of single examples as they are; write "fitness":'
            f' "raw", found "{parsed.fitness}"'
        )
    if parsed.replica.probe_parallel > 1:
        raise ConfigError(
            f"{BLOCK}.natural: compares a micro-batch's probes on one rank, and "
            f"replica.probe_parallel {parsed.replica.probe_parallel} puts them on different ones; "
            "write 1"
        )


def load_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: The file is missing, unreadable, malformed, or no object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"{path}: cannot read the config: {reason}"
            "; give a DeepSpeed JSON that this user may read"
        ) from error
    try:
        config = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}; mend it there"
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


def _refuse_auto(block: Mapping[str, Any]) -> None:
    """The Trainer's integration fails on any "auto" inside our block; so do we, by name."""
    for key, value in block.items():
        inside = value.items() if isinstance(value, Mapping) else [(None, value)]
        for inner, item in inside:
            if "auto" in (item if isinstance(item, list) else [item]):
                path = _dotted([key] if inner is None else [key, inner])
                raise ConfigError(
                    f'{path}: "auto" belongs to the Trainer\'s integration; '
                    'write null for "decide for me"'
                )


def _offload_param_beside(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``offload_param`` where a DeepSpeed user already has it, less what has no effect here."""
    zero = config.get("zero_optimization")
    if zero is not None and not isinstance(zero, Mapping):
        raise ConfigError(f"zero_optimization: expected an object, found {_show(zero)}")
    theirs = (zero or {}).get("offload_param")
    if theirs is None:
        return None
    if not isinstance(theirs, Mapping):
        raise ConfigError(
            f"zero_optimization.offload_param: expected an object, found {_show(theirs)}"
        )
    return {key: value for key, value in theirs.items() if key not in _DEEPSPEED_ONLY}


def _check_beside(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage")
    if stage is not None and (isinstance(stage, bool) or stage != 0):
        raise ConfigError(
            f"zero_optimization.stage: expected 0, found {_show(stage)}; stages 1 to 3 shard "
            "gradients and optimizer states, which do not exist here; weights move by "
            f'"{BLOCK}": {{"offload_param": {{"device": "cpu"}}}}'
        )
    optimizer = zero.get("offload_optimizer")
    if optimizer is not None and optimizer != {"device": "none"}:
        raise ConfigError(
            "zero_optimization.offload_optimizer: there is no optimizer state to move; remove "
            f'the key (weights move by "{BLOCK}": {{"offload_param": {{"device": "cpu"}}}})'
        )
    for precision in ("bf16", "fp16"):
        if not isinstance(config.get(precision, {}), Mapping):
            raise ConfigError(f"{precision}: expected an object, found {_show(config[precision])}")
    if all(config.get(precision, {}).get("enabled") is True for precision in ("bf16", "fp16")):
        raise ConfigError("bf16.enabled and fp16.enabled are both true; keep one")


_EXPECTED = {  # pydantic's names of mistakes
    "literal_error": "{expected}",
    "model_type": "an object",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "less_than_equal": "at most {le}",
}


_ROOTS = {"offload_param": "zero_optimization", "aio": ""}  # where DeepSpeed has them


def _explain(error: ValidationError, beside: Mapping[str, Any]) -> str:
    """The first mistake in one line: path, what is allowed, what is found, the nearest key."""
    first = error.errors()[0]
    *parents, key = where = list(first["loc"])
    path = _dotted(where, _ROOTS.get(str(where[0]), BLOCK) if where[0] in beside else BLOCK)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"{path}: unknown key; {hint(key, _keys_at(parents))}"
    if first["type"] in _EXPECTED:
        message = "expected " + _EXPECTED[first["type"]].format(**first.get("ctx", {}))
    else:
        message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}, found {_show(first['input'])}"


def _dotted(parts: list[Any], root: str = BLOCK) -> str:
    roots = [root] if root else []
    return ".".join([*roots, *(p if str(p).isidentifier() else _show(p) for p in map(str, parts))])


def _show(value: Any) -> str:
    """A value as JSON, on one line, cut where it is long."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys_at(parents: list[Any]) -> list[str]:
    model: type[BaseModel] = ZOConfig
    for part in parents:
        annotation = model.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]  # itself, or where it may be null
        (model,) = (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)
