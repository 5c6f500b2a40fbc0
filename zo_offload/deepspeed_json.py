"""A DeepSpeed JSON, read whole and checked before a model is touched.

Our block is ``config.py``'s. DeepSpeed's own keys are read by DeepSpeed, whose words reach the user
in one line; ``optimizer`` and the precision are ours, since there is no optimizer state and nothing
is cast.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError
from torch import nn

from zo_offload.config import ZOConfig, parse_config
from zo_offload.config_update import moments_beside, momentum_of
from zo_offload.data_ranks import DataRanks
from zo_offload.deepspeed_keys import BLOCKS, COUNTS, MENDS, SWITCHES, check_keys
from zo_offload.errors import ConfigError
from zo_offload.wording import one_line, refuse_unknown

logger = logging.getLogger(__name__)

DEFAULT_LR = 1e-6  # MeZO's for full-parameter tuning of OPT
LEAST_BF16_EPS = 1e-3
OUR_OPTIMIZER = "ZO"
OUR_PARAMS = ("lr", "weight_decay")


@dataclass(frozen=True)
class Settings:
    """Everything that a JSON says.

    Attributes:
        zeroth_order: Our block.
        deepspeed: DeepSpeed's reading of its keys.
        lr: Learning rate to begin with.
        weight_decay: Decoupled decay rate.
        dtype: What forwards compute in, or None for the model's own dtype.
        data_ranks: Where ranks share micro-batches.
    """

    zeroth_order: ZOConfig
    deepspeed: DeepSpeedConfig
    lr: float
    weight_decay: float
    dtype: torch.dtype | None
    data_ranks: DataRanks | None = None


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Check a JSON and everything that is made from it alone.

    Raises:
        ConfigError: On the first mistake, in one line.
    """
    check_keys(config)
    zeroth_order = parse_config(config)
    if not zeroth_order.enabled:
        raise ConfigError(
            "zeroth_order.enabled is false; call deepspeed.initialize, or set it to true"
        )
    lr, weight_decay = _optimizer_scalars(config.get("optimizer"))
    zeroth_order = _with_moments(config.get("optimizer") or {}, zeroth_order, lr, weight_decay)
    _check_types(deepspeed_part(config))
    parallel = zeroth_order.replica.probe_parallel
    data_ranks = DataRanks(parallel) if parallel > 1 and dist.is_initialized() else None
    deepspeed = _read_deepspeed(config, data_ranks)
    if config.get("scheduler") is not None:
        _try_scheduler(deepspeed, ScheduledScalars(lr, weight_decay))
    dtype = _forward_dtype(config)
    if dtype == torch.bfloat16 and zeroth_order.eps < LEAST_BF16_EPS:
        logger.warning(
            "zeroth_order.eps %g: in bf16 rounding drowns the differences below %g; raise it, or "
            "use fp16", zeroth_order.eps, LEAST_BF16_EPS,
        )  # fmt: skip
    return Settings(zeroth_order, deepspeed, lr, weight_decay, dtype, data_ranks)


class ScheduledScalars(torch.optim.Optimizer):
    """Carries the learning rate and weight decay that schedulers write and the step reads."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        placeholder = nn.Parameter(torch.zeros(()))
        # DeepSpeed's schedulers may cycle momentum; betas are there for them and have no effect.
        super().__init__(
            [placeholder], {"lr": lr, "weight_decay": weight_decay, "betas": (0.0, 0.0)}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The placeholder's. Torch's would import torch's compiler, which takes a second."""
        self.param_groups.append({**self.defaults, **param_group})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: the weights have moved already."""

    def load_state_dict(self, state_dict: dict, load_optimizer_states: bool = True) -> None:
        """As torch; the second argument is what DeepSpeed passes."""
        super().load_state_dict(state_dict)


def check_beside_block(config: Mapping[str, Any]) -> Iterator[Callable[[], object]]:
    """Each refuses what one of DeepSpeed's keys that act here holds, with a ConfigError."""
    yield partial(_optimizer_scalars, config.get("optimizer"))
    for key, value in deepspeed_part(config).items():
        yield partial(_check_types, {key: value})


def deepspeed_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON as DeepSpeed should see it: optimizer, precision and offloading are ours."""
    ours = ("optimizer", "bf16", "fp16", "zeroth_order", "zero_optimization", *MENDS)
    part = {k: value for k, value in config.items() if k not in ours and value is not None}
    part["zero_optimization"] = {"stage": 0}
    return part


@contextmanager
def unstarted_scheduler() -> Iterator[None]:
    """DeepSpeed's schedulers ask themselves for a rate when they are made, and warn of it."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Attempting to get learning rate")

    deepspeed_logger.addFilter(keep)
    try:
        yield
    finally:
        deepspeed_logger.removeFilter(keep)


def _check_types(part: Mapping[str, Any]) -> None:
    """What DeepSpeed would fall over without naming the key."""
    for path in _autos(part, ""):
        raise ConfigError(
            f'{path}: "auto" is filled in by the Trainer of transformers; without it, write a value'
        )
    for key, value in part.items():
        if value is None:
            continue
        if key in COUNTS and (type(value) is not int or value < 1):
            raise ConfigError(f"{key}: expected a whole number of at least 1, found {value!r}")
        # accelerate writes infinity for "never"
        if key == "steps_per_print" and type(value) is not int and value != math.inf:
            raise ConfigError(f"{key}: expected a whole number or null, found {value!r}")
        if key in SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"{key}: expected true or false, found {value!r}")
        if key in BLOCKS and not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected an object, found {value!r}")


