"""``peft``: the parameters of an adapter of the ``peft`` library move, over a frozen base.

Whatever adapter it is, its parameters are known by ``requires_grad`` alone, and are resident: they
are few, and every forward reads them. New ones get their first values from the config's seed, so
that all ranks and every restart begin alike. Files are the library's own.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.converted import converted_of
from zo_offload.errors import ConfigError, ModelError
from zo_offload.integrations.pickled import SAFE, UnpicklingError, unread
from zo_offload.trainable.moving import Moving
from zo_offload.trainable.selection import PATH
from zo_offload.trainable.trainable import Trainable, Values
from zo_offload.views import nothing
from zo_offload.wording import hint, one_line

ADAPTER = "adapter_config.json"
# Values of init_lora_weights that leave the base as it is and ask for no data.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")

# Keys of its configurations that say where an adapter came from.
NOT_OF_BITS = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
)


class Peft(Trainable):
    """An adapter: of the ``PeftModel`` that is given, or made as the JSON says.

    Args:
        config: The ``zeroth_order`` block.
    """

    mode = "peft"

    def __init__(self, config: ZOConfig) -> None:
        self._config = config
        self._flags: dict[nn.Parameter, bool] = {}
        self._made: Any = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`Trainable`: a ``PeftModel``."""
        if self._config.master != "fp32":
            raise ConfigError(
                f'zeroth_order.master: "{self._config.master}" would save next to nothing: an '
                'adapter is small, its base has no masters; write "fp32", or leave it out'
            )
        if any(converted_of(each) is not None for each in model.modules()):
            raise ModelError(
                "a converted model's blocks are laid out to move; adapters need a base that does "
                "not: give the model that was converted"
            )
        peft = _library()
        adapted: Any = model
        if not isinstance(model, peft.PeftModel):
            self._flags = {p: p.requires_grad for p in model.parameters()}
            adapted = self._adapted(model)
            self._made = adapted
        _check(adapted)
        moved = {name for name, p in adapted.named_parameters() if p.requires_grad}
        self.moving = Moving(resident=frozenset(moved))
        return adapted

    def undo(self) -> None:
        """See :class:`Trainable`. An adapter that was made stays in the model, with its values."""
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._flags = {}

    def abandon(self) -> None:
        """See :class:`Trainable`: layers that were put around the model's are taken off."""
        if self._made is not None and hasattr(self._made.base_model, "unload"):
            self._made.unload()
        self.undo()

    def header(self, model: nn.Module) -> dict[str, Any]:
        """See :class:`Trainable`; with the adapters' configurations, which decide losses."""
        adapted: Any = model
        adapters = {name: _as_json(each.to_dict()) for name, each in adapted.peft_config.items()}
        return {"trainable": {**super().header(model)["trainable"], "adapters": adapters}}

    def save(self, model: nn.Module, weights: Values, directory: Path) -> None:
        """See :class:`Trainable`: ``adapter_config.json`` and ``adapter_model.safetensors``."""
        adapted: Any = model
        for config in adapted.peft_config.values():
            config.base_model_name_or_path = _from_anywhere(config.base_model_name_or_path)
        with _values(weights, self.moving.resident):  # prompts are computed when they are saved
            adapted.save_pretrained(str(directory), state_dict=_state(model, weights))

    def _adapted(self, model: nn.Module) -> Any:
        peft, wanted = _library(), self._config.trainable
        if wanted.adapter is None and wanted.peft_config is None:
            raise ConfigError(
                f'{PATH}.peft_config: mode "peft" needs "peft_config": {{"peft_type": "LORA", '
                '...}, or "adapter": a directory to go on from, or a PeftModel; found null'
            )
        with _seeded(self._config.seed):
            if wanted.adapter is not None:
                return load_adapter(model, wanted.adapter, f"{PATH}.adapter: ")
            assert wanted.peft_config is not None
            writes = hasattr(model, "prepare_inputs_for_generation")
            config = _peft_config(wanted.peft_config, "CAUSAL_LM" if writes else None)
            try:
                return peft.get_peft_model(model, config)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"{PATH}.peft_config: {type(model).__name__}: {one_line(error)}"
                    "; write target_modules, and what else peft asks for"
                ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Generators of torch start from a seed meanwhile; the caller's are left as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _library() -> Any:
    """The ``peft`` library, imported where it is needed: it takes seconds."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f'{PATH}.mode: "peft" needs the peft library ({one_line(error)}); pip install peft'
        ) from error
    return peft


def _peft_config(keys: Mapping[str, Any], task_type: str | None) -> Any:
    """The library's own configuration object; of this task unless another is named."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    kind = keys.get("peft_type")
    if kind not in known:
        raise ConfigError(
            f"{PATH}.peft_config.peft_type: {hint(kind, known)}, found "
            f"{'null' if kind is None else repr(kind)}"
            "; write the type of an adapter of peft"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    for key in keys:
        if key not in config_class.__dataclass_fields__:
            near = hint(key, list(config_class.__dataclass_fields__))
            raise ConfigError(f"{PATH}.peft_config.{key}: unknown key of {kind}; {near}")
    start = keys.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ConfigError(
            f"{PATH}.peft_config.init_lora_weights: {start!r} writes into the base's weights or "
            'needs data; write true or "gaussian", or make the PeftModel yourself'
        )
    try:
        return config_class(**{"task_type": task_type, **keys})
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{PATH}.peft_config: {one_line(error)}; write the keys as peft takes them"
        ) from error


