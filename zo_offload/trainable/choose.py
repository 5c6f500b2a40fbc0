"""The mode of a run: what the JSON says, unless the model is a ``PeftModel`` and says it itself."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.mask import read_mask
from zo_offload.trainable.detect import is_peft_model
from zo_offload.trainable.full import Full
from zo_offload.trainable.low_rank import LowRankMatrices
from zo_offload.trainable.peft import Peft, check_adapter
from zo_offload.trainable.scales import Scales
from zo_offload.trainable.selection import PATH
from zo_offload.trainable.sparse import Sparse
from zo_offload.trainable.trainable import Trainable

MODES: dict[str, Callable[[ZOConfig], Trainable]] = {
    "full": Full,
    "peft": Peft,
    "sparse": Sparse,
    "low_rank": LowRankMatrices,
    "scales": Scales,
}


def check_files(config: ZOConfig) -> None:
    """Look for what the JSON names on a disk, before a model is loaded.

    Raises:
        ConfigError: It is not there, or not what it should be.
    """
    wanted = config.trainable
    for key, check in (("mask", read_mask), ("adapter", check_adapter)):
        path = getattr(wanted, key)
        if path is not None:
            try:
                check(Path(path))
            except CheckpointError as error:
                raise ConfigError(f"{PATH}.{key}: {error}") from error


def trainable_for(
    model: nn.Module, config: ZOConfig, dtype: torch.dtype | None = None
) -> Trainable:
    """The mode that is asked for.

    Args:
        model: As the caller gives it.
        config: The ``zeroth_order`` block.
        dtype: What forwards compute in (None: as the model is).

    Raises:
        ConfigError: The JSON asks for another choice than the model's own.
    """
    wanted = config.trainable
    if not is_peft_model(model):
        chosen = MODES[wanted.mode](config)
        chosen.dtype = dtype
        return chosen
    if wanted.mode not in ("full", Peft.mode):
        raise ConfigError(
            f'{PATH}.mode: "{wanted.mode}" is for a plain model, and this is a PeftModel, whose '
            'adapter moves; write "peft", or pass the plain model'
        )
    said = [key for key in type(wanted).model_fields if key != "mode" and getattr(wanted, key)]
    if said:
        raise ConfigError(
            f"{PATH}.{said[0]}: the model is a PeftModel, which says itself what moves; leave "
            f"{said[0]} out, or pass the plain model"
        )
    return Peft(config)