REFUSALS = (  # all that DeepSpeed raises on what it does not like
    DeepSpeedConfigError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError,
    ValueError,
)  # fmt: skip


def _check_batch(config: Mapping[str, Any], data_ranks: DataRanks | None) -> None:
    """Whether the batch divides among ranks; DeepSpeed names keys that nobody wrote."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    size, micro, accumulation = (config.get(name) for name in names)
    if size is None or micro is None or accumulation is not None:
        return
    if data_ranks is not None:
        ranks = data_ranks.get_data_parallel_world_size()
    else:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
    if size % (micro * ranks):
        fits = f"{names[1]} {math.gcd(size // ranks, micro)}, or " if size % ranks == 0 else ""
        more = -(-size // (micro * ranks)) * micro * ranks
        raise ConfigError(
            f"{names[0]}: {size} examples are no whole number of micro-batches of {micro} on "
            f"{ranks} rank(s) ({names[1]}); write {fits}{names[0]} {more}"
        )


def _read_deepspeed(config: Mapping[str, Any], data_ranks: DataRanks | None) -> DeepSpeedConfig:
    _check_batch(config, data_ranks)
    try:
        return DeepSpeedConfig(deepspeed_part(config), data_ranks)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"DeepSpeed refuses the config: {path}: {first['msg']}; mend or remove what it names"
        ) from error
    except REFUSALS as error:
        raise ConfigError(
            f"DeepSpeed refuses the config: {one_line(error)}; mend or remove what it names"
        ) from error


def _try_scheduler(deepspeed: DeepSpeedConfig, optimizer: ScheduledScalars) -> None:
    """Make the JSON's scheduler once for nothing: DeepSpeed would make it after the model."""
    name = deepspeed.scheduler_name
    params = deepspeed.scheduler_params = (
        deepspeed.scheduler_params or {}
    )  # DeepSpeed takes no None
    known = lr_schedules.VALID_LR_SCHEDULES
    if not isinstance(name, str):
        raise ConfigError(f"scheduler.type: expected one of {', '.join(known)}, found {name!r}")
    make = getattr(lr_schedules, name, getattr(torch.optim.lr_scheduler, name, None))
    if make is None:
        near = get_close_matches(name, known, n=1) or [", ".join(known)]
        raise ConfigError(f"scheduler.type: unknown {name!r}; did you mean {near[0]}?")
    try:
        with unstarted_scheduler():
            make(optimizer, **params)
    except Exception as error:
        raise ConfigError(
            f"scheduler: {name} refuses its params: {one_line(error)}"
            "; write scheduler.params as DeepSpeed's class takes them"
        ) from error


def _optimizer_scalars(block: Any) -> tuple[float, float]:
    """``(lr, weight_decay)`` of the JSON's optimizer; other types than ours are taken for these."""
    block = {} if block is None else block
    params = block.get("params") or {} if isinstance(block, Mapping) else None
    if not isinstance(block, Mapping) or not isinstance(params, Mapping):
        raise ConfigError(
            f'optimizer: expected {{"type": "ZO", "params": {{"lr": ...}}}}, found {block!r}'
        )
    refuse_unknown("optimizer", block, ("type", "params", "legacy_fusion"))
    kind = block.get("type", OUR_OPTIMIZER)
    if not isinstance(kind, str) or (kind.upper() == OUR_OPTIMIZER and kind != OUR_OPTIMIZER):
        raise ConfigError(f'optimizer.type: expected "{OUR_OPTIMIZER}", found {kind!r}')
    if kind == OUR_OPTIMIZER:
        refuse_unknown("optimizer.params", params, OUR_PARAMS)
    for key in params:  # other types have many names of their own
        near = get_close_matches(str(key), OUR_PARAMS, n=1, cutoff=0.75)
        if near and key not in OUR_PARAMS:
            raise ConfigError(f"optimizer.params.{key}: unknown key; did you mean {near[0]!r}?")
    lr, weight_decay = (_number(params, key) for key in OUR_PARAMS)
    return DEFAULT_LR if lr is None else lr, weight_decay or 0.0


def _with_moments(
    block: Mapping[str, Any], config: ZOConfig, lr: float, weight_decay: float
) -> ZOConfig:
    """Ours, with what another optimizer's params say of its momentum; what is used is told."""
    kind, taken = block.get("type", OUR_OPTIMIZER), {}
    if kind != OUR_OPTIMIZER:
        taken = moments_beside(block.get("params") or {}, config.update)
        used = [f"lr ({lr:g})", f"weight_decay ({weight_decay:g})"]
        used += [f"{key} ({value:g})" for key, value in taken.items()]
        logger.warning(
            "optimizer.type %s: only its %s and %s are used; the update is zeroth-order",
            kind, ", ".join(used[:-1]), used[-1],
        )  # fmt: skip
    if not taken:
        return config
    update = config.update.model_copy(update=taken)
    momentum_of(update, config.trainable.mode)
    return config.model_copy(update={"update": update})


def _number(params: Mapping[str, Any], key: str) -> float | None:
    value = params.get(key)
    if value is None or value == "auto":
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):
        raise ConfigError(f"optimizer.params.{key}: expected a number >= 0, found {value!r}")
    return float(value)


def _autos(value: Any, path: str) -> Iterator[str]:
    if value == "auto":
        yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}" if path else str(key))


def _forward_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """What forwards compute in: the JSON's bf16 or fp16, else the model's own dtype."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = config.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise ConfigError(f"{key}.enabled: expected true or false, found {enabled!r}")
        if enabled:
            return dtype
    return None
