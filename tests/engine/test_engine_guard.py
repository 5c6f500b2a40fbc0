"""Losses that go wrong, through the engine: counters, checkpoints, snapshots."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.common import batch, config, same, weights
from zo_offload.errors import DivergedError, RolledBackError
from zo_offload.journal import Journal

BAD = 30.0  # times the inputs


def data(step: int, bad: bool) -> dict[str, torch.Tensor]:
    given = batch(step)
    return {**given, "x": given["x"] * BAD} if bad else given


def settings(path: Path, **block: Any) -> dict[str, Any]:
    journal = {"path": str(path), **block.pop("journal", {})}
    guard = {"window": 20, **block.pop("guard")}
    return config(zeroth_order={"journal": journal, "guard": guard, **block})


def train(engine: Any, stop: int, bad_from: int = 1000) -> None:
    for step in range(engine.global_steps, stop):
        engine.train_batch(iter([data(step, step >= bad_from)]))


def test_a_run_that_is_stopped_after_a_step_has_counted_it(make_engine, tmp_path):
    guard = {"divergence": "stop"}
    engine = make_engine(ds=settings(tmp_path / "run.journal", guard=guard))
    with pytest.raises(DivergedError, match="the step was taken"):
        train(engine, 90, bad_from=25)
    assert engine.global_steps == engine.stepper.step > 25
    assert engine.global_samples == engine.global_steps * engine.train_batch_size()
    assert engine.micro_steps == engine.global_steps


def test_a_run_that_a_dead_eps_stops_has_counted_the_step(make_engine, tmp_path):
    path = tmp_path / "run.journal"
    engine = make_engine(ds=settings(path, eps=1e-12, guard={"dead_eps": "stop"}))
    words = r"^step 19: eps 1e-12 is dead: .*raise eps.*; the step was taken$"
    with pytest.raises(DivergedError, match=words):
        train(engine, 90)
    assert engine.global_steps == engine.stepper.step == 20
    assert len(Journal.read(path).records) == 20


def test_what_is_ahead_of_the_journal_is_not_saved(make_engine, tmp_path):
    ds = settings(tmp_path / "run.journal", guard={"explosion": "rollback"})
    engine = make_engine(ds=ds)
    with pytest.raises(RolledBackError):
        train(engine, 60, bad_from=25)
    for save in (engine.save_checkpoint, engine.save_16bit_model, engine.save_pretrained):
        with pytest.raises(RolledBackError):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_tag_saved_right_after_a_roll_back_goes_on_as_the_run_does(make_engine, tmp_path):
    path, guard = tmp_path / "run.journal", {"explosion": "rollback"}
    engine = make_engine(ds=settings(path, guard=guard))
    with pytest.raises(RolledBackError):
        train(engine, 60, bad_from=25)
    engine.destroy()
    engine = make_engine(ds=settings(path, guard=guard))
    assert engine.stepper.journal.records.stream == 1
    engine.save_checkpoint(tmp_path / "tags", "here")
    stop = engine.global_steps + 3
    train(engine, stop)
    other = make_engine(ds=settings(tmp_path / "other.journal", guard=guard))
    other.load_checkpoint(tmp_path / "tags", "here")
    assert other.stepper.journal.records.stream == 1
    train(other, stop)
    assert same(weights(engine), weights(other))
    engine.load_checkpoint(tmp_path / "tags", "here")  # of an engine that is ahead
    assert engine.stepper.journal.records.stream == 1


def test_snapshots_of_a_branch_that_is_no_more_make_room(make_engine, tmp_path):
    path = tmp_path / "run.journal"
    journal = {"snapshot_interval": 5, "keep_snapshots": 2}
    engine = make_engine(ds=settings(path, guard={}, journal=journal))
    train(engine, 25)
    engine.destroy()
    with Journal.open(path, Journal.read(path).header.fields) as opened:
        opened.rewind(12)
    engine = make_engine(ds=settings(path, guard={}, journal=journal))
    train(engine, 17)
    kept = sorted(each.name for each in Path(f"{path}.snapshots").iterdir())
    assert kept == ["step-000000015"]
