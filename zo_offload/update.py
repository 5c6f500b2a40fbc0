"""From projected gradients to coefficients on directions: pure functions on scalars."""

from collections.abc import Sequence
from dataclasses import replace

from zo_offload.ops import Draw, StepUpdate

DECAY_GRAIN = 2.0**-16
"""Weight decay is applied to the masters when this much has gathered.

One step's ``lr * weight_decay`` is often 1e-8, and ``1 - 1e-8`` is 1 in fp32. Gathered in float64
until it is 256 fp32 steps wide, it is rounded without bias and never more than 2^-16 of a weight is
owed.
"""


def sgd(projected_grads: Sequence[float], lr: float) -> list[float]:
    """Coefficients of plain descent: ``W -= sum_k lr g_k / K * z_k``.

    Args:
        projected_grads: One a probe.
        lr: Learning rate of this step.

    Returns:
        One coefficient a probe, to be subtracted.

    Example:
        >>> sgd([4.0, -2.0], lr=0.5)
        [1.0, -0.5]

    Reference:
        Malladi et al. (2023), arXiv 2305.17333, algorithm 1 (K = 1) and algorithm 2 (K > 1).
    """
    return [lr * g / len(projected_grads) for g in projected_grads]


def gather_decay(owed: float, lr: float, weight_decay: float) -> tuple[float, float]:
    """Decoupled weight decay, gathered until it is large enough to be exact.

    Args:
        owed: Factor gathered so far and not yet applied (1.0 at first).
        lr: Learning rate of this step.
        weight_decay: Decay rate.

    Returns:
        ``(applied, owed)``: the factor that this step multiplies the weights by, and what remains.

    Example:
        >>> gather_decay(1.0, lr=1e-6, weight_decay=0.1)
        (1.0, 0.9999999)
        >>> gather_decay(1.0, lr=0.1, weight_decay=0.1)
        (0.99, 1.0)

    Reference:
        Loshchilov and Hutter (2019), arXiv 1711.05101, section 2.
    """
    owed *= 1.0 - lr * weight_decay
    return (owed, 1.0) if 1.0 - owed >= DECAY_GRAIN else (1.0, owed)


def settled(step: int, lag: int) -> int:
    """Number of steps that masters carry at the visit of a step.

    Args:
        step: Its number, which is that of the steps before it.
        lag: 0: all of them. L: the largest multiple of L below ``step``.

    Example:
        >>> [settled(step, lag=0) for step in range(5)]
        [0, 1, 2, 3, 4]
        >>> [settled(step, lag=2) for step in range(6)]
        [0, 0, 0, 2, 2, 4]
    """
    return step if lag == 0 else max(step - 1, 0) // lag * lag


def joined(steps: Sequence[StepUpdate], grain: int) -> list[StepUpdate]:
    """What a pass over masters takes: the steps of a stretch of the grid in one sum.

    With momentum neighbouring steps go along nearly the same directions. In one sum each is drawn
    once, with the sum of its coefficients in float64. Where weights decay a sum begins anew.

    Args:
        steps: In order.
        grain: Steps from one point of the grid to the next; 1: none are joined.

    Example:
        >>> z = [Draw(0, step, 0, 1.0) for step in range(3)]
        >>> steps = [StepUpdate(1.0, (z[t], z[t + 1]), step=t) for t in range(2)]
        >>> [[d.coefficient for d in each.draws] for each in joined(steps, grain=2)]
        [[1.0, 2.0, 1.0]]
    """
    if grain == 1:
        return list(steps)
    groups: list[list[StepUpdate]] = []
    for each in steps:
        begins = not groups or each.decay != 1.0
        if begins or each.step // grain != groups[-1][-1].step // grain:
            groups.append([])
        groups[-1].append(each)
    return [_summed(group) for group in groups]


def _summed(steps: Sequence[StepUpdate]) -> StepUpdate:
    totals: dict[tuple[int, int, int], float] = {}
    for each in steps:
        for d in each.draws:
            key = d.step, d.probe, d.seed
            totals[key] = totals.get(key, 0.0) + d.coefficient
    draws = (Draw(seed, step, probe, c) for (step, probe, seed), c in sorted(totals.items()))
    return replace(steps[-1], decay=steps[0].decay, draws=tuple(draws))


def in_factor(steps: Sequence[StepUpdate], momentum: float = 0.0) -> tuple[Draw, ...]:
    """What the steps of an interval add to the small factor: ``A += sum of coefficient * U``.

    With momentum b the step t applies ``lr_t M_t``, where ``M_t = b M_{t-1} + (1 - b) g_t U_t`` and
    M is 0 before the first of the steps. So U_s has, after them, the coefficient ``sum over t >= s
    of lr_t (1 - b) b^(t - s) g_s``.

    Args:
        steps: Of one interval, in order, from its first.
        momentum: b.

    Returns:
        Every draw of the steps, in order, with its coefficient.

    Example:
        >>> steps = [
        ...     StepUpdate(1.0, (Draw(0, t, 0, 0.1 * g),), lr=0.1, slopes=(g,))
        ...     for t, g in enumerate([1.0, 2.0])
        ... ]
        >>> [round(draw.coefficient, 9) for draw in in_factor(steps, momentum=0.5)]
        [0.075, 0.1]

    Reference:
        Chen et al. (2024), arXiv 2410.07698, algorithm 2.
    """
    found: list[list[Draw]] = []
    later = 0.0  # sum over later steps t of lr_t b^(t - s - 1)
    for step in reversed(steps):
        slopes = step.slopes if momentum else (0.0,) * len(step.draws)
        found.append(
            [
                replace(d, coefficient=(1 - momentum) * (d.coefficient + momentum * later * slope))
                for d, slope in zip(step.draws, slopes, strict=True)
            ]
        )
        later = step.lr + momentum * later
    return tuple(draw for draws in reversed(found) for draw in draws)
