"""Losses that are no numbers: of a probe, of a whole step; what is recorded, what moves."""

import math
from contextlib import closing
from typing import Any

import pytest
import torch
from models.table import Plain, vectors

from zo_offload.bars import Bar
from zo_offload.config import ZOConfig
from zo_offload.errors import DivergedError
from zo_offload.journal import Flags
from zo_offload.metrics import _row, smooth
from zo_offload.objective import Objective
from zo_offload.step import Stepper

LR = 1e-2


class Failing:
    """An objective whose value at chosen calls is not finite; lanes run in order."""

    def __init__(self, bad_calls: dict[int, float]) -> None:
        self.bad_calls = bad_calls
        self.calls = 0

    def __call__(self, model: Any, batch: Any, outputs: Any) -> torch.Tensor:
        self.calls += 1
        bad = self.bad_calls.get(self.calls - 1)
        return outputs if bad is None else torch.tensor(bad)


def stepper(bad_calls: dict[int, float], **block: Any) -> Stepper:
    objective = Objective(loss=Failing(bad_calls), forward=lambda model, batch: model(**batch))
    guard = {"nonfinite": block.pop("nonfinite", "skip")}
    config = ZOConfig.model_validate({"guard": guard, **block})
    torch.manual_seed(0)
    return Stepper(Plain(num_blocks=2, width=8), config, objective=objective)


def weights(it: Stepper) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in it.weights.masters()}


def test_a_probe_is_left_out_and_the_others_count():
    with closing(stepper({3: math.inf}, probes=3)) as it:  # probe 1, -eps
        found = it.train_step([vectors(16)], LR)
        (record,) = it.journal.records
    assert record.losses[3] == math.inf
    assert (found.projected_grads[1], record.probes[1].coefficient) == (0.0, 0.0)
    assert found.projected_grads[0] != 0.0 != found.projected_grads[2]
    assert math.isfinite(found.loss)
    assert record.flags == Flags.NONE


@pytest.mark.parametrize("block", [{}, {"probes": 2, "estimator": "one_sided"}], ids=str)
def test_a_step_without_a_usable_probe_moves_nothing(block: dict[str, Any]):
    with closing(stepper({1: math.nan}, **block)) as it:
        before = weights(it)
        found = it.train_step([vectors(16)], LR, weight_decay=0.5)
        assert found.skipped
        assert all(torch.equal(value, before[name]) for name, value in weights(it).items())
        (record,) = it.journal.records
        assert record.flags == Flags.SKIPPED
        assert math.isnan(record.losses[1])
        assert not it.train_step([vectors(16)], LR).skipped
        assert not all(torch.equal(value, before[name]) for name, value in weights(it).items())


def test_a_step_that_was_skipped_is_replayed_as_one():
    with closing(stepper({1: math.nan})) as it:
        for _ in range(3):
            it.train_step([vectors(16)], LR)
        journal, expected = it.journal, weights(it)
        with closing(stepper({})) as again:
            again.follow(journal)
            assert all(torch.equal(value, expected[n]) for n, value in weights(again).items())


def test_what_is_shown_of_a_step_without_a_loss_is_no_number_and_spoils_no_other():
    shown = Bar()
    with shown, closing(stepper({0: math.nan, 1: math.nan})) as it:
        shown.on_start(0, 3)
        for step in range(3):
            shown.on_step(step, it.train_step([vectors(16)], LR).loss)
        rows = [_row(record)["loss"] for record in it.journal.records]
    assert rows[0] == "nan"
    assert shown._loss is not None
    assert math.isfinite(shown._loss)
    assert [math.isfinite(x) for x in smooth([float(row) for row in rows])] == [False, True, True]


def test_unless_it_is_allowed_the_run_stops():
    with closing(stepper({1: math.nan}, nonfinite="stop")) as it:
        with pytest.raises(DivergedError, match="the loss is nan"):
            it.train_step([vectors(16)], LR)
        assert it.step == 0
