"""Overlays: the few values that move in the place of a frozen matrix, and how they get into it.

A matrix rests frozen, packed by its codec. Its overlay's values are fp32, ambient, and move as any
parameter does. When the matrix is written to the scratch, and wherever else it is read as the
forward sees it, they are written into it. An overlay knows bytes and places, never directions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from zo_offload.ops import Segment, Span


@dataclass(frozen=True)
class Patch(ABC):
    """What an overlay writes into one part of its matrix: into all of it, unless units divide it.

    Attributes:
        values: Which of the overlay's values, as a range of their flat positions.
    """

    values: range
    covers = False
    """Whether every element of the part is written: then nobody need decode it before."""

    @property
    @abstractmethod
    def places(self) -> torch.Tensor | None:
        """Where the values go, on the CPU; it is kept on the device. None where that is plain."""

    @abstractmethod
    def write(
        self,
        target: torch.Tensor,
        values: torch.Tensor,
        places: torch.Tensor | None,
        base: "Base",
    ) -> None:
        """Write values into the decoded part.

        Args:
            target: Its elements, flat, in the forward's dtype: decoded, or written before.
            values: fp32 ``[len(self.values)]``, on the target's device.
            places: As ``places``, there.
            base: What the part was decoded from.
        """


@dataclass(frozen=True)
class Base:
    """A part of a frozen matrix as it rests.

    Attributes:
        span: That it lies in.
        segment: The part.
        wire: Of the span: packed bytes where a codec packs it, else elements.
    """

    span: Span
    segment: Segment
    wire: torch.Tensor


@dataclass(frozen=True)
class Overlay(ABC):
    """The values of one matrix.

    Attributes:
        matrix: Its first name in the model.
        parameter: fp32: initial values, until they are taken over.
    """

    matrix: str
    parameter: nn.Parameter
    non_negative = False
    """Whether a step leaves no value below zero."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the values: what stands for them in checkpoints, and no parameter of the model has."""

    @abstractmethod
    def patch(self, segment: Segment) -> Patch:
        """What belongs into a part of the matrix."""
