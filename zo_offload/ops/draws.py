"""What kernels are asked for: directions, the updates of steps, perturbed copies."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Draw:
    """One direction, and how far to go along it.

    Attributes:
        seed: 64-bit key.
        step: Step whose direction it is.
        probe: Which of the step's directions.
        coefficient: float64 factor on z.
    """

    seed: int
    step: int
    probe: int
    coefficient: float


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """What one step does to every trainable weight: times ``decay``, then minus the draws."""

    decay: float
    draws: tuple[Draw, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A perturbed copy of a span.

    Attributes:
        out: ``[elements]`` in the forward's dtype, to be written.
        draw: Direction and signed coefficient.
    """

    out: torch.Tensor
    draw: Draw
