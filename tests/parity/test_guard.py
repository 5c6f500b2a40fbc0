"""Losses that go wrong: what is skipped, what stops, what is rolled back, and what it leaves."""

import logging
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import Plain, vectors

from zo_offload.config import ZOConfig
from zo_offload.errors import DivergedError, RolledBackError
from zo_offload.journal import Flags, Journal
from zo_offload.objective import Objective
from zo_offload.step import Stepper

LR = 1e-3
PROBES = 2
GUARD = {"window": 20}


class Scripted:
    """A loss that is raised in chosen steps; lanes of a step run in order."""

    def __init__(self, raised: dict[int, float], lanes: int = 2 * PROBES) -> None:
        self.raised = raised
        self.lanes = lanes
        self.calls = 0

    def __call__(self, model: Any, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        step = self.calls // self.lanes
        self.calls += 1
        return outputs + self.raised.get(step, 0.0)


def stepper(raised: dict[int, float], guard: dict[str, Any], **block: Any) -> Stepper:
    objective = Objective(loss=Scripted(raised), forward=lambda model, batch: model(**batch))
    fields = {"probes": PROBES, "guard": {**GUARD, **guard}, **block}
    torch.manual_seed(0)
    model = Plain(num_blocks=2, width=8)
    return Stepper(model, ZOConfig.model_validate(fields), objective=objective)


def weights(it: Stepper) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in it.weights.masters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def take(it: Stepper, steps: int) -> None:
    for _ in range(steps):
        it.train_step([vectors(16)], LR)


@contextmanager
def begun(path: Path, raised: dict[int, float], guard: dict[str, Any], **block: Any) -> Iterator:
    """A stepper on a journal in a file."""
    with closing(stepper(raised, guard, **block)) as it:
        it.follow(Journal.open(path, it.bit_header()))
        yield it


def test_a_step_that_explodes_is_skipped_and_said(caplog):
    with (
        closing(stepper({15: 1e4}, {"explosion": "skip"})) as it,
        closing(stepper({}, {})) as plain,
    ):
        take(it, 15)
        before = weights(it)
        with caplog.at_level(logging.WARNING):
            assert it.train_step([vectors(16)], LR).skipped
        assert same(weights(it), before)
        record = it.journal.records[15]
        assert record.flags == Flags.SKIPPED
        assert record.losses[0] > 1e3
        assert not it.train_step([vectors(16)], LR).skipped
        take(plain, 15)
        assert same(before, weights(plain))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("step 15: the loss is ")
    assert line.endswith("the step is skipped")


def test_by_default_it_is_said_once_and_changes_nothing(caplog):
    with closing(stepper({15: 1e4, 17: 1e4}, {})) as it:
        with caplog.at_level(logging.WARNING):
            take(it, 20)
        assert it.step == 20
        assert not any(record.flags for record in it.journal.records)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "guard.explosion" in line


@pytest.mark.parametrize(
    ("raised", "guard", "steps"),
    [
        ({15: 1e4}, {"explosion": "stop"}, 15),
        (dict.fromkeys(range(15, 60), 1e4), {"divergence": "stop"}, 28),
    ],
    ids=["explosion", "divergence"],
)
def test_a_run_is_stopped_and_keeps_what_it_has(raised, guard, steps):
    with closing(stepper(raised, guard)) as it:
        with pytest.raises(DivergedError, match=r"^step \d+: .*loss.*lower the learning rate"):
            take(it, 60)
        assert it.step == steps
        assert len(weights(it)) > 0


TROUBLE = {
    "nonfinite": {25: math.inf},
    "explosion": {25: 1e4},
    "divergence": dict.fromkeys(range(25, 60), 1e4),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_roll_back_goes_on_along_other_directions_at_a_smaller_rate(tmp_path, kind: str):
    path = tmp_path / "run.journal"
    with begun(path, TROUBLE[kind], {kind: "rollback"}) as it:
        with pytest.raises(RolledBackError, match=r"rolled back to step .* 0\.5 of the learning"):
            take(it, 60)
        good = it.step
        assert 10 < good < 25
        held = it.journal.records[:good]
        for look in (lambda: take(it, 1), lambda: it.evaluate(vectors(16))):
            with pytest.raises(RolledBackError):  # its weights are ahead
                look()
        assert it.step == good
    with begun(path, {}, {kind: "rollback"}) as it:
        assert (it.step, it.journal.branch, it.journal.records.stream) == (good, 1, 1)
        take(it, 5)
        records = it.journal.records
        assert [record.lr for record in records] == [LR] * good + [LR / 2] * 5
        numbers = [tuple(probe.number for probe in record.probes) for record in records]
        assert numbers == [(0, 1)] * good + [(2, 3)] * 5
        assert [record.losses for record in records[:good]] == [each.losses for each in held]
        found = weights(it)
    with begun(path, {}, {kind: "rollback"}) as it:  # killed and replayed
        assert same(weights(it), found)
        take(it, 1)
        assert it.journal.records[-1].probes[0].number == 2


def test_losses_that_rise_for_good_are_not_skipped_for_ever():
    raised = dict.fromkeys(range(30, 200), 1e4)
    with closing(stepper(raised, {"explosion": "skip"})) as it:
        with pytest.raises(DivergedError, match="20 steps in a row were skipped"):
            take(it, 100)
        assert it.step == 50


def test_a_run_that_diverged_is_stopped_again_without_a_further_step(tmp_path):
    path, guard = tmp_path / "run.journal", {"divergence": "stop"}
    with begun(path, dict.fromkeys(range(25, 90), 1e4), guard) as it:
        with pytest.raises(DivergedError, match="the step was taken"):
            take(it, 90)
        steps = it.step
    with begun(path, {}, guard) as it:
        with pytest.raises(DivergedError, match="nothing was changed"):
            take(it, 1)
        assert it.step == steps


def test_killed_between_a_roll_back_and_the_next_step_it_goes_on_as_it_would(tmp_path):
    path = tmp_path / "run.journal"
    guard = {"explosion": "rollback"}
    with begun(path, TROUBLE["explosion"], guard) as it, pytest.raises(RolledBackError):
        take(it, 60)
    assert Journal.read(path).records.stream == 1
    assert Journal.of(path.read_bytes(), "copy").records.stream == 1


def test_each_roll_back_has_directions_of_its_own_until_there_are_enough(tmp_path):
    path, guard = tmp_path / "run.journal", {"explosion": "rollback", "most_rollbacks": 2}
    for number in (1, 2):
        raised = {25: 1e4} if number == 1 else {1: 1e4}
        with begun(path, raised, guard) as it:
            with pytest.raises(RolledBackError, match=f"roll back {number} of at most 2"):
                take(it, 60)
            assert it.journal.records.stream == number
    before = path.read_bytes()
    with begun(path, {0: 1e4}, guard) as it:
        with pytest.raises(DivergedError, match="after 2 roll backs") as caught:
            take(it, 60)
        assert not isinstance(caught.value, RolledBackError)
    assert path.read_bytes() == before


def test_without_a_file_there_is_nothing_to_go_on_with():
    with closing(stepper(TROUBLE["explosion"], {"explosion": "rollback"})) as it:
        with pytest.raises(DivergedError, match=r"must be in a file: write journal\.path"):
            take(it, 60)
        assert it.step == 25


def test_before_the_first_good_step_there_is_nowhere_to_go(tmp_path):
    with begun(tmp_path / "run.journal", {0: math.nan}, {"nonfinite": "rollback"}) as it:
        with pytest.raises(DivergedError, match="no better step"):
            take(it, 1)
        assert it.step == 0


@pytest.mark.parametrize(
    "block",
    [
        {"update": {"type": "momentum"}},
        {"update": {"lag": 3}, "offload_param": {"device": "cpu"}},
        {"trainable": {"mode": "low_rank", "interval": 7}},
        {"estimator": "one_sided"},
        {"direction": "gaussian"},
    ],
    ids=str,
)
def test_in_every_mode_the_branch_is_replayed_to_the_same_bits(tmp_path, block):
    path, guard = tmp_path / "run.journal", {"explosion": "rollback"}
    lanes = PROBES if "estimator" in block else 2 * PROBES
    raised = {25 * lanes // (2 * PROBES): 1e4}
    with begun(path, raised, guard, **block) as it, pytest.raises(RolledBackError):
        take(it, 60)
    with begun(path, {}, guard, **block) as it:
        assert it.journal.records.stream == 1
        take(it, 9)
        found = weights(it)
    with begun(path, {}, guard, **block) as it:
        assert same(weights(it), found)
