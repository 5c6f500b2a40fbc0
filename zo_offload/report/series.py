"""Numbers of a run as curves: pure functions from what was found to points.

A curve of a long run is drawn through few points, so that a page stays small: of each stretch of
steps the least and the largest, or its quantiles.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from zo_offload.report.found import Run, Step

MOST_POINTS = 600
MOST_STRETCHES = 60
LEAST_IN_STRETCH = 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Points = tuple[list[float], list[float]]


def finite(xs: Sequence[float], ys: Sequence[float]) -> Points:
    """Without points that have no place.

    Example:
        >>> finite([0, 1, 2], [5.0, math.nan, 7.0])
        ([0, 2], [5.0, 7.0])
    """
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> Points:
    """At most so many finite points: of each stretch its least and its largest.

    Example:
        >>> thinned(range(6), [0, 9, 1, 2, -5, 3], most=4)
        ([0, 1, 4, 5], [0, 9, -5, 3])
    """
    xs, ys = finite(xs, ys)
    if len(xs) <= most:
        return xs, ys
    kept: list[int] = []
    for part in np.array_split(np.arange(len(xs)), most // 2):
        kept += sorted({int(min(part, key=ys.__getitem__)), int(max(part, key=ys.__getitem__))})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def stretches(steps: Sequence[Step]) -> list[Sequence[Step]]:
    """Neighbours together: few stretches, with enough steps in each to have quantiles."""
    number = max(1, min(MOST_STRETCHES, len(steps) // LEAST_IN_STRETCH))
    bounds = np.linspace(0, len(steps), number + 1).astype(int).tolist()
    return [steps[a:b] for a, b in itertools.pairwise(bounds) if b > a]


def grad_quantiles(run: Run) -> tuple[list[float], list[list[float]]]:
    """Middle step of each stretch, and quantiles of the projected gradients' size in it.

    Zeros, of probes whose lanes had equal losses, and steps that were skipped are left out.
    """
    xs: list[float] = []
    rows: list[list[float]] = []
    for stretch in stretches([step for step in run.steps if not step.skipped]):
        sizes = [abs(g) for step in stretch for g in step.grads if g and math.isfinite(g)]
        if sizes:
            xs.append((stretch[0].step + stretch[-1].step) / 2)
            rows.append(np.quantile(sizes, QUANTILES).tolist())
    return xs, rows


def noise_over_signal(run: Run, noise: float | None) -> Points:
    """Rounding in ``L+ - L-`` over what else is in it, of each stretch.

    ``noise / sqrt(mean((L+ - L-)^2) - noise^2)``; where rounding is all there is, no point.

    Args:
        run: Whose differences.
        noise: Standard deviation of the rounding, as the first step measured it.
    """
    xs: list[float] = []
    ys: list[float] = []
    for stretch in stretches(run.steps) if noise is not None else ():
        found = [d for step in stretch for d in step.differences if math.isfinite(d)]
        squared = sum(d * d for d in found) / len(found) if found else 0.0
        assert noise is not None
        if squared > noise * noise:
            xs.append((stretch[0].step + stretch[-1].step) / 2)
            ys.append(noise / math.sqrt(squared - noise * noise))
    return xs, ys
