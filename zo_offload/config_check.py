"""Everything that ``initialize`` would refuse in a JSON, at once, before any model is touched.

A check is a call that raises a ConfigError. Reading a JSON for a run stops at the first; here each
is called by itself, and what they say is collected.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from zo_offload.config import check_beside, parse_config
from zo_offload.deepspeed_json import Settings, check_beside_block, read_settings
from zo_offload.deepspeed_keys import COUNTS, checks_of_keys
from zo_offload.errors import ConfigError
from zo_offload.trainable.choose import check_files


def mistakes(config: Mapping[str, Any]) -> list[str]:
    """One line each; empty where ``initialize`` would take the JSON.

    Example:
        >>> found = mistakes({"zeroth_order": {"probs": 4, "eps": 0}, "amp": True})
        >>> [each.partition(":")[0] for each in found]
        ['amp', 'zeroth_order.eps', 'zeroth_order.probs']
    """
    found = collected(checks_of_keys(config))
    found += collected([partial(parse_config, config), partial(check_beside, config)])
    found += collected(check_beside_block(config))
    found = list(dict.fromkeys(found))
    # What is left to see needs a JSON whose parts are sound.
    return found or collected([partial(_read, config)])


def collected(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What the checks say that do not hold."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found += [str(error), *error.others]
    return found


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON as the Trainer of transformers may fill it in: ``"auto"`` beside our block is out.

    Example:
        >>> without_auto({"train_batch_size": "auto", "fp16": {"enabled": "auto"}, "aio": {}})
        {'train_batch_size': 1, 'fp16': {}, 'aio': {}}
    """
    filled: dict[str, Any] = {}
    for key, value in config.items():
        if value == "auto":
            if key == COUNTS[0]:  # DeepSpeed wants one of the three
                filled[key] = 1
        elif isinstance(value, Mapping) and key != "zeroth_order":
            filled[key] = without_auto(value)
        else:
            filled[key] = value
    return filled


def summary(settings: Settings) -> list[str]:
    """The defaults that matter, and what was written instead of them."""
    block, deepspeed = settings.zeroth_order, settings.deepspeed
    dtype = "the model's own dtype" if settings.dtype is None else str(settings.dtype)[6:]
    home = {"none": "the device", "cpu": "host memory", "nvme": "disk"}[block.offload_param.device]
    micro, steps = deepspeed.train_micro_batch_size_per_gpu, deepspeed.gradient_accumulation_steps
    return [
        f"forwards: {block.num_lanes} of each micro-batch ({block.probes} probes, "
        f"{block.estimator}), in {dtype}",
        f"batch: {deepspeed.train_batch_size} a step on one rank, as {steps} micro-batches of "
        f"{micro}",
        f"direction: {block.direction}, scale {block.direction_scale}, eps {block.eps:g}, "
        f"seed {block.seed}",
        f"update: {block.update.type}, lr {settings.lr:g}, weight_decay {settings.weight_decay:g}, "
        f"lag {block.update.lag}",
        f"moves: {_what_moves(settings)}",
        f"rests: blocks on {home}, wire {block.wire or 'identity'}, master {block.master}",
        f"journal: {block.journal.path or 'in memory (zo-offload train: in its --output)'}",
    ]


def _what_moves(settings: Settings) -> str:
    trainable = settings.zeroth_order.trainable
    chosen = {
        key: list(value)
        for key in ("parameters", "kinds", "layers")
        if (value := getattr(trainable, key)) is not None
    }
    chosen_by = ", ".join(f"{key} {value}" for key, value in chosen.items())
    return trainable.mode + (f", {chosen_by}" if chosen else "")


def _read(config: Mapping[str, Any]) -> None:
    check_files(read_settings(config).zeroth_order)
