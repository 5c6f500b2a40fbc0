"""Micro-batches dealt to ranks: nothing lost, nothing twice, and a place to continue from."""

import pytest
import torch
from torch.utils.data import IterableDataset

from zo_offload.errors import ConfigError
from zo_offload.loader import Loader, Share


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


def flat(batches: list[torch.Tensor]) -> list[int]:
    return [x for batch in batches for x in batch.tolist()]


def by_step(world_size: int, gas: int, passes: int, dataset: object = None) -> list[list[int]]:
    """Micro-batches of each step in global order, as the ranks together see them."""
    loaders = [
        Loader(range(21) if dataset is None else dataset, Share(2, gas, rank, world_size, seed=3))
        for rank in range(world_size)
    ]
    seen = [[batch.tolist() for _ in range(passes) for batch in loader] for loader in loaders]
    rounds = [batch for together in zip(*seen, strict=True) for batch in together]
    assert {loader.consumed for loader in loaders} == {2 * len(rounds)}
    return rounds


def test_the_number_of_ranks_changes_no_step():
    alone = by_step(1, 4, passes=5)
    assert by_step(2, 2, passes=5) == alone
    assert by_step(4, 1, passes=5) == alone


def test_an_epoch_sees_every_example_once():
    seen = [x for batch in by_step(2, 2, passes=6) for x in batch]
    for epoch in range(len(seen) // 21):
        assert sorted(seen[21 * epoch : 21 * (epoch + 1)]) == list(range(21))
    assert seen[:21] != seen[21:42]


def test_a_pass_is_whole_steps():
    loader = Loader(range(21), Share(2, 2, world_size=2))
    assert len(loader) == len(list(loader)) == 2 * 2
    assert len(Loader(range(3), Share(2, 2, world_size=2))) == 2  # examples come again


@pytest.mark.parametrize("stop", [0, 1, 5, 9, 14])
@pytest.mark.parametrize("dataset", [range(21), Stream(21)], ids=["indexed", "iterable"])
def test_a_run_continues_where_it_stands(dataset: object, stop: int):
    share = Share(2, 1, 0, 1, seed=3)
    whole = Loader(dataset, share)
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    again = Loader(dataset, share)
    again.consumed = 2 * stop
    found: list[list[int]] = []
    while len(found) < len(expected) - stop:
        found += [batch.tolist() for batch in again]
    assert found[: len(expected) - stop] == expected[stop:]


def test_an_iterable_is_dealt_in_whole_steps():
    alone = by_step(1, 4, passes=2, dataset=Stream(21))
    assert alone == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]] * 2
    assert by_step(4, 1, passes=2, dataset=Stream(21)) == alone


def test_what_cannot_fill_a_step_is_refused():
    with pytest.raises(ConfigError, match="the data set is empty"):
        Loader([], Share(2))
    with pytest.raises(ConfigError, match="fewer than the 16 examples of one step"):
        list(Loader(Stream(15), Share(4, 4)))


def test_batches_are_collated_as_asked():
    loader = Loader([{"x": i} for i in range(4)], Share(2), collate=lambda rows: len(rows))
    assert list(loader) == [2, 2]
