"""Modes whose values lie over a base that is frozen, and is packed when the run begins."""

from pathlib import Path

from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.converted import converted_of
from zo_offload.errors import ModelError
from zo_offload.trainable.decoded import mark
from zo_offload.trainable.frozen import Frozen
from zo_offload.trainable.full import save_plain
from zo_offload.trainable.trainable import Values


class LaidOver(Frozen):
    """What such modes have in common.

    Args:
        config: The ``zeroth_order`` block.
    """

    def __init__(self, config: ZOConfig) -> None:
        super().__init__()
        self._config = config

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`Trainable`: the model itself, all of it frozen.

        Raises:
            ModelError: Its blocks are laid out with masters.
        """
        if converted_of(model) is not None:
            raise ModelError(
                f"a converted model's blocks are laid out to move; {self.mode} needs a base that "
                "does not: give the model that was converted"
            )
        return super().prepare(model)

    def save(self, model: nn.Module, weights: Values, directory: Path) -> None:
        """See :class:`Trainable`: a plain Hugging Face directory, decoded, values in it."""
        save_plain(model, directory)
        mark(directory, self.mode)
