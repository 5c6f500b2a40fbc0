"""The order of examples as a pure function of (seed, step): to resume is to ask for the next step.

The stream is the concatenation of one permutation an epoch. A permutation is the argsort of raw
Philox words, not NumPy's `permutation`, whose algorithm may change between releases: NumPy promises
raw words and SeedSequence for good, so that a journal replays in the same order years later.
"""

from collections.abc import Sequence
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


def stratified_order(seed: int, epoch: int, classes: Sequence[int]) -> np.ndarray:
    """`epoch_order`, with every class dealt out evenly over the epoch.

    What a batch says of a direction differs mostly by how many examples it has of each class;
    proportionate sampling takes that away and leaves the mean as it is (Cochran 1977, chapter 5).
    The j-th of a class's n comes at (j + 1/2) / n of the epoch, so that a batch of B has of it
    B n / N, give or take 1 and its share of the number of classes.

    >>> classes = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> sorted(classes[i] for i in stratified_order(0, 0, classes)[:4])
    [0, 0, 1, 1]

    Args:
        seed: As for `epoch_order`.
        epoch: As for `epoch_order`.
        classes: Of each example.

    Returns:
        A permutation, int64 [N].
    """
    order = epoch_order(seed, epoch, len(classes))
    found = np.asarray(classes)[order]
    places = np.empty(len(order))
    for each in np.unique(found):
        mine = np.flatnonzero(found == each)
        places[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return order[np.argsort(places, kind="stable")]


def batch_at(
    seed: int, step: int, batch_size: int, count: int, classes: Sequence[int] | None = None
) -> list[int]:
    """The examples of step `step`, known without the steps before it.

    A batch may reach over the end of an epoch, so that every batch is full and every example is
    seen equally often.

    >>> first, second = batch_at(0, 0, batch_size=3, count=6), batch_at(0, 1, batch_size=3, count=6)
    >>> sorted(first + second)
    [0, 1, 2, 3, 4, 5]

    Args:
        seed: Of the order.
        step: From 0 on.
        batch_size: Examples of a step.
        count: Of all examples.
        classes: Of each example; the order is stratified by them.
    """
    if min(step, batch_size - 1, count - 1) < 0:
        sizes = f"batch size {batch_size}, {count} examples"
        refuse(f"step {step}", sizes, "expected a step from 0 on, a batch and a data set from 1 on")
    start = step * batch_size
    epochs = range(start // count, (start + batch_size - 1) // count + 1)
    orders = [
        epoch_order(seed, epoch, count)
        if classes is None
        else _stratified(seed, epoch, tuple(classes))
        for epoch in epochs
    ]
    first = start - epochs[0] * count
    return np.concatenate(orders)[first : first + batch_size].tolist()


@lru_cache(maxsize=2)
def _stratified(seed: int, epoch: int, classes: tuple[int, ...]) -> np.ndarray:
    return stratified_order(seed, epoch, classes)
