"""How noisy the losses are, against the difference that a step is made of.

``L+ - L-`` is some 1e-3 of a loss; in half precision rounding can drown it. The noise is measured
without a more exact model: losses at equally spaced points along one direction are a smooth
function plus rounding; high differences of a smooth function vanish, those of noise do not.

Reference: Moré and Wild (2011), "Estimating computational noise", SIAM J. Sci. Comput. 33(3),
section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from zo_offload.eps_watch import is_stepwise

NUM_POINTS = 7
ORDER = 4


@dataclass(frozen=True)
class LossNoise:
    """Noise of a loss difference and the signal in it.

    Attributes:
        noise: Standard deviation of the rounding in ``L+ - L-``.
        signal: Root mean square of ``L+ - L-``, noise taken off: ``2 eps |projected_grad|``.
        is_stepwise: Whether the objective takes few values, as an accuracy does: the loss is not a
            smooth function plus rounding, and the two numbers say nothing.
    """

    noise: float
    signal: float
    is_stepwise: bool = False

    @property
    def ratio(self) -> float:
        """Noise over signal; above 1/2 a step is more rounding than learning."""
        return self.noise / self.signal if self.signal > 0 else math.inf


def positions(eps: float) -> list[float]:
    """Coefficients at which losses are needed: equally spaced from ``-eps`` to ``+eps``.

    Example:
        >>> positions(3.0)
        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    """
    half = NUM_POINTS // 2
    return [eps * (i - half) / half for i in range(NUM_POINTS)]


def estimate(rows: Sequence[Sequence[float]]) -> LossNoise:
    """Noise and signal from losses at :func:`positions`, one row a direction.

    Example:
        >>> smooth = [(x**2 + 2 * x) for x in positions(1e-3)]
        >>> found = estimate([smooth, smooth])
        >>> found.noise < 1e-12, round(found.signal, 6)
        (True, 0.004)
    """
    variance = sum(_noise_variance(row) for row in rows) / len(rows)
    squared = sum((row[-1] - row[0]) ** 2 for row in rows) / len(rows)
    noise = math.sqrt(2.0 * variance)
    signal = math.sqrt(max(squared - noise**2, 0.0))
    return LossNoise(noise, signal, is_stepwise([loss for row in rows for loss in row]))


def _noise_variance(values: Sequence[float]) -> float:
    """Mean square of the ORDER-th differences, scaled to the variance of one value."""
    table = list(values)
    for _ in range(ORDER):
        table = [b - a for a, b in pairwise(table)]
    gamma = math.factorial(ORDER) ** 2 / math.factorial(2 * ORDER)
    return gamma * sum(d * d for d in table) / len(table)
