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
