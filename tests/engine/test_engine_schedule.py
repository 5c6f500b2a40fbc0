"""Learning rates, schedulers and monitors, as DeepSpeed's users set them."""

import csv
import logging
import re
from typing import Any

import pytest
import torch
from metric_names import documented
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import LambdaLR, StepLR

from engine.common import LR, batch, config, net, same, weights
from zo_offload.errors import ConfigError


def rates(engine, num_steps: int) -> list[float]:
    found = []
    for step in range(num_steps):
        engine.train_batch(iter([batch(step)]))
        found.append(engine.last_result.lr)
    return found


def test_the_rate_of_the_json(make_engine):
    engine = make_engine()
    assert engine.get_lr() == [LR]
    assert rates(engine, 2) == [LR, LR]


def test_warmup_from_the_json(make_engine):
    params = {"warmup_num_steps": 4, "warmup_max_lr": LR, "warmup_type": "linear"}
    engine = make_engine(ds=config(scheduler={"type": "WarmupLR", "params": params}))
    found = rates(engine, 6)
    assert found[1:] == pytest.approx([0.0, LR / 4, LR / 2, 3 * LR / 4, LR])
    assert engine.get_lr() == [LR]


def test_warmup_and_decay_from_the_json(make_engine):
    params = {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_max_lr": LR}
    engine = make_engine(ds=config(scheduler={"type": "WarmupDecayLR", "params": params}))
    found = rates(engine, 8)
    assert max(found) == pytest.approx(LR)
    assert found[-1] == 0.0
    assert found[3:] == sorted(found[3:], reverse=True)


def test_a_scheduler_without_params(make_engine):
    engine = make_engine(ds=config(scheduler={"type": "WarmupLR"}))
    assert len(rates(engine, 2)) == 2


def test_a_torch_scheduler_from_the_json(make_engine):
    engine = make_engine(ds=config(scheduler={"type": "StepLR", "params": {"step_size": 2}}))
    assert rates(engine, 4) == pytest.approx([LR, LR, LR / 10, LR / 10])


def test_a_callable_makes_the_scheduler(make_engine):
    engine = make_engine(lr_scheduler=lambda o: LambdaLR(o, lambda step: 1 / (1 + step)))
    assert rates(engine, 3) == pytest.approx([LR, LR / 2, LR / 3])


def test_a_clients_optimizer_and_scheduler(make_engine):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    engine = make_engine(model, optimizer=optimizer, lr_scheduler=scheduler)
    assert engine.optimizer is optimizer
    assert rates(engine, 3) == [0.5, 0.25, 0.125]


def test_a_clients_optimizer_moves_nothing_itself(make_engine):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    theirs, ours = make_engine(model, optimizer=optimizer), make_engine()
    for engine in (theirs, ours):
        rates(engine, 2)
    assert same(weights(theirs), weights(ours))


def test_a_callable_makes_the_optimizer(make_engine):
    engine = make_engine(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.25))
    assert rates(engine, 1) == [0.25]


def test_an_optimizer_of_some_parameters_is_refused(make_engine):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.inputs.parameters(), lr=1.0)
    with pytest.raises(ConfigError, match=r"blocks.0.weight is trainable but not among .*6 such"):
        make_engine(model, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    make_engine(model)  # nothing of the refused engine is left on it


def test_parameters_that_say_otherwise_than_the_model_are_refused(make_engine):
    model = net()
    with pytest.raises(ConfigError, match=r"model_parameters: blocks.0.weight is trainable"):
        make_engine(model, model_parameters=model.inputs.parameters())
    stray = torch.nn.Parameter(torch.ones(1))
    everything = [*model.parameters(), stray]
    with pytest.raises(ConfigError, match=r"1 of its parameters are not the model's"):
        make_engine(model, optimizer=torch.optim.SGD(everything, lr=1.0))
    make_engine(model, model_parameters=[{"params": list(model.parameters())}])


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [("SGD", "found 'SGD'"), (lambda parameters: 3, "the function returned int")],
)
def test_what_is_no_optimizer_is_refused(make_engine, optimizer: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        make_engine(optimizer=optimizer)


def test_what_is_taken_from_a_clients_optimizer_is_said(make_engine, caplog):
    model = net()
    make_engine(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.5))
    assert "optimizer AdamW: only its lr (0.5) and weight_decay (0.01) are used" in caplog.text


