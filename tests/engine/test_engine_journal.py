"""An engine with a journal: every step is in it, and another engine goes on from it."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from engine.common import batch, config, net, same, weights
from zo_offload.errors import ConfigError, JournalError
from zo_offload.journal import Journal

STEPS = 5


def journaled(path, **more) -> dict:
    block = {"journal": {"path": str(path)}, **more.pop("zeroth_order", {})}
    return config(zeroth_order=block, **more)


def decay(optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def steps(engine, first: int, last: int) -> None:
    for step in range(first, last):
        engine.train_batch(iter([batch(step)]))


def test_every_step_is_recorded(make_engine, tmp_path):
    path = tmp_path / "run.journal"
    engine = make_engine(ds=journaled(path, probes=2), lr_scheduler=decay)
    results = []
    for step in range(3):
        engine.train_batch(iter([batch(step)]))
        results.append(engine.last_result)
        (*_, last) = records = Journal.read(path).records
        assert len(records) == step + 1
        assert last.lr == engine.last_result.lr
        assert last.losses == engine.last_result.lane_losses
        assert tuple(p.projected_grad for p in last.probes) == engine.last_result.projected_grads


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stop", [0, 2, STEPS])
def test_a_second_engine_goes_on_with_the_same_bits(make_engine, tmp_path, stop: int, offload: str):
    block = {"offload_param": {"device": offload}, "probes": 2}
    params = {"lr": 0.3, "weight_decay": 0.01}
    more = {"zeroth_order": block, "optimizer": {"type": "ZO", "params": params}}
    whole = make_engine(ds=journaled(tmp_path / "whole", **more), lr_scheduler=decay)
    steps(whole, 0, STEPS)
    first = make_engine(ds=journaled(tmp_path / "parts", **more), lr_scheduler=decay)
    steps(first, 0, stop)
    first.destroy()
    second = make_engine(ds=journaled(tmp_path / "parts", **more), lr_scheduler=decay)
    assert second.global_steps == stop
    assert second.micro_steps == stop
    assert second.global_samples == 4 * stop
    steps(second, stop, STEPS)
    assert same(weights(whole), weights(second))
    assert second.get_lr() == whole.get_lr()
    second.destroy()
    whole.destroy()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_deepspeeds_schedule_goes_on(make_engine, tmp_path):
    params = {"total_num_steps": 6, "warmup_num_steps": 3, "warmup_max_lr": 0.1}
    more = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    whole = make_engine(ds=journaled(tmp_path / "whole", **more))
    steps(whole, 0, STEPS)
    first = make_engine(ds=journaled(tmp_path / "parts", **more))
    steps(first, 0, 2)
    first.destroy()
    second = make_engine(ds=journaled(tmp_path / "parts", **more))
    steps(second, 2, STEPS)
    assert same(weights(whole), weights(second))


def test_two_engines_at_once_are_refused(make_engine, tmp_path):
    make_engine(ds=journaled(tmp_path / "run.journal"))
    with pytest.raises(JournalError, match="another run has this journal"):
        make_engine(ds=journaled(tmp_path / "run.journal"))


CHANGES = {
    "seed": {"zeroth_order": {"seed": 7}},
    "eps": {"zeroth_order": {"eps": 0.5}},
    "probes": {"zeroth_order": {"probes": 3}},
    "direction": {"zeroth_order": {"direction": "gaussian"}},
    "direction_scale": {"zeroth_order": {"direction_scale": "rms"}},
    "forward": {"bf16": {"enabled": True}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_run_is_refused_by_name(make_engine, tmp_path, key: str):
    path = tmp_path / "run.journal"
    engine = make_engine(ds=journaled(path))
    steps(engine, 0, 1)
    engine.destroy()
    written = path.read_bytes()
    with pytest.raises(JournalError, match=f"another run: .*header.{key}"):
        make_engine(ds=journaled(path, **CHANGES[key]))
    assert path.read_bytes() == written


def test_other_base_weights_are_refused(make_engine, tmp_path):
    make_engine(ds=journaled(tmp_path / "run.journal")).destroy()
    with pytest.raises(JournalError, match=r"header\.base_sha256"):
        make_engine(net(seed=1), ds=journaled(tmp_path / "run.journal"))


def test_a_journal_that_refuses_a_step_stops_it(make_engine, tmp_path, monkeypatch):
    engine = make_engine(ds=journaled(tmp_path / "run.journal"))
    steps(engine, 0, 1)
    before = weights(engine)

    def full(journal, record):
        raise JournalError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(JournalError, match="no space left"):
            steps(engine, 1, 2)
    assert same(weights(engine), before)
    assert engine.global_steps == 1
    steps(engine, 1, 2)
    plain = make_engine()
    steps(plain, 0, 2)
    assert same(weights(engine), weights(plain))


def test_a_journal_may_be_taken_up_later(make_engine, tmp_path):
    engine = make_engine(ds=journaled(tmp_path / "run.journal"))
    steps(engine, 0, 2)
    expected = weights(engine)
    engine.destroy()
    late = make_engine()
    with torch.no_grad():
        before = late(**batch()).loss
    late.continue_journal(tmp_path / "run.journal")
    assert same(weights(late), expected)
    with torch.no_grad():
        assert late(**batch()).loss != before


def test_a_journal_cannot_be_taken_up_after_a_step(make_engine, tmp_path):
    engine = make_engine()
    steps(engine, 0, 1)
    with pytest.raises(ConfigError, match="before the first step, and 1 were taken"):
        engine.continue_journal(tmp_path / "run.journal")
    assert not (tmp_path / "run.journal").exists()
