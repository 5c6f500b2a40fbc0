"""Ranks of a machine share masters: the bits of one rank, one copy, and each step taken once."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from engine.test_converted import saved, written
from models.table import ROWS
from replica.world import Run, on_ranks
from torch import nn
from trainable.modes import MODEL, config_of, differing, masters, model

from zo_offload import masters as masters_module
from zo_offload import ops
from zo_offload.errors import ReplicaError
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.journal import Journal
from zo_offload.offload.residency import HOST
from zo_offload.offload.shared import GRAIN, pieces_of
from zo_offload.replica import Replica
from zo_offload.resume import begin_with, rewind
from zo_offload.snapshot import write_snapshot
from zo_offload.step import Stepper

__all__ = ["on_ranks"]

STEPS, LR = 5, 1e-2
BATCHES = [ROWS[MODEL].batch(length) for length in (6, 4, 5, 6)]
CPU = {"device": "cpu"}
DISK = {"device": "nvme", "nvme_path": "units"}
State = dict[str, torch.Tensor]
DIVISIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lag": {"update": {"lag": 2}},
    "on the device": {"update": {"where": "device"}},
    "on the device, lag": {"update": {"where": "device", "lag": 3}},
    "momentum, lag": {"update": {"type": "momentum", "momentum": 0.5, "window": 3, "lag": 2}},
    "adam, disk": {"update": {"type": "adam", "window": 4}, "offload_param": DISK},
    "three bytes": {"master": "bf16+8"},
    "packed on the way": {"wire": "nf4", "update": {"lag": 1}},
    "gaussian": {"direction": "gaussian", "direction_scale": "rms"},
    "sublayers": {"unit": "sublayer"},
    "signs apart": {"replica": {"probe_parallel": 2}},
    "probes apart": {"probes": 4, "replica": {"probe_parallel": 4}},
    "disk": {"offload_param": DISK},
    "disk, lag": {"offload_param": DISK, "update": {"lag": 2}},
    "disk, packed": {"offload_param": DISK, "wire": "fp8_e4m3", "unit": "sublayer"},
    "both": {"offload_param": DISK, "host_budget": 160_000, "unit": "sublayer"},
}


def stepper_on(on: Replica, given: nn.Module, name: str, **more: Any) -> Stepper:
    config = config_of(name, **{"offload_param": CPU, **more})
    return Stepper(given, config, dtype=torch.bfloat16, replica=on)


def train(stepper: Stepper, steps: int = STEPS, lr: float = LR) -> None:
    division = stepper.division
    for _ in range(steps):
        mine = BATCHES[division.data_rank :: division.num_data_ranks]
        stepper.train_step(mine, lr, weight_decay=1e-2)
        stepper.evaluate(BATCHES[0])


def alone(name: str, **more: Any) -> tuple[State, State]:
    """Masters at the end, and what the model then has."""
    given = model()
    with closing(stepper_on(Replica(), given, name, **more)) as stepper:
        train(stepper)
        found = masters(stepper)
    return found, left_in(given)


def left_in(given: nn.Module) -> State:
    """What a closed run leaves in the model: NaN, here zeros, where it is on a disk."""
    return {name: p.detach().nan_to_num(0.0) for name, p in given.named_parameters()}


def on_two(run: Run, work: Callable[[Replica, nn.Module], Any], ranks: int = 2) -> list[Any]:
    """Results of work on ranks that were given a model each."""
    given = [model() for _ in range(ranks)]
    found = run(ranks, lambda replica: work(replica, given[replica.rank]))
    failed = [each for each in found if isinstance(each, Exception)]
    for error in sorted(failed, key=lambda error: " lost rank " in str(error)):
        raise error  # the one because of which others were lost
    return found


@pytest.mark.sampled(11)
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_masters_end_in_the_bits_of_one(
    on_ranks: Run, division: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    more = dict(DIVISIONS[division])
    if "replica" in more:
        more["replica"] = {"probe_parallel": min(more["replica"]["probe_parallel"], ranks)}
    expected = alone("full", **{**more, "replica": {}})

    def work(replica: Replica, given: nn.Module) -> tuple[State, State]:
        stepper = stepper_on(replica, given, "full", **more)
        train(stepper)
        found = masters(stepper)
        replica.wait_for_all()
        stepper.close()
        return found, left_in(given)

    for found, left in on_two(on_ranks, work, ranks):
        assert differing(found, expected[0]) == []
        assert differing(left, expected[1]) == []


@pytest.mark.parametrize(
    "name", ["rotate", "sparse-beside-vectors", "scales", "low-rank", "low-rank-momentum"]
)
def test_whatever_moves(on_ranks: Run, name: str):
    expected, _ = alone(name)

    def work(replica: Replica, given: nn.Module) -> State:
        stepper = stepper_on(replica, given, name)
        train(stepper)
        found = masters(stepper)
        if replica.rank:
            stepper.close()  # the other one goes on to look
            replica.wait_for_all()
            return found
        replica.wait_for_all()
        assert differing(masters(stepper), found) == []
        stepper.close()
        return found

    for found in on_two(on_ranks, work):
        assert differing(found, expected) == []


@pytest.mark.parametrize("offload", [CPU, DISK], ids=["cpu", "nvme"])
def test_a_converted_base_is_opened_once_for_all(
    on_ranks: Run, offload: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What lies beside its files is compared, too."""
    monkeypatch.chdir(tmp_path)
    directory = written(tmp_path, saved(tmp_path, MODEL)).directory
    given = [load_causal_lm(directory) for _ in range(5)]
    with closing(stepper_on(Replica(), given[4], "full", offload_param=offload)) as stepper:
        train(stepper)
        expected = masters(stepper)

    def work(replica: Replica) -> State:
        mine = given[replica.rank]
        with closing(stepper_on(replica, mine, "full", offload_param=offload)) as stepper:
            train(stepper)
            found = masters(stepper)
            replica.wait_for_all()
        return found

    for found in on_ranks(2, work):
        assert differing(found, expected) == []
    with torch.no_grad():
        given[3].get_input_embeddings().weight[0] += 1.0
    for error in on_ranks(
        2, lambda on: stepper_on(on, given[2 + on.rank], "full", offload_param=offload)
    ):
        assert "the base weights of rank 1 differ from rank 0's" in str(error)


