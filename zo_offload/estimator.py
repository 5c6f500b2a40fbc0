"""From lane losses to projected gradients: pure functions on floats.

Losses stand in (probe, sign) order. Of them an estimator makes one number a probe, the estimate of
``<gradient, z_k>``; :data:`SIGNS` says which lanes it needs. Before that, ``fitness`` may shape the
losses of a step into numbers without a unit, and after it :func:`clipped` may bound the result.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from zo_offload.in_order import total

SIGNS: dict[str, tuple[int, ...]] = {"spsa": (+1, -1), "one_sided": (+1,)}
"""Of the lanes of a direction, in their order."""

LEAST_PROBES = {"spsa": 1, "one_sided": 2}  # one-sided losses are compared with each other


def projected_grads(
    losses: Sequence[float], eps: float, estimator: str = "spsa", fitness: str = "raw"
) -> list[float]:
    """Projected gradients of a step, by the names in the config.

    Args:
        losses: One a lane, in (probe, sign) order. A probe with a loss that is not finite takes no
            part: it gets 0, and the others are estimated without it.
        eps: Distance along z.
        estimator: ``spsa`` or ``one_sided``.
        fitness: ``raw``, ``standardized`` or ``ranks``. What is shaped has no unit, and is not
            divided by eps: steps are then as long as ``lr`` says, whatever the losses' scale.

    Example:
        >>> projected_grads([1.5, 1.0, float("inf"), 1.0], eps=0.25)
        [1.0, 0.0]
        >>> projected_grads([3.0, 1.0, 2.0], eps=0.25, estimator="one_sided", fitness="ranks")
        [0.75, -0.75, 0.0]
    """
    num_signs, probes = len(SIGNS[estimator]), usable(losses, estimator)
    found = [0.0] * (len(losses) // num_signs)
    if len(probes) < LEAST_PROBES[estimator]:
        return found
    rows = [losses[num_signs * probe : num_signs * (probe + 1)] for probe in probes]
    shaped = FITNESS[fitness]([loss for row in rows for loss in row])
    width = eps if fitness == "raw" else 1.0
    if estimator == "spsa":
        estimates = spsa(shaped[0::2], shaped[1::2], width)
    else:
        estimates = one_sided(shaped, width)
    for probe, estimate in zip(probes, estimates, strict=True):
        found[probe] = estimate
    return found


def usable(losses: Sequence[float], estimator: str = "spsa") -> list[int]:
    """The probes all of whose losses are finite.

    Example:
        >>> usable([1.5, 1.0, float("nan"), 1.0])
        [0]
    """
    num_signs = len(SIGNS[estimator])
    starts = range(0, len(losses), num_signs)
    rows = [losses[start : start + num_signs] for start in starts]
    return [probe for probe, row in enumerate(rows) if all(map(math.isfinite, row))]


def mean_loss(losses: Sequence[float]) -> float:
    """Of the losses that are finite; NaN where none is.

    Example:
        >>> mean_loss([1.5, float("inf"), 0.5])
        1.0
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    return total(finite) / len(finite) if finite else math.nan


def spsa(plus: Sequence[float], minus: Sequence[float], eps: float) -> list[float]:
    r"""Two-sided simultaneous perturbation: ``g_k = (L(W + eps z_k) - L(W - eps z_k)) / (2 eps)``.

    Args:
        plus: Loss of each probe at ``+eps``.
        minus: Loss of each probe at ``-eps``.
        eps: Distance along z, the same for both signs.

    Returns:
        One projected gradient a probe; each estimates ``<gradient, z_k>`` with bias O(eps^2).

    Example:
        >>> spsa([1.5], [1.0], eps=0.25)
        [1.0]

    Reference:
        Spall (1992), "Multivariate stochastic approximation using a simultaneous perturbation
        gradient approximation", eq. 2.2; Malladi et al. (2023), arXiv 2305.17333, definition 1.
    """
    return [(a - b) / (2.0 * eps) for a, b in zip(plus, minus, strict=True)]


