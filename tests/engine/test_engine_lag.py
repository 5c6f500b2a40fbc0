"""Saving, resuming and going back where masters lag behind the steps."""

from typing import Any

import pytest
import torch

from engine.common import batch, config, net, same, weights
from zo_offload.errors import CheckpointError, JournalError
from zo_offload.journal import Journal

STEPS = 8


def settings(
    lag: int = 3, device: str = "cpu", where: str | None = None, **more: Any
) -> dict[str, Any]:
    block = {
        "eps": 1e-2,
        "update": {"lag": lag, "where": where},
        "offload_param": {"device": device},
        "journal": more.pop("journal", {}),
        **more,
    }
    json_ = config(bf16={"enabled": True}, zeroth_order=block)
    json_["optimizer"]["params"] = {"lr": 3e-2, "weight_decay": 0.05}
    return json_


def train(engine: Any, stop: int) -> Any:
    while (step := engine.global_steps) < stop:
        inputs = batch(step)
        engine.train_batch(iter([{**inputs, "x": inputs["x"].bfloat16()}]))
    return engine


def outcome(engine: Any) -> tuple[dict[str, torch.Tensor], Any]:
    return weights(engine), engine.last_result


def assert_same_outcome(engine: Any, expected: tuple) -> None:
    found = outcome(engine)
    assert found[1] == expected[1]
    assert same(found[0], expected[0])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("kind", ["weights", "scalars"])
@pytest.mark.parametrize(("device", "where"), [("cpu", "host"), ("cpu", "device"), ("none", None)])
def test_a_run_goes_on_from_every_step(
    make_engine, tmp_path, lag: int, kind: str, device: str, where: str | None
):
    ds = settings(lag, device, where, journal={"checkpoint": kind})
    whole = make_engine(ds=ds)
    for step in range(1, STEPS):
        train(whole, step).save_checkpoint(tmp_path)
    expected = outcome(train(whole, STEPS))
    for step in range(1, STEPS):
        engine = make_engine(ds=ds)
        engine.load_checkpoint(tmp_path, f"global_step{step}")
        assert_same_outcome(train(engine, STEPS), expected)
        engine.destroy()


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_an_engine_goes_back_to_every_step(make_engine, tmp_path, lag: int, where: str):
    engine = make_engine(ds=settings(lag, where=where))
    for step in range(1, STEPS):
        train(engine, step).save_checkpoint(tmp_path)
    expected = outcome(train(engine, STEPS))
    for step in (7, 6, 3, 1, 4):
        engine.load_checkpoint(tmp_path, f"global_step{step}")
        assert_same_outcome(train(engine, STEPS), expected)


def test_scalars_alone_take_an_engine_back_as_far_as_its_masters_have_not_moved(
    make_engine, tmp_path
):
    engine = make_engine(ds=settings(1, journal={"checkpoint": "scalars"}))
    train(engine, 5).save_checkpoint(tmp_path)
    expected = outcome(train(engine, 6))
    with pytest.raises(CheckpointError, match="holds scalars only"):
        engine.load_checkpoint(tmp_path)  # ambient weights carry the sixth step
    assert_same_outcome(engine, expected)


@pytest.mark.parametrize("interval", [2, 3])
def test_a_restart_takes_up_the_file_and_a_snapshot(make_engine, tmp_path, interval: int):
    expected = outcome(train(make_engine(ds=settings()), STEPS))
    journal = {"path": str(tmp_path / "run.journal"), "snapshot_interval": interval}
    for stop in (*range(1, STEPS), STEPS):
        engine = make_engine(ds=settings(journal=journal))
        train(engine, stop)
        engine.destroy()
    assert len(Journal.read(tmp_path / "run.journal").records) == STEPS
    last = make_engine(ds=settings(journal=journal))
    assert same(weights(last), expected[0])


def test_snapshots_hold_masters_of_the_grid(make_engine, tmp_path):
    journal = {"path": str(tmp_path / "run.journal"), "snapshot_interval": 5}
    train(make_engine(ds=settings(journal=journal)), 5).destroy()
    held = make_engine(ds=settings(journal=journal)).stepper.weights
    assert {held.carried(unit) for unit in held.map.units} == {3}
    assert held.carried(held.map.ambient) == 5


def test_the_weights_alone_are_of_the_last_step(make_engine, tmp_path):
    engine = train(make_engine(ds=settings()), 6)
    engine.save_checkpoint(tmp_path)
    fresh = make_engine(net(1), ds=settings(lag=2))
    fresh.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(fresh), weights(engine))
    assert fresh.global_steps == 0
    train(fresh, 2)


def test_the_weights_alone_need_the_direction_of_their_run(make_engine, tmp_path):
    train(make_engine(ds=settings()), 6).save_checkpoint(tmp_path)
    fresh = make_engine(ds=settings(direction="gaussian"))
    before = weights(fresh)
    with pytest.raises(CheckpointError, match=r"masters may lag behind its 6 steps.* direction"):
        fresh.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(fresh), before)


def test_another_lag_is_another_run(make_engine, tmp_path):
    path = str(tmp_path / "run.journal")
    train(make_engine(ds=settings(3, journal={"path": path})), 2).destroy()
    with pytest.raises(JournalError, match=r"lag: journal has 3, this run has 2"):
        make_engine(ds=settings(2, journal={"path": path}))


@pytest.mark.parametrize("device", ["cpu", "none"])
def test_windows_of_several_calls_see_the_same_weights(make_engine, device: str):
    """Each call is a visit of its own; what is fetched ahead is for the next step."""
    results = []
    for in_one_call in (True, False):
        json_ = settings(1, device)
        json_["gradient_accumulation_steps"] = 3
        engine = make_engine(ds=json_)
        for step in range(4):
            inputs = [
                {**b, "x": b["x"].bfloat16()} for b in (batch(3 * step + i) for i in range(3))
            ]
            if in_one_call:
                engine.train_batch(iter(inputs))
                continue
            for each in inputs:
                engine.backward(engine(**each).loss)
                engine.step()
        results.append(outcome(engine))
    assert results[0][1] == results[1][1]
    assert same(results[0][0], results[1][0])
