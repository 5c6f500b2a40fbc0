"""``--first-order``: the same task by backprop, in the same files, and what it refuses."""

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cli.common import STEPS, Task, accuracies, assert_one_line, invoke
from zo_offload.errors import ConfigError
from zo_offload.run_first_order import batch_sizes

# Of peft and transformers, when an adapter is saved.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def write_json(path: Path, **keys) -> Path:
    path.write_text(json.dumps({"train_batch_size": 8, "zeroth_order": {}, **keys}))
    return path


def command(task: Task, output: Path, **changes) -> list[str]:
    config = write_json(output.parent / "plain.json")
    changes = {"first_order": "full", "lr": 3e-3, "config": config, "steps": 30} | changes
    return task.arguments(output, eval_every=10, **changes)


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["dev_loss"]) for row in csv.DictReader(file) if row["dev_loss"]]


def passed(done: Result) -> str:
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("what", ["full", "lora"])
def test_it_learns_and_its_model_is_measured_alike(task: Task, tmp_path: Path, what: str):
    run, data = tmp_path / "run", task.folder / "train.tsv"
    asked = command(task, run, first_order=what, dev=data, lr=1e-2)  # what is learnt by heart
    said = passed(invoke(asked))
    found = losses(run)
    assert len(found) == 4
    assert found[-1] < 0.7 * found[0]
    again = passed(invoke(task.arguments("", "eval", model=run / "model", dev=data, config=None)))
    assert f"accuracy: {accuracies(said)[1]}" in again.splitlines()
    assert f"loss: {found[-1]:.4f}" in again.splitlines()
    assert (run / "model" / "adapter_config.json").exists() == (what == "lora")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["first_order"], summary["journal"]) == (what, None)
    assert f"{run}: this run is finished (30 steps)" in passed(invoke(asked)).splitlines()


def test_micro_batches_are_one_step(task: Task, tmp_path: Path):
    """The losses of the steps are those of whole batches, as the weights in between must be."""
    model = tmp_path / "model"
    shutil.copytree(task.folder / "model", model)
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "dropout": 0.0}))
    found = []
    for name, more in (("whole", {}), ("halves", {"gradient_accumulation_steps": 2})):
        (tmp_path / name).mkdir()
        config = write_json(tmp_path / name / "a.json", gradient_clipping=0.5, **more)
        run = tmp_path / name / "run"
        passed(invoke(command(task, run, config=config, model=model, steps=6)))
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found.append([float(row["loss"]) for row in rows if row["loss"]])
        assert {row["projected_grad"] for row in rows} == {""}
        assert [float(row["lr"]) for row in rows[:-1]] == pytest.approx(
            [3e-3 * (1 - step / 6) for step in range(6)], rel=1e-4
        )
    assert len(set(found[0])) == 6
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_run_that_was_stopped_begins_anew_and_says_so(
    task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("zo_offload.run_first_order.export_model", lambda *_: 1 / 0)
        assert isinstance(invoke(command(task, run, steps=4)).exception, ZeroDivisionError)
    assert (run / "metrics.csv").exists()
    assert_one_line(invoke(command(task, run, steps=5)), "holds another run: steps was 4, is now 5")
    with caplog.at_level(logging.WARNING, "zo_offload"):
        passed(invoke(command(task, run, steps=4)))
    assert any("begins anew" in record.getMessage() for record in caplog.records)


def test_neither_takes_the_others_directory(task: Task, tmp_path: Path, finished):
    passed(invoke(command(task, tmp_path / "run", steps=2)))
    by_forwards = task.arguments(tmp_path / "run")
    assert_one_line(invoke(by_forwards), 'first_order was "full", is now null|holds another run')
    assert (tmp_path / "run" / "summary.json").exists()
    other = task.arguments(
        finished.directory, first_order="full", lr=1e-3, config=write_json(tmp_path / "a.json")
    )
    assert_one_line(invoke(other), "holds another run")
    assert json.loads((finished.directory / "summary.json").read_text())["steps"] == STEPS


REFUSED = {
    "offload": ({"zeroth_order": {"offload_param": {"device": "cpu"}}}, {}, 'device: "cpu", and'),
    "wire": ({"zeroth_order": {"wire": "int8"}}, {}, 'wire: "int8"'),
    "mode": ({"zeroth_order": {"trainable": {"mode": "low_rank"}}}, {}, '"mode": "low_rank" is no'),
    "fp16": ({"fp16": {"enabled": True}}, {}, "fp16: --first-order scales no loss"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler: the rate of --first-order"),
    "rate": ({}, {"lr": None}, "--lr: missing: the rate of an optimizer"),
    "objective": ({}, {"objective": "accuracy"}, "--objective: accuracy has no gradient"),
    "steps": ({}, {"steps": 0}, "--steps: expected 1 to"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(task: Task, tmp_path: Path, name: str):
    keys, changes, words = REFUSED[name]
    config = write_json(tmp_path / "a.json", **keys)
    asked = command(task, tmp_path / "run", **{"config": config, **changes})
    assert_one_line(invoke(asked), words)
    assert not (tmp_path / "run").exists()


def test_several_ranks_are_refused(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zo_offload.run_first_order.launched.num_ranks", lambda: 2)
    assert_one_line(invoke(command(task, tmp_path / "run")), "trains on one rank, found 2")


def test_a_rate_of_ones_own_is_for_backprop(task: Task, tmp_path: Path):
    assert_one_line(invoke(task.arguments(tmp_path / "run", lr=1e-3)), "--lr: goes with --first-o")


def test_an_adapter_is_not_trained_whole(task: Task, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(task.folder / "model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path / "adapter")
    )
    asked = command(task, tmp_path / "run", model=tmp_path / "adapter")
    assert_one_line(invoke(asked), "adapter: is an adapter; train it by --first-order lora")


def test_a_converted_model_is_not_held_in_memory(task: Task, tmp_path: Path):
    base = tmp_path / "base"
    passed(invoke(["convert", "--model", f"{task.folder / 'model'}", "--output", f"{base}"]))
    asked = command(task, tmp_path / "run", model=base)
    words = f"{base}: a converted model's weights stay .*; give the model that was converted"
    assert_one_line(invoke(asked), words)
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_no_number_ends_it(task: Task, tmp_path: Path):
    done = invoke(command(task, tmp_path / "run", lr=1e30))
    assert_one_line(done, r"step 1: the loss is (nan|inf); lower --lr, or look at its data")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("config", [{}, {"train_batch_size": "auto"}, {"train_batch_size": 7,
    "train_micro_batch_size_per_gpu": 2}])  # fmt: skip
def test_batch_sizes_that_do_not_go_together(config):
    with pytest.raises(ConfigError, match=r"^train_batch_size: "):
        batch_sizes(config)
