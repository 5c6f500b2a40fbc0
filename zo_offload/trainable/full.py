"""``full``: every parameter moves, or those that are chosen by name, by layer, or by turn."""

from pathlib import Path
from typing import Any

from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.converted import converted_of
from zo_offload.errors import ConfigError, ModelError
from zo_offload.trainable.moving import Moving
from zo_offload.trainable.selection import PATH, selected, turns
from zo_offload.trainable.trainable import Trainable, Values
from zo_offload.units import block_map


class Full(Trainable):
    """What has ``requires_grad``, as far as it is chosen.

    Patterns, kinds and layers choose together: a parameter must be of all. What the caller has
    frozen stays so.

    Args:
        config: The ``zeroth_order`` block.
    """

    mode = "full"

    def __init__(self, config: ZOConfig) -> None:
        self._config = config.trainable
        self._unit = config.unit
        self._frozen: list[nn.Parameter] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`Trainable`: the model itself."""
        said = self._config
        if converted_of(model) is not None and (said.parameters or said.kinds or said.layers):
            raise ModelError(
                "a converted model's blocks are laid out to move as a whole; to choose some of "
                f"their parameters ({PATH}), give the model that was converted"
            )
        chosen = selected(model, said, self._unit)
        moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if moved and not moved.keys() & chosen:
            raise ConfigError(
                f"{PATH}: parameters, kinds and layers together choose none of the model's "
                f"{len(moved)} trainable parameters; a parameter must be of all"
            )
        self._frozen = [p for name, p in moved.items() if name not in chosen]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        rotate = self._config.rotate
        if rotate is not None:
            blocks = block_map(model, self._unit)
            self.moving = Moving(rotation=turns(model, blocks, rotate.blocks, rotate.interval))
        return model

    def undo(self) -> None:
        """See :class:`Trainable`."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def save(self, model: nn.Module, weights: Values, directory: Path) -> None:
        """See :class:`Trainable`: a plain Hugging Face directory."""
        save_plain(model, directory)


def save_plain(model: nn.Module, directory: Path) -> None:
    """Write a plain Hugging Face directory.

    Raises:
        ModelError: The model is of no class that knows how.
    """
    saves: Any = model
    if not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"{type(model).__name__} has no save_pretrained; "
            "write engine.module.state_dict() with safetensors.torch.save_file"
        )
    saves.save_pretrained(str(directory), state_dict=model.state_dict())
