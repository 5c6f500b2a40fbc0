"""What a DeepSpeed user writes works here, and what is wrong is said before a model is touched."""

import argparse
import inspect
import json
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import zo_offload
from engine.common import Net, batch, config, net, same, weights
from zo_offload.errors import ConfigError, DivergedError, ModelError

NOWHERE = "/nowhere/no-such-model"


def test_the_signature_is_deepspeeds_and_an_objective():
    ours = inspect.signature(zo_offload.initialize).parameters
    theirs = inspect.signature(deepspeed.initialize).parameters
    assert list(ours) == [*theirs, "objective"]
    assert {name: ours[name].default for name in theirs} == {
        name: parameter.default for name, parameter in theirs.items()
    }
    assert {parameter.kind for parameter in ours.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # as DeepSpeed has it
@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true")
def test_what_is_returned():
    data = [{key: value[0] for key, value in batch(i, 1).items()} for i in range(8)]
    engine, optimizer, loader, scheduler = zo_offload.initialize(
        model=net(),
        config=config(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}}),
        training_data=data,
    )
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert engine.optimizer is optimizer
    assert engine.lr_scheduler is scheduler
    (first, second) = loader
    assert first["x"].shape == second["x"].shape == (4, 8)
    for step in range(3):
        assert engine.train_batch() > 0, step
    assert engine.global_steps == 3
    engine.destroy()


def test_positional_arguments_stand_where_deepspeed_has_them():
    arguments: Any = [None, net(), *[None] * 4, 29500, *[None] * 3, config()]
    engine, *_ = zo_offload.initialize(*arguments)
    engine.train_batch(iter([batch()]))
    engine.destroy()


@pytest.mark.parametrize("how", ["path", "string", "config_params", "args"])
def test_where_a_config_may_come_from(tmp_path, how: str):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config()))
    sources: dict[str, dict[str, Any]] = {
        "path": {"config": path},
        "string": {"config": str(path)},
        "config_params": {"config_params": config()},
        "args": {"args": argparse.Namespace(deepspeed_config=str(path), local_rank=0)},
    }
    engine, *_ = zo_offload.initialize(model=net(), **sources[how])
    engine.train_batch(iter([batch()]))
    engine.destroy()


