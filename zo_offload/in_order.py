"""Adding floats so that every Python comes to the same bits."""

from collections.abc import Iterable


def total(values: Iterable[float]) -> float:
    """Left to right, each sum rounded: built-in ``sum`` compensates from Python 3.12 on.

    Example:
        >>> total([1.0, 1e100, 1.0, -1e100])
        0.0
    """
    found = 0.0
    for value in values:
        found += value
    return found
