"""The order of examples is a pure function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.errors import TaskError
from zo_offload.tasks import batch_at, epoch_order, stratified_order

SEEDS = st.integers(0, 2**64 - 1)


@given(SEEDS, st.integers(0, 10**6), st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed, epoch, count):
    assert sorted(epoch_order(seed, epoch, count)) == list(range(count))


@given(SEEDS, st.integers(0, 50), st.integers(1, 20), st.integers(1, 30))
def test_batches_cut_the_concatenated_epochs(seed, step, batch_size, count):
    num_epochs = (step + 1) * batch_size // count + 1
    stream = np.concatenate([epoch_order(seed, epoch, count) for epoch in range(num_epochs)])
    expected = stream[step * batch_size : (step + 1) * batch_size]
    assert batch_at(seed, step, batch_size, count) == expected.tolist()


def test_the_order_is_known_forever():
    """A change of these numbers would break the resumption of every run under way."""
    assert epoch_order(0, 0, 8).tolist() == [1, 4, 5, 6, 2, 0, 3, 7]
    assert batch_at(2**63 + 1, 1_000_000, 4, 1_000) == [486, 723, 641, 535]


@given(SEEDS, st.integers(0, 9), st.lists(st.integers(0, 4), min_size=1, max_size=120), st.data())
def test_every_batch_of_an_epoch_has_each_class_in_proportion(seed, epoch, classes, data):
    order = stratified_order(seed, epoch, classes)
    assert sorted(order) == list(range(len(classes)))
    size = data.draw(st.integers(1, len(classes)))
    start = data.draw(st.integers(0, len(classes) - size))
    batch = [classes[index] for index in order[start : start + size]]
    for each in set(classes):
        share = classes.count(each) / len(classes)
        assert abs(batch.count(each) - size * share) <= 1 + share * len(set(classes)) + 1e-9


def test_equal_classes_are_halves_of_every_batch():
    classes = [0, 1] * 40
    batches = [batch_at(3, step, 16, 80, classes) for step in range(10)]
    assert all(sum(classes[index] for index in batch) == 8 for batch in batches)
    assert sorted(index for batch in batches for index in batch) == sorted([*range(80)] * 2)


def test_a_stratified_order_is_known_forever():
    assert stratified_order(0, 0, [0, 0, 0, 1, 1, 2, 2, 2]).tolist() == [1, 5, 4, 6, 2, 3, 0, 7]
    thirds = [index % 3 for index in range(1_000)]
    assert batch_at(2**63 + 1, 1_000_000, 4, 1_000, thirds) == [486, 641, 535, 723]


def test_seeds_and_epochs_differ():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_no_global_generator_is_touched():
    epoch_order.cache_clear()
    np.random.seed(0)  # noqa: NPY002, the generator that must not move
    expected = np.random.random_sample(4)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    epoch_order(0, 0, 100)
    assert (np.random.random_sample(4) == expected).all()  # noqa: NPY002


def test_the_order_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 4)[0] = 1


@pytest.mark.parametrize(("step", "batch_size", "count"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_no_such_batch(step, batch_size, count):
    with pytest.raises(TaskError, match=f"step {step}: batch size {batch_size}, {count} examples"):
        batch_at(0, step, batch_size, count)