def faults() -> dict[str, tuple[dict, str]]:
    return {
        "no batch size": (
            {"zeroth_order": {}},
            "train_batch_size or train_micro_batch_size_per_gpu",
        ),
        "batch arithmetic": (config(train_batch_size=7), r"7 != 4 \* 1 \* 1"),
        "batch of nothing": (
            config(train_batch_size=0),
            "train_batch_size: .* least 1, found 0",
        ),
        "batch in words": (config(train_batch_size="8"), "train_batch_size: .*, found '8'"),
        "batch by half": (config(train_batch_size=2.5), "train_batch_size: .*, found 2.5"),
        "no block": ({"train_batch_size": 4}, 'add "zeroth_order": {}'),
        "a block misspelt": (
            {"train_batch_size": 4, "zeroth_ordre": {}},
            "zeroth_ordre: unknown key; did you mean 'zeroth_order'",
        ),
        "bf16 misspelt inside": (
            config(bf16={"enabeld": True}),
            "bf16.enabeld: unknown key; did you mean 'enabled'",
        ),
        "offloading misspelt": (
            config(zero_optimization={"offload_params": {}}),
            "zero_optimization.offload_params: unknown key; did you mean 'offload_param'",
        ),
        "stage misspelt": (
            config(zero_optimization={"stagee": 3}),
            "zero_optimization.stagee: unknown key; did you mean 'stage'",
        ),
        "the rate of another optimizer misspelt": (
            config(optimizer={"type": "AdamW", "params": {"lrr": 0.1}}),
            "optimizer.params.lrr: unknown key; did you mean 'lr'",
        ),
        "params misspelt": (
            config(scheduler={"type": "WarmupLR", "parms": {}}),
            "scheduler.parms: unknown key; did you mean 'params'",
        ),
        "aio misspelt": (config(aio={"foo": 1}), "aio.foo: unknown key; valid keys: block_size"),
        "no accumulation": (config(gas=0), "gradient_accumulation_steps: .* found 0"),
        "auto": (config(train_batch_size="auto"), 'train_batch_size: "auto" is filled in by'),
        "auto below": (
            config(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}),
            "scheduler.params.warmup_num_steps: ",
        ),
        "our block": ({"train_batch_size": 4, "zeroth_ordr": {}}, "did you mean 'zeroth_order'"),
        "batch misspelt": ({"train_batchsize": 4}, "did you mean 'train_batch_size'"),
        "our key": (config(zeroth_order={"epss": 1}), "zeroth_order.epss: .*'eps'"),
        "monitor key": (config(csv_monitor={"enabeld": True}), "csv_monitor.enabeld: "),
        "monitor type": (config(csv_monitor=True), "csv_monitor: expected an object"),
        "switch": (config(wall_clock_breakdown="yes"), "wall_clock_breakdown: expected true"),
        "print": (config(steps_per_print="often"), "steps_per_print: expected a whole number"),
        "removed block": (config(amp={"enabled": True}), "amp: forwards compute in what"),
        "scheduler name": (config(scheduler={"type": "WarmUpLR"}), "did you mean WarmupLR"),
        "scheduler without type": (config(scheduler={"params": {}}), "scheduler.type: expected"),
        "scheduler params": (
            config(scheduler={"type": "WarmupDecayLR", "params": {}}),
            "WarmupDecayLR refuses its params: .*total_num_steps",
        ),
        "scheduler value": (
            config(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "many"}}),
            "WarmupLR refuses its params",
        ),
        "optimizer type": (config(optimizer=[]), "optimizer: expected"),
        "optimizer name": (config(optimizer={"type": 1}), 'type: expected "ZO", found 1'),
        "DeepSpeed's old word": (
            config(zero_optimization={"cpu_offload": True}),
            "cpu_offload: of another optimizer; w",
        ),
        "optimizer key": (config(optimizer={"param": {}}), "optimizer.param: .*'params'"),
        "lr misspelt": (config(optimizer={"params": {"lrr": 1}}), "optimizer.params.lrr: .*'lr'"),
        "lr in words": (config(optimizer={"params": {"lr": "1e-3"}}), "optimizer.params.lr: "),
        "lr below zero": (config(optimizer={"params": {"lr": -1}}), "a number >= 0, found -1"),
        "lr not finite": (config(optimizer={"params": {"lr": float("nan")}}), "found nan"),
        "both precisions": (config(bf16={"enabled": True}, fp16={"enabled": True}), "keep one"),
        "precision in words": (config(bf16={"enabled": "yes"}), "bf16.enabled: expected true"),
        "autotuning": (config(autotuning={"enabled": True}), "autotuning: "),
        "switched off": (config(zeroth_order={"enabled": False}), "call deepspeed.initialize"),
    }


@pytest.mark.parametrize("name", faults())
def test_a_faulty_config_is_refused_before_the_model(name: str):
    given, words = faults()[name]
    with pytest.raises(ConfigError, match=words) as caught:
        zo_offload.initialize(model=NOWHERE, config=given)
    assert "\n" not in str(caught.value)


def test_bf16_with_a_small_eps_is_warned_of(make_engine, caplog):
    make_engine(ds=config(bf16={"enabled": True}, zeroth_order={"eps": 3e-4}))
    assert "zeroth_order.eps 0.0003: in bf16 rounding drowns" in caplog.text


def test_arguments_that_cannot_be_honoured():
    for unsupported in ({"mpu": object()}, {"mesh_param": object()}):
        arguments: dict[str, Any] = {"model": NOWHERE, "config": config(), **unsupported}
        with pytest.raises(ConfigError, match="no model-parallel layout"):
            zo_offload.initialize(**arguments)
    with pytest.raises(ConfigError, match="no config"):
        zo_offload.initialize(model=NOWHERE)
    with pytest.raises(ConfigError, match="no model"):
        zo_offload.initialize(config=config())


def test_a_model_that_is_not_there_comes_after_the_config():
    with pytest.raises(ModelError, match="no such directory"):
        zo_offload.initialize(model=NOWHERE, config=config())


def test_a_sound_scheduler_is_tried_in_silence(caplog):
    ds = config(scheduler={"type": "WarmupLR"})
    engine, *_ = zo_offload.initialize(model=net(), config=ds)
    engine.destroy()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_another_optimizers_type_is_taken_for_its_rate(make_engine, caplog):
    params = {"lr": 0.25, "betas": [0.9, 0.95], "weight_decay": 0.5}
    engine = make_engine(ds=config(optimizer={"type": "AdamW", "params": params}))
    assert engine.get_lr() == [0.25]
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert "optimizer.type AdamW: only its lr (0.25) and weight_decay (0.5) are used" in caplog.text


