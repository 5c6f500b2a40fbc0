"""A MeZO step as published: perturbed in place, four draws of normal noise a parameter.

Malladi et al. (2023), arXiv 2305.17333, algorithm 1: perturb by +eps z, then by -2 eps z, restore
by +eps z, update by -lr g z; z is drawn anew each time from the step's seed.
"""

from collections.abc import Callable, Iterable

import torch


def perturb(parameters: Iterable[torch.Tensor], seed: int, factor: float) -> None:
    """Add ``factor * z`` to each parameter."""
    torch.manual_seed(seed)
    for parameter in parameters:
        z = torch.normal(mean=0, std=1, size=parameter.shape, dtype=parameter.dtype)
        parameter.data = parameter.data + factor * z


def step(
    parameters: list[torch.Tensor],
    loss: Callable[[], float],
    seed: int,
    eps: float = 1e-3,
    lr: float = 1e-7,
) -> float:
    """Estimate along one direction, descend; returns the projected gradient."""
    perturb(parameters, seed, eps)
    plus = loss()
    perturb(parameters, seed, -2 * eps)
    minus = loss()
    perturb(parameters, seed, eps)
    grad = (plus - minus) / (2 * eps)
    torch.manual_seed(seed)
    for parameter in parameters:
        z = torch.normal(mean=0, std=1, size=parameter.shape, dtype=parameter.dtype)
        parameter.data = parameter.data - lr * (grad * z)
    return grad