def one_sided(losses: Sequence[float], eps: float) -> list[float]:
    """One loss a probe, against the mean of the others: ``g_k = (L_k - mean_{j != k} L_j) / eps``.

    That is ``K / (K - 1) (L_k - mean L) / eps``. The mean of the other losses takes the place of
    the loss at W: it needs no forward of its own, and the part of second order that all directions
    share (``eps^2 / 2 z^T H z``, nearly alike for all z in many dimensions) falls out with it. It
    does not depend on z_k, so the estimate stays free of bias but for O(eps^2) terms.

    Args:
        losses: Loss of each probe at ``+eps``; at least two.
        eps: Distance along z.

    Returns:
        One projected gradient a probe. The variance of the step that they make is, for K probes, K
        / (K - 1) times that of as many two-sided ones, at half as many forwards.

    Example:
        >>> one_sided([1.5, 1.0], eps=0.25)
        [2.0, -2.0]

    Reference:
        Dang et al. (2025), "FZOO: Fast zeroth-order optimizer for fine-tuning large language models
        towards Adam-scale speed", arXiv 2506.09034. Deviation: there the loss at W is subtracted.
    """
    num_probes = len(losses)
    mean = total(losses) / num_probes
    return [num_probes / (num_probes - 1) * (loss - mean) / eps for loss in losses]


def slopes(differences: Sequence[float], eps: float, estimator: str) -> list[float]:
    """Projected gradients of what is linear in a lane's output, from differences between lanes.

    Args:
        differences: One a probe: ``+eps`` less ``-eps``, or, one-sided, less any lane of the step.
        eps: Distance along z.
        estimator: ``spsa`` or ``one_sided``.

    Returns:
        One a probe; what is not finite makes its probe's so, and one-sided, every probe's.

    Example:
        >>> slopes([0.5], eps=0.25, estimator="spsa")
        [1.0]
    """
    if estimator == "spsa":
        return spsa(differences, [0.0] * len(differences), eps)
    return one_sided(differences, eps)


def standardized(losses: Sequence[float]) -> list[float]:
    """Losses less their mean, over their standard deviation (sample, n - 1); 0 where all are alike.

    A step is then short where directions change the loss much, and long where they hardly do.

    Example:
        >>> standardized([3.0, 1.0])
        [0.7071067811865475, -0.7071067811865475]

    Reference:
        Dang et al. (2025), arXiv 2506.09034: the step is divided by this deviation.
    """
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    mean = total(losses) / len(losses)
    return [(loss - mean) / spread if spread else 0.0 for loss in losses]


def ranks(losses: Sequence[float]) -> list[float]:
    """Places among the losses instead of the losses, evenly from -1/2 (least) to 1/2.

    Only the order counts: an outlier weighs no more than a neighbour. Equal losses share the mean
    of their places, so that a reward which cannot tell two lanes apart does not either.

    Example:
        >>> ranks([7.0, 0.1, 99.0]), ranks([1.0, 1.0])
        ([0.0, -0.5, 0.5], [0.0, 0.0])

    Reference:
        Salimans et al. (2017), "Evolution strategies as a scalable alternative to reinforcement
        learning", arXiv 1703.03864; Wierstra et al. (2014), "Natural evolution
        strategies", JMLR 15 (fitness shaping).
    """
    if len(losses) < 2:
        return [0.0] * len(losses)
    ordered = sorted(losses)
    first = {loss: place for place, loss in reversed(list(enumerate(ordered)))}
    last = {loss: place for place, loss in enumerate(ordered)}
    return [(first[loss] + last[loss]) / 2 / (len(losses) - 1) - 0.5 for loss in losses]


def clipped(projected_grads: Sequence[float], limit: float) -> list[float]:
    """Each held to ``[-limit, limit]``: one bad batch moves the weights no farther than that.

    Args:
        projected_grads: One a probe, finite.
        limit: Of the magnitude; infinite where nothing is clipped.

    Example:
        >>> clipped([250.0, -3.0, -101.0], limit=100.0)
        [100.0, -3.0, -100.0]

    Reference:
        Shang et al. (2025), "Fine-tuning quantized neural networks with zeroth-order optimization",
        arXiv 2505.13430, "directional derivative clipping".
    """
    return [max(-limit, min(g, limit)) for g in projected_grads]


FITNESS: dict[str, Callable[[Sequence[float]], Sequence[float]]] = {
    "raw": lambda losses: losses,
    "standardized": standardized,
    "ranks": ranks,
}
"""Shapes the losses of a step before they are compared."""
