"""The interface of all modes: what a run needs to know of what moves."""

import hashlib
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from zo_offload.trainable.moving import ALWAYS, Moving
from zo_offload.units import ModelMap


class Values(Protocol):
    """Current weights, wherever they are.

    Attributes:
        map: Of the model.
    """

    map: ModelMap

    def value(self, name: str) -> torch.Tensor:
        """A parameter as the forward sees it."""
        ...


class Trainable(ABC):
    """A mode, for one model.

    Attributes:
        mode: Its name in the JSON.
        moving: Of the prepared model.
        moves_parameters: Whether parameters of the model move, as ``requires_grad`` says.
        dtype: What forwards compute in (None: as the model is).
        clip: Limit on the magnitude of projected gradients, where the config names none.
    """

    mode: str
    moves_parameters: bool = True
    moving: Moving = ALWAYS
    dtype: torch.dtype | None = None
    clip: float = math.inf

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """The model that is trained, before it is mapped; ``requires_grad`` says what moves.

        Raises:
            ConfigError: What is asked for does not fit the model; call :meth:`abandon`.
        """

    @abstractmethod
    def undo(self) -> None:
        """At the end of a run: give the parameters their flags back."""

    def abandon(self) -> None:
        """Where no run came of it: the caller's model is as it was."""
        self.undo()

    @abstractmethod
    def save(self, model: nn.Module, weights: Values, directory: Path) -> None:
        """Write what other libraries load: the current weights, as the forward computes with them.

        Raises:
            ModelError: The model cannot be written so.
        """

    def header(self, model: nn.Module) -> dict[str, Any]:
        """What the journal's header says of it: whatever decides bits. Nothing where all move."""
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        rotation = self.moving.rotation
        if all(flags.values()) and rotation is None:
            return {}
        names = "\n".join(sorted(name for name, moves in flags.items() if moves))
        said: dict[str, Any] = {"moves": hashlib.sha256(names.encode()).hexdigest()}
        if rotation is not None:
            turns = "\n".join(f"{name} {turn}" for name, turn in sorted(rotation.group_of.items()))
            said["rotate"] = {
                "interval": rotation.interval,
                "groups": rotation.num_groups,
                "turns": hashlib.sha256(turns.encode()).hexdigest(),
            }
        return {"trainable": {"mode": self.mode, **said}}
