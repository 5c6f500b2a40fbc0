"""The same through DeepSpeed's engine, the Trainer's stand-in, the command line, and on ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import peft
import pytest
import torch
import transformers
from cli.common import LABELS, TEMPLATE, Task, accuracies, assert_one_line, invoke, make_task
from distributed import worker
from distributed.launch import run
from engine.common import config, opt, same, tokens, weights
from engine.conftest import make_engine

import zo_offload
from trainable.modes import MODES, lora, written_mask
from zo_offload.config import load_json
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.loss_noise import LossNoise
from zo_offload.reporter import Reporter
from zo_offload.run import evaluate_model
from zo_offload.run_task import TaskOptions

__all__ = ["make_engine"]
Make = Callable[..., Any]


def settings(trainable: dict[str, Any], **more: Any) -> dict[str, Any]:
    block = {"trainable": trainable, "offload_param": {"device": "cpu"}, **more}
    return config(zeroth_order=block)


def sparse() -> dict[str, Any]:
    """Of the engine's model."""
    return {"mode": "sparse", "mask": str(written_mask(model=opt))}


@pytest.mark.parametrize(
    ("trainable", "more"),
    [
        (lora(), {}),
        (MODES["rotate"].trainable, {}),
        (sparse(), {}),
        (MODES["low-rank"].trainable, {}),
        ({"mode": "scales"}, {"wire": "int4"}),
    ],
    ids=["lora", "rotate", "sparse", "low-rank", "scales"],
)
def test_an_engine_saves_and_goes_on(
    make_engine: Make, tmp_path: Path, trainable: dict, more: dict
):
    said = settings(trainable, **more)
    first = make_engine(opt(), said)
    for step in range(2):
        first.train_batch(iter([tokens(step)]))
    first.save_checkpoint(tmp_path / "tags")
    second = make_engine(opt(), said)
    second.load_checkpoint(tmp_path / "tags")
    assert second.global_steps == 2
    for engine in (first, second):
        engine.train_batch(iter([tokens(2)]))
    assert same(weights(first), weights(second))


def test_an_engine_wraps_the_model_and_writes_its_adapter(make_engine: Make, tmp_path: Path):
    engine = make_engine(opt(), settings(lora()))
    assert isinstance(engine.module, peft.PeftModel)
    engine.train_batch(iter([tokens(0)]))
    engine.save_pretrained(tmp_path / "adapter")
    engine.eval()
    expected = engine(**tokens(1)).loss
    loaded = peft.PeftModel.from_pretrained(opt(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tokens(1)).loss, expected)
    again = make_engine(
        loaded.unload(), settings({"mode": "peft", "adapter": str(tmp_path / "adapter")})
    )
    again.eval()
    assert torch.equal(again(**tokens(1)).loss, expected)


def test_weights_of_another_mask_are_refused(make_engine: Make, tmp_path: Path):
    """Masks of one size: only their places differ."""
    first, second = (
        {"mode": "sparse", "mask": str(written_mask(every, opt))} for every in (32, 64)
    )
    engine = make_engine(opt(), settings(first))
    engine.train_batch(iter([tokens(0)]))
    engine.save_checkpoint(tmp_path)
    other = make_engine(opt(), settings(second))
    with pytest.raises(CheckpointError):
        other.load_checkpoint(tmp_path, load_module_only=True)
    again = make_engine(opt(), settings(first))
    again.load_checkpoint(tmp_path, load_module_only=True)
    assert same(weights(again), weights(engine))


def test_what_an_engine_writes_of_chosen_weights_is_a_plain_model(
    make_engine: Make, tmp_path: Path
):
    engine = make_engine(opt(), settings(sparse()))
    for step in range(2):
        engine.train_batch(iter([tokens(step)]))
    engine.save_pretrained(tmp_path / "plain")
    engine.eval()
    expected = engine(**tokens(1)).loss
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tokens(1)).loss, expected)
        assert not torch.equal(opt().eval()(**tokens(1)).loss, expected)


