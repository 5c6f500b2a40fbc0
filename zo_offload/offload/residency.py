"""Which units rest where: the fastest memory holds as many as its budget has room for.

Every step visits every unit once, in a cycle, so that a fixed set beats any policy that replaces
what it holds. The set is spread evenly over the model: while a unit that is at hand computes, the
next one that is not arrives.
"""

from collections.abc import Callable, Sequence

DEVICE, HOST, NVME = "device", "host", "nvme"


def spread(candidates: Sequence[int], num_chosen: int) -> set[int]:
    """So many of the candidates, evenly apart.

    Example:
        >>> sorted(spread(range(6), 2)), sorted(spread(range(4), 4))
        ([2, 5], [0, 1, 2, 3])
    """
    count = len(candidates)
    return {
        candidate
        for i, candidate in enumerate(candidates)
        if (i + 1) * num_chosen // count > i * num_chosen // count
    }


def most_that_fit(candidates: Sequence[int], fits: Callable[[set[int]], bool]) -> set[int]:
    """The largest evenly spread set that fits; the empty one need not.

    Example:
        >>> most_that_fit(range(6), lambda chosen: len(chosen) <= 3)
        {1, 3, 5}
    """
    low, high = 0, len(candidates)
    if high and fits(spread(candidates, high)):
        return set(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(spread(candidates, middle)):
            low = middle
        else:
            high = middle
    return spread(candidates, low) if low else set()
