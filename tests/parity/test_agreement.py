"""A flipped bit in one rank's weights is found within a rotation, named, and put right."""

import logging
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch
from replica.world import Run, on_ranks
from torch import nn
from trainable.modes import config_of, differing, masters, model

from parity.test_shared import State, on_two, train
from zo_offload.agreement import Beginning
from zo_offload.errors import ReplicaError
from zo_offload.parts import part_of
from zo_offload.replica import Replica
from zo_offload.resting import fill_unit
from zo_offload.step import Stepper
from zo_offload.units import Unit

__all__ = ["on_ranks"]

ROTATION = 3  # of a model of two blocks and what lies outside
MASTERS = ["fp32", "bf16+8"]


def stepper_on(on: Replica, given: nn.Module, name: str = "full", **more: Any) -> Stepper:
    """Whose weights are each rank's own: they rest where forwards run."""
    block = {"check_interval": ROTATION, **more.pop("replica", {})}
    config = config_of(name, replica=block, **more)
    return Stepper(given, config, dtype=torch.bfloat16, replica=on)


def alone(steps: int, name: str = "full", **more: Any) -> State:
    with closing(stepper_on(Replica(), model(), name, **more)) as stepper:
        train(stepper, steps)
        return masters(stepper)


def flip(stepper: Stepper, index: int, bit: int = 3, in_rest: bool = False) -> Unit:
    """Change one bit of a unit's weights, as failing memory would."""
    unit = stepper.weights.map.everything[index]
    lease = stepper.weights._stores[unit.index].lend(unit)
    (lease.rest if in_rest else lease.wire)[5] ^= 1 << bit
    return unit


@pytest.mark.sampled(3)
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_of_four_copies_the_odd_one_is_put_right(
    on_ranks: Run, index: int, master: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)

    def work(replica: Replica, given: nn.Module) -> tuple[State, list]:
        with closing(stepper_on(replica, given, master=master)) as stepper:
            train(stepper, ROTATION + 1)
            if replica.rank == 2:
                flip(stepper, index, in_rest=index == 1)
            train(stepper, 2 * ROTATION - 1)
            after = masters(stepper)
            coefficients = stepper.journal.records.coefficients(0, stepper.step)
            replica.wait_for_all()
        return after, coefficients

    found = on_two(on_ranks, work, 4)
    first = found[0]
    for after, coefficients in found:
        assert differing(after, first[0]) == []
        assert coefficients == first[1]
    name = ["(what is in no unit)", "model.layers.0", "model.layers.1"][index]
    assert f"unit {name} of rank 2 differs from the other ranks' since step " in caplog.text
    assert "it has been put right" in caplog.text


BASE = dict(model().named_parameters())  # here: threads would share a generator


def of_base(unit: Unit) -> Any:
    values = {s.name: part_of(BASE[s.name].detach(), s) for _, s in unit.segments}
    beginnings: list[Beginning] = [(partial(fill_unit, unit, values), 0)]
    return iter(beginnings)


@pytest.mark.parametrize("knows", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("victim", [0, 1])
def test_of_two_copies_the_one_that_a_replay_ends_in_is_right(
    on_ranks: Run, victim: int, knows: tuple[int, ...]
):
    """Whichever rank can replay, be it the wrong one."""
    fresh = [model(), model()]

    def work(replica: Replica, given: nn.Module) -> tuple[State, State]:
        with closing(stepper_on(replica, given)) as stepper:
            if replica.rank in knows:
                stepper.agreement.beginnings = of_base
            train(stepper, ROTATION)
            if replica.rank == victim:
                flip(stepper, 2)
            train(stepper, ROTATION)
            after, journal = masters(stepper), stepper.journal
            replica.wait_for_all()
        with closing(stepper_on(Replica(), fresh[replica.rank])) as again:
            again.follow(journal)
            return after, masters(again)

    for after, replayed in on_two(on_ranks, work):
        assert differing(after, replayed) == []


def test_of_two_copies_without_a_base_neither_is_called_right(on_ranks: Run):
    def work(replica: Replica, given: nn.Module) -> None:
        with closing(stepper_on(replica, given)) as stepper:
            train(stepper, 1)
            if replica.rank:
                flip(stepper, 1)
            words = "unit model.layers.0: ranks 0, 1 differ since step . at the latest, and nothing"
            with pytest.raises(ReplicaError, match=words):
                train(stepper, 2 * ROTATION)
            assert stepper.step <= 2 * ROTATION  # what was taken is in the journal

    on_two(on_ranks, work)


def test_it_stops_where_that_is_asked_for(on_ranks: Run):
    def work(replica: Replica, given: nn.Module) -> None:
        asked = {"on_mismatch": "stop"}
        with closing(stepper_on(replica, given, replica=asked)) as stepper:
            if replica.rank == 1:
                flip(stepper, 2)
            words = r'unit model.layers.1 of rank 1 differs from .* "on_mismatch" is "stop"'
            with pytest.raises(ReplicaError, match=words):
                train(stepper, ROTATION)

    on_two(on_ranks, work, 4)


@pytest.mark.parametrize("name", ["sparse-beside-vectors", "scales", "low-rank", "rotate"])
def test_whatever_moves_and_wherever_it_rests(on_ranks: Run, name: str):
    """Nobody is called wrong; frozen weights that change are found, too."""
    expected = alone(2 * ROTATION, name)
    for more in ({}, {"offload_param": {"device": "cpu"}}):

        def work(replica: Replica, given: nn.Module, more: dict = more) -> State:
            asked = {"on_mismatch": "stop"}
            with closing(stepper_on(replica, given, name, replica=asked, **more)) as stepper:
                train(stepper, 2 * ROTATION)
                found = masters(stepper)
                replica.wait_for_all()
                if not more and name == "scales":
                    if replica.rank == 0:
                        flip(stepper, 1)
                    with pytest.raises(ReplicaError, match=r"model.layers.0 of rank 0"):
                        train(stepper, ROTATION)
                return found

        for found in on_two(on_ranks, work, 4):
            assert differing(found, expected) == []


def test_none_are_compared_where_that_is_asked_for(on_ranks: Run):
    def work(replica: Replica, given: nn.Module) -> int:
        with closing(stepper_on(replica, given, replica={"check_interval": 0})) as stepper:
            if replica.rank:
                flip(stepper, 1)
            train(stepper, 2 * ROTATION)
            return stepper.step

    assert on_two(on_ranks, work) == [2 * ROTATION] * 2


def test_a_learning_rate_of_a_rank_s_own_is_named_although_they_share_the_weights(on_ranks: Run):
    def work(replica: Replica, given: nn.Module) -> str:
        config = config_of("full", replica={"check_interval": 4}, offload_param={"device": "cpu"})
        with closing(Stepper(given, config, dtype=torch.bfloat16, replica=replica)) as stepper:
            train(stepper, 2)
            with pytest.raises(ReplicaError) as caught:
                train(stepper, 4, lr=1e-2 * (1 + replica.rank))
            replica.wait_for_all()
        return str(caught.value)

    (message,) = set(on_two(on_ranks, work))
    assert message.startswith("step 2: rank 1 has lr 0.02, rank 0 has 0.01; set it alike")
