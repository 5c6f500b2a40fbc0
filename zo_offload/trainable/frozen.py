"""``frozen``: nothing moves. The weights are only looked at, and rest as small as a base does."""

from pathlib import Path
from typing import Any

from torch import nn

from zo_offload.errors import ModelError
from zo_offload.trainable.trainable import Trainable, Values


class Frozen(Trainable):
    """A base and nothing beside it; no JSON asks for it.

    Example:
        >>> from zo_offload.step import Stepper
        >>> net = nn.Sequential(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))
        >>> with Stepper(net, mode=Frozen()) as stepper:
        ...     stepper.weights.map.units[0].rest_bytes
        0
    """

    mode = "frozen"
    moves_parameters = False

    def __init__(self) -> None:
        self._flags: dict[nn.Parameter, bool] = {}

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`Trainable`: the model itself."""
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for parameter in self._flags:
            parameter.requires_grad_(False)
        return model

    def undo(self) -> None:
        """See :class:`Trainable`."""
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._flags = {}

    def header(self, model: nn.Module) -> dict[str, Any]:
        """See :class:`Trainable`."""
        return {"trainable": {"mode": self.mode}}

    def save(self, model: nn.Module, weights: Values, directory: Path) -> None:
        """See :class:`Trainable`."""
        raise ModelError(
            "nothing moves, so that there is nothing to save; save the model it was made of"
        )