def test_clipping_is_said_to_do_nothing(make_engine, caplog):
    make_engine(ds=config(gradient_clipping=1.0))
    assert "without effect here: gradient_clipping" in caplog.text


def test_auto_is_allowed_where_the_trainer_fills_it(make_engine):
    params = {"lr": "auto", "weight_decay": "auto"}
    engine = make_engine(ds=config(optimizer={"type": "ZO", "params": params}))
    assert engine.get_lr() == [1e-6]


def test_no_data(make_engine):
    with pytest.raises(ConfigError, match="pass data_iter, or training_data"):
        make_engine().train_batch()


def test_a_loader_that_ends_too_early_costs_nothing(make_engine):
    engine = make_engine(ds=config(gas=2))
    with pytest.raises(StopIteration):
        engine.train_batch(iter([batch()]))
    engine.train_batch(iter([batch(0), batch(1)]))
    assert engine.global_steps == 1


def test_train_leaves_layers_in_evaluation_mode(make_engine):
    engine = make_engine(net().train())
    assert engine.training
    for mode in (engine, engine.train(), engine.train(True), engine.eval()):
        assert mode is engine
        assert not any(module.training for module in engine.module.children())
    assert not engine.training
    engine.train()
    engine.train_batch(iter([batch()]))
    assert not any(module.training for module in engine.module.modules())


def test_the_model_says_what_mode_the_engine_is_in(make_engine):
    """TRL asks it; forwards themselves see evaluation mode."""
    seen = []
    engine = make_engine()
    forward = engine.module.forward
    engine.module.forward = lambda **data: seen.append(engine.module.training) or forward(**data)
    for training in (True, False, True):
        engine.train(training)
        assert engine.module.training is training
        engine(**batch())
        assert engine.module.training is training
    assert set(seen) == {False}


def test_a_module_put_into_training_mode_is_put_back(make_engine):
    plain, changed = make_engine(), make_engine()
    for engine in (plain, changed):
        if engine is changed:
            engine.module.train()
        engine.backward(engine(**batch()).loss)
        engine.step()
    assert plain.last_result == changed.last_result