def written_keys(said: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``peft_config`` that make an adapter's configuration, as a header has it.

    Args:
        said: Of one adapter in :meth:`Peft.header`.

    Raises:
        ConfigError: The library does not know such an adapter.
    """
    config = _peft_config({"peft_type": said.get("peft_type")}, None)
    plain = _as_json(config.to_dict())
    return {
        key: value
        for key, value in said.items()
        if key == "peft_type" or (key in plain and plain[key] != value)
    }


def load_adapter(model: nn.Module, directory: str | Path, where: str = "") -> Any:
    """The model with the adapter that a directory holds, to go on from it.

    Args:
        model: The base.
        directory: What ``save_pretrained`` wrote.
        where: What begins a message.

    Raises:
        ConfigError: There is none, or it is of another model.
    """
    check_adapter(directory, where)
    peft = _library()
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        prompts = config.is_prompt_learning
        adapted = peft.PeftModel.from_pretrained(model, str(directory), is_trainable=not prompts)
    except UnpicklingError as error:
        raise ConfigError(f"{where}{directory}: {unread(error)}; {SAFE}") from error
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ConfigError(
            f"{where}{directory}: {one_line(error)[:300]}; give an adapter of this model"
        ) from error
    if prompts:  # the library loads them to be read; what made them is not in the file
        adapted.prompt_encoder.requires_grad_(True)
    return adapted


def check_adapter(directory: str | Path, where: str = f"{PATH}.adapter: ") -> None:
    """Look whether a directory holds one.

    Raises:
        ConfigError: It does not.
    """
    if not (Path(directory) / ADAPTER).is_file():
        raise ConfigError(
            f"{where}no {ADAPTER} in {directory}; give the directory that save_pretrained wrote"
        )


def base_of(directory: str | Path) -> str | None:
    """The model that an adapter's directory names as its base; None where it holds no adapter.

    Raises:
        ModelError: It names none.
    """
    path = Path(directory)
    if not (path / ADAPTER).is_file() or (path / "config.json").is_file():
        return None
    try:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path / ADAPTER}: cannot be read: {one_line(error)}"
            "; save the adapter again, or restore it from a copy"
        ) from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path / ADAPTER}: base_model_name_or_path names no model; write its directory there"
        )
    return base


def _from_anywhere(base: str | None) -> str | None:
    """A model's directory as a path that holds wherever a program is started; a name as it is."""
    return str(Path(base).resolve()) if base and Path(base).is_dir() else base


def _as_json(value: Any) -> Any:
    """A configuration's values for the journal, less what says only where it came from."""
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items() if k not in NOT_OF_BITS}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Enum):
        return str(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _check(model: Any) -> None:
    """Refuse adapters that would not move what the forward reads.

    Raises:
        ModelError: By name.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter; load its adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__}: every parameter moves, the base's too, where an adapter's "
            "base is only read; requires_grad_(False) on the base, or pass the plain model"
        )
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None):
            raise ModelError(
                f"{name}: adapter {module.merged_adapters[0]!r} is merged into the base's weights, "
                "so that moving it changes nothing; call unmerge_adapter() first"
            )


@contextmanager
def _values(weights: Values, names: Any) -> Iterator[None]:
    """Let these parameters hold their values for a while; they are few."""
    parameters = {name: weights.map.parameters[name] for name in names}
    devices = {name: parameter.device for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights.value(name)
        yield
    finally:
        for name, parameter in parameters.items():
            shape, dtype = tuple(parameter.shape), parameter.dtype
            parameter.data = nothing(shape, dtype, devices[name])


def _state(model: nn.Module, weights: Values) -> dict[str, torch.Tensor]:
    """What of a ``state_dict`` an adapter's files may take: all but what travels in units.

    An adapter's frozen parameters (AdaLoRA counts its ranks in one) lie in units as well.
    """
    layers: Any = list(model.modules())
    own = {
        attribute
        for layer in layers
        for kind in ("adapter_layer_names", "other_param_names")
        for attribute in getattr(layer, kind, ())
    }
    ambient = {segment.name for _, segment in weights.map.ambient.segments}
    names = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if weights.map.aliases.get(name, name) in ambient or own.intersection(name.split("."))
    ]
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: weights.value(name) for name in names} | buffers
