"""From lane losses to projected gradients: pure functions on floats."""

from collections.abc import Sequence

SIGNS = (+1, -1)  # of the lanes of a direction, in their order


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
