"""A MeZO step as published: perturbed in place, four draws of normal noise a parameter.

Malladi et al. (2023), arXiv 2305.17333, algorithm 1: perturb by +eps z, then by -2 eps z, restore
by +eps z, update by -lr g z; z is drawn anew each time from the step's seed.
"""

from collections.abc import Callable, Iterable, Iterator

import torch


def perturb(parameters: Iterable[torch.Tensor], seed: int, factor: float) -> None:
    """Add ``factor * z`` to each parameter."""
    _move(list(parameters), seed, None, factor)


def step(
    parameters: list[torch.Tensor],
    loss: Callable[[], float],
    seed: int,
    eps: float = 1e-3,
    lr: float = 1e-7,
    kept: bool = False,
) -> float:
    """Estimate along one direction, descend; returns the projected gradient.

    Args:
        parameters: Moved in place.
        loss: At the parameters as they are.
        seed: Of the direction.
        eps: Distance along it.
        lr: Of the step.
        kept: Keep the direction's values from draw to draw, which are the same: to the same bits,
            in less time and more memory. Not to be timed.
    """
    held = list(_drawn(parameters, seed)) if kept else None
    _move(parameters, seed, held, eps)
    plus = loss()
    _move(parameters, seed, held, -2 * eps)
    minus = loss()
    _move(parameters, seed, held, eps)
    grad = (plus - minus) / (2 * eps)
    for parameter, z in zip(parameters, held or _drawn(parameters, seed), strict=True):
        parameter.data = parameter.data - lr * (grad * z)
    return grad


def _drawn(parameters: Iterable[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    torch.manual_seed(seed)
    for parameter in parameters:
        yield torch.normal(
            mean=0, std=1, size=parameter.shape, dtype=parameter.dtype, device=parameter.device
        )


def _move(
    parameters: list[torch.Tensor], seed: int, held: list[torch.Tensor] | None, factor: float
) -> None:
    for parameter, z in zip(parameters, held or _drawn(parameters, seed), strict=True):
        parameter.data = parameter.data + factor * z