def test_there_is_one_copy_and_each_step_is_taken_once(
    on_ranks: Run, monkeypatch: pytest.MonkeyPatch
):
    taken: Counter[str] = Counter()
    lock, update = Lock(), ops.update

    def counted(span: Any, wire: Any, rest: Any, direction: str, steps: Any, *more: Any) -> None:
        with lock:
            for segment in span.segments:
                taken[segment.name] += segment.numel * len(steps)
        update(span, wire, rest, direction, steps, *more)

    monkeypatch.setattr(masters_module.ops, "update", counted)
    with closing(stepper_on(Replica(), model(), "full")) as stepper:
        train(stepper)
        expected, host_bytes = dict(taken), stepper.weights.host_bytes
    taken.clear()

    def work(replica: Replica, given: nn.Module) -> int:
        with closing(stepper_on(replica, given, "full")) as stepper:
            train(stepper)
            replica.wait_for_all()
            address = next(u for u in stepper.weights.map.units)
            memory = stepper.weights._stores[address.index].lend(address).wire
            if replica.rank == 0:
                memory[0] = 77  # seen by the other, below
            replica.wait_for_all()
            assert memory[0] == 77
            return stepper.weights.host_bytes

    found = on_two(on_ranks, work)
    padding = 128
    for name, count in expected.items():
        assert count <= taken[name] <= count + padding * STEPS * 2
    assert max(found) <= host_bytes + 64 * 1024  # whole pages
    assert found[0] == found[1]


def test_every_element_is_in_one_piece():
    with closing(stepper_on(Replica(), model(), "full")) as stepper:
        for unit in stepper.weights.map.units:
            for count in (1, 2, 3, 5):
                pieces = pieces_of(unit, count, lambda span: False)
                assert len(pieces) == count
                total = sum(piece.elements for part in pieces for _, piece in part)
                assert total == sum(span.elements for span in unit.spans)
                starts = [piece.segments[0].offset for part in pieces for _, piece in part]
                assert all(start % 128 == 0 for start in starts)
                assert unit.plain_bytes < GRAIN or any(len(part) for part in pieces)


def test_a_snapshot_and_another_base_are_taken_together(on_ranks: Run, tmp_path: Path):
    with closing(stepper_on(Replica(), model(), "full", update={"lag": 2})) as stepper:
        train(stepper, 3)
        write_snapshot(tmp_path, stepper.weights, 3, stepper.journal.records.lineage())
        early = masters(stepper)
        early_journal = Journal.of(stepper.journal.content, "early")
        train(stepper, 2)
        late = masters(stepper)

    def work(replica: Replica, given: nn.Module) -> list[State]:
        stepper = stepper_on(replica, given, "full", update={"lag": 2})
        with closing(stepper):
            train(stepper)
            rewind(stepper, early_journal, tmp_path)
            found = [masters(stepper)]
            train(stepper, 2)
            found.append(masters(stepper))
            replica.wait_for_all()
        return found

    for first, second in on_two(on_ranks, work):
        assert differing(first, early) == []
        assert differing(second, late) == []

    def begin(replica: Replica, given: nn.Module) -> State:
        with closing(stepper_on(replica, given, "full", update={"lag": 2})) as stepper:
            begin_with(stepper, early_journal, tmp_path)
            found = masters(stepper)
            replica.wait_for_all()
        return found

    for found in on_two(on_ranks, begin):
        assert differing(found, early) == []


def test_other_weights_are_named_before_they_are_shared(on_ranks: Run):
    given = [model(), model()]
    with torch.no_grad():
        next(given[1].parameters())[0] += 1.0
    before = [{k: p.detach().clone() for k, p in each.named_parameters()} for each in given]
    found = on_ranks(2, lambda replica: stepper_on(replica, given[replica.rank], "full"))
    for error in found:
        assert isinstance(error, ReplicaError)
        assert str(error).startswith("the base weights of rank 1 differ from rank 0's")
    after = [left_in(each) for each in given]
    assert [differing(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_settings_that_divide_otherwise_are_named(on_ranks: Run):
    given = [model(), model()]

    def work(replica: Replica) -> Any:
        unit = "sublayer" if replica.rank else "block"
        return stepper_on(replica, given[replica.rank], "full", unit=unit)

    for error in on_ranks(2, work):
        assert isinstance(error, ReplicaError)
        assert str(error).startswith("the units off the device of rank 1 differ from rank 0's")


def test_a_piece_that_a_rank_died_over_is_refused(on_ranks: Run):
    def work(replica: Replica, given: nn.Module) -> Any:
        stepper = stepper_on(replica, given, "full")
        train(stepper, 1)
        replica.wait_for_all()
        shared = stepper.weights.at.shared
        assert shared is not None
        unit = next(u for u in stepper.weights.map.units if stepper.weights.tiers[u.index] == HOST)
        if replica.rank == 0:
            shared.steps[shared[unit.index].number, 1] = ~0
        replica.wait_for_all()
        with pytest.raises(ReplicaError, match=r"unit model.layers.0: a rank .* died while it ch"):
            stepper.weights.settle(unit)

    on_two(on_ranks, work)