def test_a_clients_optimizer_brings_its_decay(make_engine):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.5)
    engine = make_engine(model, optimizer=optimizer)
    engine.optimizer.param_groups[0]["lr"] = 0.5
    ours = make_engine(
        ds=config(optimizer={"type": "ZO", "params": {"lr": 0.5, "weight_decay": 0.5}})
    )
    for one in (engine, ours):
        rates(one, 1)
    assert same(weights(engine), weights(ours))


def test_groups_that_differ_are_refused(make_engine):
    model = net()
    groups = [
        {"params": list(model.inputs.parameters()), "lr": 1.0},
        {"params": list(model.blocks.parameters()), "lr": 2.0},
    ]
    with pytest.raises(ConfigError, match=r"groups differ in lr \(\[1.0, 2.0\]\)"):
        make_engine(model, optimizer=torch.optim.SGD(groups))


def test_a_failed_step_does_not_advance_the_schedule(make_engine):
    engine = make_engine(lr_scheduler=lambda o: LambdaLR(o, lambda step: 1 / (1 + step)))
    with pytest.raises(Exception, match="the loss is nan"):
        engine.train_batch(iter([{**batch(), "x": torch.full((4, 8), torch.nan)}]))
    assert engine.get_lr() == [LR]


def column(path) -> tuple[list[int], list[float]]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [int(row[0]) for row in rows], [float(row[1]) for row in rows]


@pytest.mark.parametrize("gas", [1, 2])
def test_the_csv_monitor_gets_loss_and_rate(make_engine, tmp_path, gas: int):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(ds=config(gas, csv_monitor=monitor))
    losses = []
    for step in range(3):
        for i in range(gas):
            engine.backward(engine(**batch(gas * step + i)).loss)
            engine.step()
        losses.append(engine.last_result.loss)
    samples, shown = column(tmp_path / "job" / "Train_Samples_train_loss.csv")
    assert samples == [4 * gas, 8 * gas, 12 * gas]
    assert shown == pytest.approx(losses)
    assert column(tmp_path / "job" / "Train_Samples_lr.csv") == (samples, [LR] * 3)
    norms = column(tmp_path / "job" / "Train_Samples_grad_norm.csv")[1]
    assert norms[-1] == pytest.approx(engine.get_global_grad_norm())


def test_tensorboard_gets_loss_and_rate(make_engine, tmp_path):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(ds=config(tensorboard=monitor))
    losses = [float(engine.train_batch(iter([batch(number)]))) for number in range(3)]
    engine.monitor.tb_monitor.summary_writer.close()
    accumulator = EventAccumulator(str(tmp_path / "job"))
    accumulator.Reload()
    shown = accumulator.Scalars("Train/Samples/train_loss")
    assert [event.step for event in shown] == [4, 8, 12]
    assert [event.value for event in shown] == pytest.approx(losses)
    assert {"Train/Samples/grad_norm", "Train/Samples/lr"} <= set(accumulator.Tags()["scalars"])