CAST = r'cannot be cast or moved; write "bf16" or "fp16" and "offload_param" into the JSON'
REFUSED = {
    "half": (lambda engine: engine.half(), CAST),
    "bfloat16": (lambda engine: engine.bfloat16(), CAST),
    "float": (lambda engine: engine.float(), CAST),
    "to a dtype": (lambda engine: engine.to(torch.float16), CAST),
    "to a device": (lambda engine: engine.to("meta"), CAST),
    "compile": (lambda engine: engine.compile(), "compile them before the engine is made"),
    "load_state_dict": (
        lambda engine: engine.module.load_state_dict({}),
        r"load them before the engine is made, or use engine\.load_checkpoint",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_around_the_store_is_refused(make_engine, name: str):
    engine = make_engine()
    before = weights(engine)
    act, words = REFUSED[name]
    with pytest.raises(zo_offload.errors.ZOError, match=words):
        act(engine)
    assert same(weights(engine), before)
    engine.train_batch(iter([batch()]))


def test_moving_to_where_it_is_does_nothing(make_engine):
    engine = make_engine()
    assert engine.to(engine.device) is engine
    assert engine.to("cpu") is engine


def test_evaluation_leaves_an_open_window_alone(make_engine):
    plain, curious = make_engine(ds=config(gas=2)), make_engine(ds=config(gas=2))
    for i in range(2):
        for engine in (plain, curious):
            engine.backward(engine(**batch(i)).loss)
            if engine is curious:
                engine.eval()
                evaluated = engine(**batch(9)).loss
                engine.train()
                with torch.no_grad():
                    assert engine(**batch(9)).loss == evaluated
                assert engine.eval_batch(iter([batch(9), batch(9)])) == evaluated
                assert not evaluated.requires_grad
            engine.step()
    assert plain.last_result == curious.last_result
    assert same(weights(plain), weights(curious))


def test_evaluation_is_on_the_current_weights(make_engine):
    engine = make_engine()
    for step in range(3):
        engine.train_batch(iter([batch(step)]))
    plain = net().eval()
    plain.load_state_dict(engine.module.state_dict())
    with torch.no_grad():
        assert torch.equal(engine(**batch()).logits, plain(**batch()).logits)
        assert engine.eval_batch(iter([batch()])) == plain(**batch()).loss


def test_eval_batch_where_nothing_counts(make_engine):
    engine = make_engine(objective=lambda model, data, outputs: (0.0, 0))
    with pytest.raises(DivergedError, match=r"evaluation after step 0: .* add up to 0"):
        engine.eval_batch(iter([batch()]))


def test_a_plain_module_has_no_save_pretrained(make_engine, tmp_path):
    with pytest.raises(ModelError, match="Net has no save_pretrained"):
        make_engine().save_pretrained(tmp_path)


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("zo-")]


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_destroy_ends_the_threads_and_may_be_called_twice(offload: str):
    ds = config(zeroth_order={"offload_param": {"device": offload}})
    engine, *_ = zo_offload.initialize(model=net(), config=ds)
    engine.train_batch(iter([batch()]))
    assert bool(own_threads()) == (offload == "cpu")
    engine.destroy()
    assert not own_threads()
    engine.destroy()


def test_an_engine_that_cannot_be_made_leaves_no_threads(tmp_path):
    path = tmp_path / "run.journal"
    path.write_bytes(b"not a journal")
    ds = config(zeroth_order={"journal": {"path": str(path)}, "offload_param": {"device": "cpu"}})
    with pytest.raises(zo_offload.errors.JournalError, match="not a journal"):
        zo_offload.initialize(model=net(), config=ds)
    assert not own_threads()


ONE_RANK = """
import sys, torch, zo_offload
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()
engine, *_ = zo_offload.initialize(model=Net(), config={"train_batch_size": 2, "zeroth_order": {}})
engine.backward(engine(torch.ones(2, 4)))
engine.step()
print("steps", engine.global_steps)
print(*sorted({"transformers", "torch._dynamo"} & set(sys.modules)))
"""


def test_a_script_without_a_launcher_and_without_destroy_ends():
    done = subprocess.run([sys.executable, "-c", ONE_RANK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("steps 1\n\n"), "seconds of imports that it has no use for"
    assert "ld:" not in done.stderr, "a compiler was run"


class Tuples(nn.Module):
    """Returns what older models return."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x, labels=None):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        loss = x.square().mean()
        return {
            "scalar": loss,
            "tensor": x,
            "tuple with loss": (loss, x),
            "tuple of logits": (x, x.mean()),
            "dict with loss": {"loss": loss, "logits": x},
            "dict of logits": {"logits": x},
        }[self.kind]


@pytest.mark.parametrize(
    "kind",
    ["scalar", "tensor", "tuple with loss", "tuple of logits", "dict with loss", "dict of logits"],
)
def test_a_models_own_output_type_comes_back(make_engine, kind: str):
    model = Tuples(kind)
    like = model(batch()["x"])
    engine = make_engine(model)
    out = engine(batch()["x"])
    assert type(out) is type(like)
    if isinstance(out, dict):
        assert out.keys() == like.keys()
        loss = out["loss"] if "loss" in out else out["logits"].square().mean()
    elif isinstance(out, tuple):
        assert len(out) == len(like)
        loss = out[0] if out[0].numel() == 1 else out[0].square().mean()
    else:
        loss = out if out.numel() == 1 else out.square().mean()
    engine.backward(loss)
    engine.step()
    assert engine.last_result.projected_grads[0] != 0
    assert engine.last_result.loss == pytest.approx(float(loss.detach()), rel=1e-2)


class Pair(Net):
    """Gives a tuple, which has no place for a loss."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return (super().forward(*given, **named).logits,)


def test_an_output_without_a_place_for_a_loss(make_engine):
    engine = make_engine(Pair(), objective=lambda model, data, outputs: outputs[0].square().mean())
    with pytest.raises(ModelError, match="the model's output is a tuple without a place for one"):
        engine(**batch())


def test_a_loss_of_logits_has_no_shape(make_engine):
    engine = make_engine(ds=config(probes=2, zeroth_order={"fitness": "ranks"}))
    loss = engine(x=batch()["x"]).logits.square().mean()
    with pytest.raises(ModelError, match='"fitness": "ranks" shapes the losses of lanes, and this'):
        engine.backward(loss)


def test_half_of_a_forward_says_nothing(make_engine, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    division = replace(engine.stepper.division, world_size=2, probe_parallel=2)
    monkeypatch.setattr(engine.stepper, "division", division)
    with pytest.raises(ModelError, match=r"forward: what it returns .*probe_parallel 2 a rank r"):
        engine(**batch())
