"""The order of examples as a pure function of (seed, step): to resume is to ask for the next step.

The stream is the concatenation of one permutation an epoch. A permutation is the argsort of raw
Philox words, not NumPy's `permutation`, whose algorithm may change between releases: NumPy promises
raw words and SeedSequence for good, so that a journal replays in the same order years later.
"""

from functools import lru_cache

import numpy as np

from zo_offload.tasks.wording import refuse


@lru_cache(maxsize=2)  # the epoch under way, and the next at the seam
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits its examples.

    >>> sorted(epoch_order(seed=0, epoch=3, count=5).tolist())
    [0, 1, 2, 3, 4]

    Args:
        seed: Not negative, of any size.
        epoch: Counted from 0; each has its own order.
        count: The number of examples, at least 1.

    Returns:
        A read-only permutation of range(count), int64 [count].
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def batch_at(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """The examples of step `step`, known without the steps before it.

    A batch may reach over the end of an epoch, so that every batch is full and every example is
    seen equally often.

    >>> first, second = batch_at(0, 0, batch_size=3, count=6), batch_at(0, 1, batch_size=3, count=6)
    >>> sorted(first + second)
    [0, 1, 2, 3, 4, 5]
    """
    if min(step, batch_size - 1, count - 1) < 0:
        sizes = f"batch size {batch_size}, {count} examples"
        refuse(f"step {step}", sizes, "expected a step from 0 on, a batch and a data set from 1 on")
    start = step * batch_size
    places = (divmod(position, count) for position in range(start, start + batch_size))
    return [int(epoch_order(seed, epoch, count)[place]) for epoch, place in places]