def test_weights_and_biases_without_a_network(make_engine, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    engine = make_engine(ds=config(wandb={"enabled": True, "project": "test"}))
    engine.train_batch(iter([batch()]))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("calls", ["forward", "train_batch"])
def test_the_flops_profiler_reports_one_forward(make_engine, tmp_path, calls: str):
    path = tmp_path / "profile.txt"
    profiler = {"enabled": True, "profile_step": 1, "output_file": str(path), "detailed": True}
    engine, plain = make_engine(ds=config(flops_profiler=profiler)), make_engine()
    for each in (engine, plain):
        for number in range(3):
            if calls == "train_batch":
                each.train_batch(iter([batch(number)]))
            else:
                each.backward(each(**batch(number)).loss)
                each.step()
    report = path.read_text()
    assert "Profile Summary at step" in report
    # four linear layers, each of 8 x 8 + 8 parameters and 8 x 8 products for each of four rows
    assert re.search(r"Net\(\s*288 = 100% Params, 1.02 KMACs = 100% MACs", report)
    assert same(weights(engine), weights(plain))


def test_throughput_and_timers_are_told_in_deepspeeds_form(make_engine, capsys, caplog):
    caplog.set_level(logging.INFO, "DeepSpeed")
    engine = make_engine(ds=config(gas=2, steps_per_print=1, wall_clock_breakdown=True))
    for number in range(4):
        engine.train_batch(iter([batch(number), batch(number + 10)]))
    assert re.search(r"time \(ms\) \| fwd: [\d.]+ \| bwd", capsys.readouterr().out + caplog.text)
    assert "RunningAvgSamplesPerSec=" in caplog.text


def test_timers_reach_the_monitor(make_engine, tmp_path):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(ds=config(csv_monitor=monitor, wall_clock_breakdown=True))
    engine.train_batch(iter([batch()]))
    engine.backward(engine(**batch()).loss)
    engine.step()
    times = column(tmp_path / "job" / "Train_Samples_elapsed_time_ms_forward.csv")[1]
    assert len(times) == 2
    assert min(times) > 0
    written = {path.stem for path in (tmp_path / "job").glob("*.csv")}
    assert written == {name.replace("/", "_") for name in documented("DeepSpeed's monitors")}


def test_steps_per_print(make_engine, caplog):
    caplog.set_level(logging.INFO, "DeepSpeed")
    engine = make_engine(ds=config(steps_per_print=2))
    caplog.clear()
    rates(engine, 4)
    told = [m for m in caplog.messages if "skipped=" in m]
    assert [message.split(",")[0].split()[-1] for message in told] == ["step=2", "step=4"]


def test_noise_is_measured_once_and_logged(make_engine, caplog):
    caplog.set_level(logging.INFO, "zo_offload")
    engine = make_engine(measure_noise=True)
    assert engine.loss_noise is None
    rates(engine, 3)
    noise: Any = engine.loss_noise
    assert 0 <= noise.ratio < 0.1
    assert caplog.text.count("noise over signal of L+ - L-") == 1


def test_noise_that_drowns_the_signal_is_warned_of(make_engine, caplog):
    engine = make_engine(ds=config(zeroth_order={"eps": 1e-9}), measure_noise=True)
    engine.backward(engine(**batch()).loss)
    assert "rounding drowns the signal" in caplog.text
    assert "at eps 1e-09; raise eps" in caplog.text


def test_measuring_noise_changes_no_bit(make_engine):
    quiet, measured = make_engine(), make_engine(measure_noise=True)
    for engine in (quiet, measured):
        rates(engine, 2)
    assert same(weights(quiet), weights(measured))


def test_noise_is_not_measured_on_a_loss_that_is_not_finite(make_engine, caplog):
    engine = make_engine(measure_noise=True)
    with pytest.raises(Exception, match="the loss is nan"):
        engine.train_batch(iter([{**batch(), "x": torch.full((4, 8), torch.nan)}]))
    assert engine.loss_noise is None
    assert "drowns" not in caplog.text
    rates(engine, 1)
    assert engine.loss_noise is not None


@pytest.mark.parametrize(("eps", "kind"), [(0.5, None), (1e-3, "flat")])
def test_an_accuracy_is_not_taken_for_rounding(make_engine, caplog, eps, kind):
    caplog.set_level(logging.WARNING, "zo_offload")

    def misses(model: Any, batch: Any, outputs: Any) -> torch.Tensor:
        return (outputs.logits.argmax(-1) != batch["labels"]).float()

    ds = config(zeroth_order={"eps": eps})
    engine = make_engine(ds=ds, objective=misses, measure_noise=True)
    losses = [float(engine.train_batch(iter([batch(step)]))) for step in range(25)]
    assert {loss * 8 % 1 for loss in losses} == {0.0}
    assert engine.loss_noise.is_stepwise
    found = engine.eps_watch.finding
    assert (found.kind if found else None) == kind
    assert len(caplog.messages) == (kind is not None)


@pytest.mark.parametrize(("eps", "kind"), [(1e-3, None), (2e-8, "coarse"), (1e-14, "dead")])
def test_an_eps_too_small_for_its_losses_is_told_once(make_engine, caplog, eps, kind):
    engine = make_engine(ds=config(zeroth_order={"eps": eps}))
    for step in range(45):
        engine.train_batch(iter([batch(step)]))
    found = engine.eps_watch.finding
    assert (found.kind if found else None) == kind
    assert caplog.text.count("raise eps") == (kind is not None)


def test_a_loss_computed_from_logits_is_not_looked_at(make_engine):
    engine = make_engine(ds=config(zeroth_order={"eps": 1e-14}))
    for step in range(25):
        given = batch(step)
        out = engine(x=given["x"])
        engine.backward(torch.nn.functional.cross_entropy(out.logits, given["labels"]))
        engine.step()
    assert engine.eps_watch.finding is None
