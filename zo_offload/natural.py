"""Natural gradient in the subspace of a step's probes: pure functions on floats.

Every lane computes a loss an example before their mean is taken. How the examples' slopes along
the probes go together says where the loss is steep: a direction that all examples share (how often
the model says each label, say) has most of the curvature, every probe has a part of it, and it
limits the learning rate of all. Dividing by the K x K Fisher matrix damps that direction alone.

Sums are loops in one order, on Python floats, each product rounded before it is added: the same
bits on every machine and rank, as no BLAS and no fused multiply-add would give.
"""

import math
from collections.abc import Collection, Sequence

from zo_offload.estimator import SIGNS

MOST_PROBES = 64  # the solve is K^3 / 3 steps of the interpreter: 15 ms
LEAST_DAMPING = 1e-6  # eigenvalues are divided by it, rounding with them


def pairs(probes: int) -> list[tuple[int, int]]:
    """The upper triangle of a K x K matrix, by rows: the order in which products travel.

    Example:
        >>> pairs(2)
        [(0, 0), (0, 1), (1, 1)]
    """
    return [(k, other) for k in range(probes) for other in range(k, probes)]


def mean_products(losses: Sequence[Sequence[float]], estimator: str = "spsa") -> list[float]:
    r"""Of a micro-batch: ``mean_i d_ik d_il``, a number for each of :func:`pairs`.

    ``d_ik`` is example i's projected gradient along probe k but for a factor that is the same for
    all (``l_ik+ - l_ik-``; one-sided, ``l_ik`` less the mean over probes): in
    :func:`preconditioned` it cancels.

    Args:
        losses: A row a lane, in (probe, sign) order, a loss an example. What is not finite counts
            as 0: its lane's mean loss is not finite either, and takes the probe out.
        estimator: ``spsa`` or ``one_sided``.

    Returns:
        NaN for all where there are no examples.

    Example:
        Two probes, two examples:

        >>> mean_products([[1.5, 2.0], [1.0, 1.0], [3.0, 1.0], [1.0, 1.0]])
        [0.625, 0.5, 2.0]
    """
    examples = [_differences(lanes, estimator) for lanes in zip(*losses, strict=True)]
    found = []
    for k, other in pairs(len(losses) // len(SIGNS[estimator])):
        total = _sum([row[k] * row[other] for row in examples])
        found.append(total / len(examples) if examples else math.nan)
    return found


def preconditioned(
    grads: Sequence[float],
    products: Sequence[float],
    damping: float,
    probes: Collection[int],
    estimator: str = "spsa",
) -> list[float]:
    r"""Projected gradients less what is steep: ``(F / phi + I)^-1 g``.

    ``F_kl = mean_i g_ik g_il`` is the empirical Fisher matrix in the subspace, ``phi`` is
    ``damping`` times the mean of its diagonal. With much damping g comes back; with little, the
    natural gradient, shorter by phi. Only F's proportions count, so that neither eps nor a factor
    on the loss changes more than the length of g.

    Args:
        grads: One a probe, as the estimator gives them.
        products: What :func:`mean_products` gives, or its mean over micro-batches.
        damping: At least ``LEAST_DAMPING``.
        probes: Those that take part: all whose losses are finite.
        estimator: ``spsa`` or ``one_sided``.

    Returns:
        One a probe: 0 for those that take no part, NaN for those of them whose gradient or whose
        products are not finite. They leave the others as if there were none of them.

    Example:
        Two probes that see the same steep direction are damped, a third that does not is nearly
        left alone:

        >>> found = preconditioned([1.0, 1.0, 0.1], [4.0, 4.0, 0, 4.0, 0, 0.01], 0.5, range(3))
        >>> [round(g, 3) for g in found]
        [0.143, 0.143, 0.099]

    Reference:
        Amari (1998), "Natural gradient works efficiently in learning", Neural Computation 10(2);
        Kunstner, Balles and Hennig (2019), "Limitations of the empirical Fisher approximation for
        natural gradient descent", arXiv 1905.12558, eq. 3, and why it is damped: far from a good
        fit the empirical Fisher is a poor curvature. Deviation: of the loss along K directions, not
        of all weights, from differences instead of gradients.
    """
    table = dict(zip(pairs(len(grads)), products, strict=True))
    fit = [k for k in sorted(probes) if math.isfinite(grads[k]) and math.isfinite(table[k, k])]
    matrix = [[table[min(k, other), max(k, other)] for other in fit] for k in fit]
    if estimator == "one_sided":
        matrix = _centred(matrix)
    wanted = [grads[k] for k in fit]
    mean = _sum([row[i] / len(fit) for i, row in enumerate(matrix)])
    if mean > 0.0:  # else no example changes along any probe, and there is nothing to divide by
        wanted = _solved([[value / mean / damping for value in row] for row in matrix], wanted)
    found = [math.nan if k in probes else 0.0 for k in range(len(grads))]
    for k, grad in zip(fit, wanted, strict=True):
        found[k] = grad
    return found


def _differences(lanes: Sequence[float], estimator: str) -> list[float]:
    """Of one example, one a probe."""
    if estimator == "spsa":
        found = [plus - minus for plus, minus in zip(lanes[0::2], lanes[1::2], strict=True)]
    else:
        finite = [loss for loss in lanes if math.isfinite(loss)]
        mean = _sum(finite) / len(finite) if finite else 0.0
        found = [loss - mean for loss in lanes]
    return [each if math.isfinite(each) else 0.0 for each in found]


def _centred(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of differences from the mean over these probes alone, whatever mean was taken before."""
    size = len(matrix)
    means = [_sum(row) / size for row in matrix]
    mean = _sum(means) / size if size else 0.0
    return [
        [value - (means[i] + means[j]) + mean for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]


def _solved(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """``(matrix + I)^-1 right`` of a positive semidefinite matrix, which needs no pivoting."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, row in enumerate(rows):
        row[i] += 1.0
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for column in range(i + 1, size + 1):
                row[column] -= factor * pivot[column]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = _sum([rows[i][column] * found[column] for column in range(i + 1, size)])
        found[i] = (rows[i][size] - known) / rows[i][i]
    return found


def _sum(values: Sequence[float]) -> float:
    """From the first to the last; the built-in one compensates, in some versions of Python."""
    total = 0.0
    for value in values:
        total += value
    return total