def test_an_adapter_in_the_json_of_a_trainer_is_refused(make_engine: Make):
    zo_offload.install()
    try:
        with pytest.raises(ConfigError, match=r"Trainer\(model=get_peft_model"):
            deepspeed.initialize(model=opt(), config=settings(lora()))
        adapted = peft.get_peft_model(opt(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
        engine: Any
        engine: Any = deepspeed.initialize(model=adapted, config=settings({"mode": "peft"}))[0]
        assert engine.stepper.trainable.mode == "peft"
        engine.destroy()
    finally:
        zo_offload.uninstall()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    made = make_task(tmp_path_factory.mktemp("task"))
    ds = load_json(made.folder / "ds.json")
    ds["zeroth_order"]["trainable"] = lora()
    (made.folder / "ds.json").write_text(json.dumps(ds))
    return made


def test_a_command_trains_an_adapter_and_evaluates_it(task: Task, tmp_path: Path):
    done = invoke(task.arguments(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    _, after = accuracies(done.stdout)
    adapter = tmp_path / "run" / "model"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()
    for json_file in (None, task.folder / "ds.json"):
        found = invoke(task.arguments("", "eval", model=adapter, config=json_file))
        assert f"\naccuracy: {after}\n" in found.stdout, found.output
    (adapter / "adapter_config.json").write_text("{}")
    assert_one_line(
        invoke(task.arguments("", "eval", model=adapter)), "adapter_config.json: cannot be read"
    )


@pytest.mark.parametrize("mode", ["sparse", "scales"])
def test_what_a_command_has_written_is_not_packed_again(tmp_path: Path, mode: str):
    """Groups would take new scales; and the mask is of no more use."""
    made = make_task(tmp_path / "task")
    mask = written_mask(model=lambda: load_causal_lm(str(made.folder / "model")))
    ds = load_json(made.folder / "ds.json")
    chosen = {"sparse": {"mode": mode, "mask": str(mask)}, "scales": {"mode": mode}}[mode]
    ds["zeroth_order"] |= {"wire": "int4", "trainable": chosen, "eps": 1e-3}
    ds["optimizer"]["params"]["lr"] = 1e-4
    (made.folder / "ds.json").write_text(json.dumps(ds))
    done = invoke(made.arguments(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    mask.unlink()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = tmp_path / "run" / "model"
    for ds_json in (None, str(made.folder / "ds.json")):
        options = TaskOptions(
            str(model), str(made.folder / "dev.tsv"), TEMPLATE, LABELS, config=ds_json
        )
        found = evaluate_model(options, Reporter())
        assert found.accuracy == pytest.approx(summary["accuracy_after"], abs=1e-9)
        assert found.loss == pytest.approx(summary["loss_after"], abs=2e-6)  # it has six digits
    (model / "zo_offload.json").write_text("{}")
    assert_one_line(
        invoke(made.arguments("", "eval", model=model, config=made.folder / "ds.json")),
        "zo_offload.json: damaged",
    )


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [
        {"trainable": lora()},
        {"trainable": sparse(), "wire": "int8"},
        {"trainable": {"mode": "scales"}, "wire": "int4"},
        {"trainable": {"mode": "low_rank", "interval": 2, "momentum": 0.5}},
    ],
    ids=["lora", "sparse", "scales", "low-rank"],
)
def test_two_ranks_end_in_the_bits_of_one(tmp_path: Path, block: dict):
    ds = config(zeroth_order={**block, "seed": 5}, train_batch_size=8)
    ds["train_micro_batch_size_per_gpu"] = 2
    del ds["gradient_accumulation_steps"]
    job = {"config": ds, "steps": 3, "out": str(tmp_path)}
    engine, loader = worker.start(job)
    try:
        engine.loss_noise = LossNoise(0.0, 1.0)
        for _ in worker.steps(engine, loader, job):
            pass
        alone = worker.digest(engine)
    finally:
        engine.destroy()
    assert [report["weights"] for report in run("none", 2, job)] == [alone, alone]
