"""Which of DeepSpeed's keys mean something here, and what becomes of the others.

DeepSpeed keeps unknown keys in silence. Here every key of a JSON acts, or is named in a warning
because it has nothing to act on, or is refused: nothing is ignored without a word.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from zo_offload.config import BLOCK
from zo_offload.errors import ConfigError
from zo_offload.wording import refuse_unknown

logger = logging.getLogger(__name__)

COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SWITCHES = ("wall_clock_breakdown", "memory_breakdown", "dump_state")
MONITORS = ("csv_monitor", "tensorboard", "wandb", "comet")
BLOCKS = ("scheduler", "comms_logger", "flops_profiler", "timers", "aio", *MONITORS)
ACTING = (
    BLOCK, "zero_optimization", "optimizer", "bf16", "fp16", "steps_per_print",
    *COUNTS, *SWITCHES, *BLOCKS,
)  # fmt: skip
# There are no gradients, no optimizer states and no activations that are kept for a backward.
WITHOUT_EFFECT = (
    "activation_checkpointing", "checkpoint", "communication_data_type", "compile", "data_types",
    "dataloader_drop_last", "disable_allgather", "gradient_clipping", "gradient_predivide_factor",
    "log_level", "prescale_gradients", "seq_parallel_communication_data_type", "sparse_gradients",
)  # fmt: skip
WRITTEN_BY_ACCELERATE = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
MENDS = {
    "amp": 'forwards compute in what "bf16" or "fp16" says; remove the key',
    "autotuning": "tries ZeRO stages, which do not exist here; remove the key",
    "bfloat16": 'an old name of DeepSpeed\'s; write "bf16"',
    "torch_autocast": 'forwards compute in what "bf16" or "fp16" says; remove the key',
    "tensor_parallel": "every rank holds the whole model; remove the key",
    "pipeline": "every rank holds the whole model; remove the key",
    "data_efficiency": "not to be had here; remove the key",
    "curriculum_learning": "not to be had here; remove the key",
}
KEYS_INSIDE: dict[str, tuple[str, ...]] = {
    "scheduler": ("type", "params"),
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules",
        "detailed", "output_file",
    ),
    "timers": ("throughput",),
    "aio": (
        "block_size", "queue_depth", "intra_op_parallelism", "thread_count", "single_submit",
        "overlap_events", "use_gds",
    ),
    "bf16": (
        "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
    "fp16": (
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window",
        "hysteresis", "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads",
    ),
}  # fmt: skip


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse what is unknown or cannot be honoured; warn of what has nothing to act on.

    Raises:
        ConfigError: On the first key that is refused, with the mend or the nearest valid key.
    """
    for check in checks_of_keys(config):
        check()
    idle = [key for key in WITHOUT_EFFECT if _is_on(config.get(key))]
    if "aio" in config and not _rests_on_nvme(config):
        idle.append("aio")
    if idle:
        logger.warning("without effect here: %s", ", ".join(idle))


def checks_of_keys(config: Mapping[str, Any]) -> Iterator[Callable[[], object]]:
    """Each refuses one mistake, with a ConfigError."""
    for key, value in config.items():
        yield partial(_check_key, key, value)
    yield partial(_check_block, config)
    for key, inside in KEYS_INSIDE.items():
        if isinstance(config.get(key), Mapping):
            for each in config[key]:
                yield partial(refuse_unknown, key, {each: None}, inside)
    zero = config.get("zero_optimization")
    if isinstance(zero, Mapping):
        for each in zero:
            yield partial(_check_zero, {each: zero[each]})


def _check_key(key: str, value: Any) -> None:
    if key in MENDS:
        if _is_on(value):
            raise ConfigError(f"{key}: {MENDS[key]}")
    elif key not in (*ACTING, *WITHOUT_EFFECT, *WRITTEN_BY_ACCELERATE):
        near = get_close_matches(str(key), ACTING, n=1, cutoff=0.7)
        mend = f"did you mean {near[0]!r}?" if near else "docs/config.md lists the keys"
        raise ConfigError(f"{key}: unknown key; {mend}")


def _check_block(config: Mapping[str, Any]) -> None:
    if BLOCK not in config:
        raise ConfigError(f'no "{BLOCK}" block in the JSON; add "{BLOCK}": {{}}')


def zero_keys() -> list[str]:
    """Those that DeepSpeed has in ``zero_optimization``."""
    fields = DeepSpeedZeroConfig.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias)]


def _check_zero(zero: Mapping[str, Any]) -> None:
    refuse_unknown("zero_optimization", zero, zero_keys())
    for key in ("cpu_offload", "cpu_offload_param"):
        if zero.get(key):
            raise ConfigError(
                f"zero_optimization.{key}: of another optimizer; write "
                f'"{BLOCK}": {{"offload_param": {{"device": "cpu"}}}} instead'
            )


def _rests_on_nvme(config: Mapping[str, Any]) -> bool:
    homes = (config.get(BLOCK), config.get("zero_optimization"))
    params = [home.get("offload_param") for home in homes if isinstance(home, Mapping)]
    return any(isinstance(each, Mapping) and each.get("device") == "nvme" for each in params)


def _is_on(value: Any) -> bool:
    """Whether a key asks for something: a block that is switched off does not."""
    return bool(value.get("enabled", True) if isinstance(value, Mapping) and value else value)
