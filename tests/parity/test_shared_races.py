"""Ranks of a machine that are not at one point: one is ahead, leaves, or dies over a unit."""

import threading
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from replica.world import Run, on_ranks
from torch import nn
from trainable.modes import model

from parity.test_shared import BATCHES, DISK, LR, State, on_two, stepper_on, train
from zo_offload import snapshot as snapshot_module
from zo_offload.errors import ReplicaError, StoreError
from zo_offload.offload.desk import Guest
from zo_offload.offload.shared import SharedCarried
from zo_offload.offload.streamer import Sent
from zo_offload.replica import Replica
from zo_offload.snapshot import read_snapshot, write_snapshot
from zo_offload.step import Stepper
from zo_offload.units import Unit

__all__ = ["on_ranks"]

SECONDS = 60


def take(stepper: Stepper, steps: int) -> None:
    """Steps without a look between, so that masters stay where the last visit had them."""
    division = stepper.division
    for _ in range(steps):
        mine = BATCHES[division.data_rank :: division.num_data_ranks]
        stepper.train_step(mine, LR)


def end_threads(stepper: Stepper) -> None:
    """Of a rank that is not closed, because it or another one is dead."""
    stepper.lanes.close()
    assert stepper.weights.pipeline is not None
    stepper.weights.pipeline.close()


def refusal(work: Callable[[], Any]) -> str:
    """Without ``pytest.raises``: its failure is no Exception, and the other rank would wait."""
    try:
        work()
    except ReplicaError as error:
        return str(error)
    return "nothing was refused"


def move_a_piece(stepper: Stepper, unit: Unit, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank has done of :meth:`SharedCarried.bring` when it is between two pieces."""
    carried = stepper.weights._carried
    assert isinstance(carried, SharedCarried)
    with monkeypatch.context() as patch:
        patch.setattr(carried, "_mine_first", lambda: iter([piece]))
        stepper.weights.settle(unit)
    assert not carried.is_even(unit)


@pytest.mark.parametrize("by", ["brought", "as_it_rests"])
def test_a_worker_fetches_while_a_rank_that_is_a_step_ahead_moves_the_unit(
    on_ranks: Run, monkeypatch: pytest.MonkeyPatch, by: str
):
    """Masters lag; of the one rank the last step is recorded already, of the other not yet."""

    def work(replica: Replica, given: nn.Module) -> None:
        with closing(stepper_on(replica, given, "full", update={"lag": 1})) as stepper:
            weights = stepper.weights
            assert weights.pipeline is not None
            weights.pipeline._prefetch = lambda ahead: None
            take(stepper, 4)
            unit, whole = weights.map.units[1], weights.history
            assert weights.carried(unit) == 2
            replica.wait_for_all()
            if replica.rank == 1:
                move_a_piece(stepper, unit, 1, monkeypatch)
            replica.wait_for_all()
            if replica.rank == 0:
                weights.history = whole[:3]
                early = fetched(getattr(weights, by)(unit, 3))
                weights.history = whole
                late = fetched(getattr(weights, by)(unit, 3))
                assert torch.equal(early, late)
            replica.wait_for_all()

    on_two(on_ranks, work)


def fetched(sent: Sent) -> torch.Tensor:
    assert sent.carries == 3
    wire = torch.cat([part.clone() for _, part in sent.pieces])
    sent.release(None)
    return wire


def test_a_unit_that_a_rank_died_over_while_its_device_wrote_it_is_refused(on_ranks: Run):
    def work(replica: Replica, given: nn.Module) -> Any:
        stepper = stepper_on(replica, given, "full", update={"where": "device"})
        train(stepper, 1)
        stepper.weights.forget_fetched()
        unit = stepper.weights.map.units[0]
        replica.wait_for_all()
        shared = stepper.weights.at.shared
        assert shared is not None
        if replica.rank == 1:
            stepper.weights.taken_back(unit, 1)
            shared.region.close()  # as the kernel does
        replica.wait_for_all()
        if replica.rank == 0:
            assert "died while it changed" in refusal(lambda: stepper.weights.held(unit))
        replica.wait_for_all()
        end_threads(stepper)

    on_two(on_ranks, work)


def test_a_disk_s_unit_that_a_rank_changed_and_died_with_is_refused(
    on_ranks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it had changed is on no disk, though the steps are counted."""
    monkeypatch.chdir(tmp_path)

    def work(replica: Replica, given: nn.Module) -> Any:
        stepper = stepper_on(replica, given, "full", offload_param=DISK)
        take(stepper, 2)
        weights = stepper.weights
        weights.forget_fetched()
        unit = weights.map.units[0]
        replica.wait_for_all()
        if replica.rank == 1:
            lease = weights._stores[unit.index].lend(unit)
            weights._settle(unit, lease)
            assert isinstance(weights.at.staged, Guest)
            weights.at.staged.close()
            assert weights.at.shared is not None
            weights.at.shared.region.close()
        replica.wait_for_all()
        if replica.rank == 0:
            for counter in threading.enumerate():
                if counter.name.startswith("zo-counter"):
                    counter.join(SECONDS)  # it sees that its rank has left
            for each in weights.map.units:
                text = refusal(partial(weights.held, each))
                assert "left with a unit" in text
        replica.wait_for_all()
        end_threads(stepper)
        if replica.rank == 0:
            with suppress(ReplicaError):  # what it refuses to write
                weights.at.close()

    on_two(on_ranks, work)


def test_a_snapshot_says_what_its_masters_carry_while_another_rank_leaves(
    on_ranks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whoever leaves brings masters that lag to the last step."""
    with closing(stepper_on(Replica(), model(), "full", update={"lag": 3})) as stepper:
        take(stepper, 5)
        (tmp_path / "alone").mkdir()
        write_snapshot(tmp_path / "alone", stepper.weights, 5, "")
    expected = read_snapshot(tmp_path / "alone").units
    written, left, save_file = Event(), Event(), snapshot_module.save_file
    saved = count(1)

    def save(tensors: State, *more: Any) -> None:
        save_file(tensors, *more)
        if next(saved) == 2:
            written.set()
            assert left.wait(SECONDS)

    def work(replica: Replica, given: nn.Module) -> None:
        stepper = stepper_on(replica, given, "full", update={"lag": 3})
        take(stepper, 5)
        replica.wait_for_all()
        if replica.rank == 0:
            (tmp_path / "shared").mkdir()
            monkeypatch.setattr(snapshot_module, "save_file", save)
            write_snapshot(tmp_path / "shared", stepper.weights, 5, "")
        else:
            assert written.wait(SECONDS)
        stepper.close()
        left.set()

    on_two(on_ranks, work)
    assert read_snapshot(tmp_path / "shared").units[:2] == expected[:2]


def test_why_no_disk_can_be_used_is_said_by_every_rank(on_ranks: Run, tmp_path: Path):
    disk = {"device": "nvme", "nvme_path": str(tmp_path / "file")}
    (tmp_path / "file").touch()
    given = [model(), model()]
    for error in on_ranks(2, lambda on: stepper_on(on, given[on.rank], "full", offload_param=disk)):
        assert isinstance(error, StoreError)
        assert "expected a directory, found a file" in str(error)
