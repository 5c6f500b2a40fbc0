"""What kernels are asked for: directions, the updates of steps, perturbed copies."""

from dataclasses import dataclass

import torch

# The numbers by which compiled kernels know the directions.
DIRECTIONS = {"rademacher": 0, "gaussian": 1}


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
    """What one step does to every trainable weight: times ``decay``, then minus the draws.

    Attributes:
        decay: float64 factor.
        draws: In order of their probes.
        seed: Key of the noise by which ``bf16+8`` and ``bf16_sr`` masters are rounded.
        step: Number of the step, in that noise too.
        lr: Learning rate of the step; 0 where it was skipped.
        slopes: By draw, what its coefficient is at a learning rate of 1.
    """

    decay: float
    draws: tuple[Draw, ...]
    seed: int = 0
    step: int = 0
    lr: float = 0.0
    slopes: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """A perturbed copy of a span.

    Attributes:
        out: ``[elements]`` in the forward's dtype, to be written.
        draw: Direction and signed coefficient.
    """

    out: torch.Tensor
    draw: Draw
