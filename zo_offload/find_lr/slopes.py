r"""What a few losses say of the learning rate, before any step.

Along one direction z, on two batches, at W and W +- eps z::

    g = (L+ - L-) / (2 eps)             slope of a batch
    h = (L+ + L- - 2 L0) / eps^2        z^T H z of a batch

``E[g_1 g_2]`` over two batches is a, the slope that batches agree on; ``E[g^2]`` is a + c, with the
noise c of a batch. A step of K directions at rate r gains ``r a`` and loses ``r^2 (a + c) h / 2K``:
the best rate is ``K a / ((a + c) h)``. This is greedy, and local: at the start of fine-tuning the
loss is often straight along every direction (h is lost in its error), and what is steep is soon
used up. So it is one of two guesses; the other asks for a step that takes a few percent of the
loss.

Reference: Spall (1992), eq. 2.2; the rate is the minimum of a quadratic model of one step.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.03
"""Of the loss, that a step takes at the guessed rate: the middle of what served, 0.01 to 0.1."""
SURE = 2.0  # standard errors from 0


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    @property
    def is_positive(self) -> bool:
        """Beyond its error."""
        return self.value > SURE * self.error


@dataclass(frozen=True)
class Slopes:
    """Of the loss at one place, over random directions.

    Attributes:
        agreed: a: the squared slope that two batches agree on.
        squared: a + c: the squared slope of a batch.
        curvature: h.
        loss: At W.
    """

    agreed: Mean
    squared: Mean
    curvature: Mean
    loss: float


Losses = tuple[float, float, float]  # at W, W + eps z, W - eps z


def slopes_of(rows: Sequence[tuple[Losses, Losses]], eps: float) -> Slopes:
    """From the losses on two batches, a row a direction.

    Example:
        >>> def at(z, noise):  # of x + x^2 along z, and of a batch's own slope
        ...     return tuple(1.0 + (z + noise) * e + e * e for e in (0.0, 0.5, -0.5))
        >>> found = slopes_of([(at(z, 1.0), at(z, -1.0)) for z in (3.0, -3.0)], eps=0.5)
        >>> found.agreed.value, found.squared.value, found.curvature.value
        (8.0, 10.0, 2.0)
    """
    pairs = [tuple((plus - minus) / (2 * eps) for _, plus, minus in row) for row in rows]
    bends = [(plus + minus - 2 * here) / eps**2 for row in rows for here, plus, minus in row]
    return Slopes(
        _mean([first * second for first, second in pairs]),
        _mean([g * g for pair in pairs for g in pair]),
        _mean(bends),
        statistics.fmean(here for row in rows for here, _, _ in row),
    )


def by_curvature(found: Slopes, probes: int) -> float | None:
    """The greedy best rate; None where agreement or curvature is within its error."""
    if not (found.agreed.is_positive and found.curvature.is_positive):
        return None
    return probes * found.agreed.value / (found.squared.value * found.curvature.value)


def by_loss(found: Slopes) -> float | None:
    """The rate at which a step takes a few percent of the loss; None where nothing slopes.

    Example:
        >>> one = Mean(1.0, 0.1)
        >>> round(by_loss(Slopes(one, one, one, loss=2.0)), 9)
        0.06
    """
    slope = found.agreed if found.agreed.is_positive else found.squared
    if not (slope.value > 0 and found.loss and math.isfinite(found.loss)):
        return None
    return SHARE * abs(found.loss) / slope.value


def _mean(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Mean(statistics.fmean(values), error)
