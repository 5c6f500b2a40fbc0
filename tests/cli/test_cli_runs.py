"""A run from beginning to end, and everything that it leaves behind."""

import csv
import json
import re
import shutil
import struct

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.common import (
    EVAL_EVERY,
    LABELS,
    STEPS,
    TEMPLATE,
    accuracies,
    assert_one_line,
    invoke,
    make_model,
    results,
    tree,
    write_tsv,
)
from zo_offload.config import load_json
from zo_offload.journal import Journal
from zo_offload.tasks import read_examples


def plain_accuracy(directory, dev) -> float:
    """By transformers alone, one example at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    words = [f" {word.strip()}" for word in LABELS.split(",")]
    options = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    hits = []
    for example in read_examples(dev):
        ids = tokenizer(TEMPLATE.format(**example.fields), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, -1, options]
        hits.append(int(scores.argmax()) == int(example.label))
    return sum(hits) / len(hits)


def test_the_files_of_a_run(finished):
    files = set(tree(finished.directory))
    assert files - {name for name in files if name.startswith("model/")} == {
        ".lock", "curve.png", "journal", "journal/run.journal", "metrics.csv", "model",
        "run.json", "summary.json", "telemetry.jsonl",
    }  # fmt: skip
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= files


def test_the_lines_that_scripts_read(finished):
    assert all(re.fullmatch(r"[01]\.\d{4}", value) for value in accuracies(finished.stdout))


def test_the_exported_model_scores_the_printed_accuracy(task, finished):
    before, after = accuracies(finished.stdout)
    dev = task.folder / "dev.tsv"
    assert f"{plain_accuracy(task.folder / 'model', dev):.4f}" == before
    assert f"{plain_accuracy(finished.directory / 'model', dev):.4f}" == after


def test_a_journal_that_is_ahead_of_what_is_asked_stays(task, finished, tmp_path):
    """As one that was named in the JSON, and brought here from a longer run."""
    run, journal = tmp_path / "run", tmp_path / "run" / "journal" / "run.journal"
    asked = task.arguments(run, steps=2, eval_every=None)
    assert invoke(asked).exit_code == 0
    (run / "summary.json").unlink()  # as if it were not finished
    shutil.copyfile(finished.directory / "journal" / "run.journal", journal)
    before = journal.read_bytes()
    words = (
        f"--steps: {journal} holds {STEPS} already, found 2; give at least that many, or another "
        "--output"
    )
    assert_one_line(invoke(asked), words)
    assert journal.read_bytes() == before


def test_eval_prints_the_same_accuracy(task, finished):
    for model, expected in zip(
        (task.folder / "model", finished.directory / "model"),
        accuracies(finished.stdout),
        strict=True,
    ):
        done = invoke(task.arguments("", "eval", model=model))
        assert done.exit_code == 0, done.output
        assert f"accuracy: {expected}" in done.stdout.splitlines()
        assert "examples: 17" in done.stdout.splitlines()


def test_training_moved_the_weights(task, finished):
    base = (task.folder / "model" / "model.safetensors").read_bytes()
    assert base != finished.results.weights
    assert len(base) == len(finished.results.weights)


def test_metrics_have_a_row_a_step_and_the_evaluations(finished):
    with (finished.directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(STEPS + 1))
    records = Journal.read(finished.directory / "journal" / "run.journal").records
    for row, record in zip(rows, records, strict=False):
        assert float(row["loss"]) == pytest.approx(sum(record.losses) / 2, abs=1e-6)
        assert float(row["lr"]) == pytest.approx(record.lr, rel=1e-5)
        assert float(row["projected_grad"]) == pytest.approx(
            record.probes[0].projected_grad, rel=1e-5
        )
        assert float(row["seconds"]) > 0
    assert [int(row["step"]) for row in rows if row["accuracy"]] == list(
        range(0, STEPS + 1, EVAL_EVERY)
    )
    before, after = accuracies(finished.stdout)
    assert f"{float(rows[0]['accuracy']):.4f}" == before
    assert f"{float(rows[-1]['accuracy']):.4f}" == after
    assert rows[-1]["loss"] == ""


def test_the_rate_falls_to_nothing(finished):
    records = Journal.read(finished.directory / "journal" / "run.journal").records
    assert [r.lr for r in records] == pytest.approx([1e-2 * (1 - i / STEPS) for i in range(STEPS)])


def test_the_curve_is_a_picture(finished):
    content = (finished.directory / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (960, 540)


def test_the_paths_in_the_summary_are_there(finished):
    for name in ("model directory", "journal", "metrics", "curve"):
        (line,) = [x for x in finished.stdout.splitlines() if x.startswith(f"  {name} ")]
        path = line.removeprefix(f"  {name}").strip()
        assert path in {str(p) for p in [*finished.directory.rglob("*")]}


def test_a_path_with_brackets_and_blanks(task, tmp_path):
    output = tmp_path / "run [bold] of a very long name that no table of eighty columns holds" / "x"
    done = invoke(task.arguments(f"{output}/", steps=1, eval_every=None))
    assert done.exit_code == 0, done.output
    assert f"  model directory        {output}/model" in done.stdout.splitlines()
    again = invoke(task.arguments(f"{output}/", steps=1, eval_every=None))
    assert f"{output}/: this run is finished (1 steps)" in again.stdout.splitlines()


def test_the_same_command_says_that_the_run_is_finished(task, finished):
    before = tree(finished.directory)
    done = invoke(task.arguments(finished.directory))
    assert done.exit_code == 0, done.output
    assert f"{finished.directory}: this run is finished ({STEPS} steps)" in done.stdout
    assert accuracies(done.stdout) == accuracies(finished.stdout)
    assert tree(finished.directory) == before


def test_the_same_run_elsewhere_has_the_same_bits(task, finished, tmp_path):
    done = invoke(task.arguments(tmp_path / "run"))
    assert results(tmp_path / "run", done.stdout) == finished.results


CHANGES = {
    "steps": ({"steps": 9}, "steps was 6, is now 9"),
    "template": ({"template": "{sentence} was"}, "template was"),
    "labels": ({"labels": " dull, wise"}, "labels was"),
    "eval_every": ({"eval_every": None}, "eval_every was 2, is now null"),
    "dev_limit": ({"dev_limit": 3}, "dev_limit was null, is now 3"),
    "config": ({"config": None}, r"config\.\w+.* was .*, is now "),
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_command_is_refused_by_name(task, finished, key: str):
    before = tree(finished.directory)
    changes, words = CHANGES[key]
    done = invoke(task.arguments(finished.directory, **changes))
    assert_one_line(done, f"holds another run: {words}")
    assert tree(finished.directory) == before


def test_changed_data_is_another_run(task, tmp_path):
    data = tmp_path / "train.tsv"
    write_tsv(data, 8)
    command = task.arguments(tmp_path / "run", train=data, steps=1, eval_every=None)
    assert invoke(command).exit_code == 0
    write_tsv(data, 9)
    assert_one_line(invoke(command), "holds another run: content of train")


def test_a_change_deep_in_the_config_is_named(task, finished, tmp_path):
    changed = load_json(task.folder / "ds.json")
    changed["zeroth_order"]["eps"] = 0.5
    (tmp_path / "ds.json").write_text(json.dumps(changed))
    done = invoke(task.arguments(finished.directory, config=tmp_path / "ds.json"))
    assert_one_line(done, "config.zeroth_order.eps was null, is now 0.5; give the same command")


def test_a_run_without_a_config(task, tmp_path):
    done = invoke(task.arguments(tmp_path / "run", config=None, steps=1, eval_every=None))
    assert done.exit_code == 0, done.output


def edited(task, tmp_path, **more) -> str:
    config = load_json(task.folder / "ds.json")
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    (tmp_path / "edited.json").write_text(json.dumps(config))
    return str(tmp_path / "edited.json")


def rates(path) -> list[float]:
    return [record.lr for record in Journal.read(path).records]


def test_an_adapter_without_a_config_learns(task, tmp_path):
    """Its rows by heart."""
    base = AutoModelForCausalLM.from_pretrained(task.folder / "model")
    torch.manual_seed(0)
    peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    AutoTokenizer.from_pretrained(task.folder / "model").save_pretrained(tmp_path / "adapter")
    given = {"model": tmp_path / "adapter", "config": None, "dev": task.folder / "train.tsv"}
    done = invoke(task.arguments(tmp_path / "run", steps=60, eval_every=60, **given))
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss_after"] < summary["loss_before"] - 0.1
    journal = Journal.read(tmp_path / "run" / "journal" / "run.journal")
    assert {len(record.probes) for record in journal.records} == {4}


def test_a_journal_of_ones_own_at_a_relative_path(task, tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    config = edited(task, tmp_path, zeroth_order={"journal": {"path": "logs/my.journal"}})
    command = task.arguments("runs/one", config=config)
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert "  journal                logs/my.journal" in done.stdout.splitlines()
    assert len(rates("logs/my.journal")) == STEPS
    assert (tmp_path / "logs" / "my.journal").read_bytes() == finished.results.journal
    assert not (tmp_path / "runs" / "one" / "journal").exists()
    before = tree(tmp_path)
    other = invoke(task.arguments("runs/two", config=config))
    assert_one_line(other, r"journal.path: logs/my.journal exists already, from another run")
    assert tree(tmp_path) == before
    evaluated = invoke(task.arguments("", "eval", config=config))
    assert f"accuracy: {finished.results.accuracies[0]}" in evaluated.stdout.splitlines()
    assert tree(tmp_path) == before


def test_a_scheduler_in_the_config(task, tmp_path):
    params = {"warmup_num_steps": 4, "warmup_max_lr": 0.5, "warmup_type": "linear"}
    config = edited(task, tmp_path, scheduler={"type": "WarmupLR", "params": params})
    done = invoke(task.arguments(tmp_path / "run", config=config))
    assert done.exit_code == 0, done.output
    found = rates(tmp_path / "run" / "journal" / "run.journal")
    assert found[1:] == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert "Attempting" not in done.output


def test_auto_where_the_trainer_would_fill_it(task, tmp_path):
    config = edited(task, tmp_path, train_batch_size="auto")
    done = invoke(task.arguments(tmp_path / "run", config=config))
    assert_one_line(done, 'train_batch_size: "auto" is filled in by the Trainer')
    config = edited(task, tmp_path, optimizer={"params": {"lr": "auto"}})
    done = invoke(task.arguments(tmp_path / "run", config=config, steps=1, eval_every=None))
    assert done.exit_code == 0, done.output
    assert rates(tmp_path / "run" / "journal" / "run.journal") == [1e-6]


def test_accumulation_in_the_config(task, finished, tmp_path):
    config = edited(task, tmp_path, train_batch_size=4, gradient_accumulation_steps=2)
    done = invoke(task.arguments(tmp_path / "run", config=config))
    assert done.exit_code == 0, done.output
    assert len(rates(tmp_path / "run" / "journal" / "run.journal")) == STEPS
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    whole = [float(line.split(",")[1]) for line in finished.results.metrics[1:-1]]
    assert losses == pytest.approx(whole, abs=2e-3)  # the same examples, in two halves


def test_fewer_examples_than_a_batch(task, tmp_path):
    data = tmp_path / "train.tsv"
    write_tsv(data, 3)
    done = invoke(task.arguments(tmp_path / "run", train=data, steps=2, eval_every=None))
    assert done.exit_code == 0, done.output
    assert "Warning: train_batch_size: 4 examples a step, and --train holds 3" in done.stderr


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision(task, tmp_path, name: str):
    config = edited(task, tmp_path, **{name: {"enabled": True}})
    done = invoke(task.arguments(tmp_path / "run", config=config, steps=2, eval_every=None))
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    again = invoke(task.arguments("", "eval", model=tmp_path / "run" / "model", config=config))
    assert f"accuracy: {accuracies(done.stdout)[1]}" in again.stdout.splitlines()


def test_a_checkpoint_in_half_precision(task, tmp_path):
    make_model(tmp_path / "model", torch.bfloat16)
    done = invoke(
        task.arguments(tmp_path / "run", model=tmp_path / "model", steps=2, eval_every=None)
    )
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_labels_of_several_tokens(task, tmp_path):
    labels = '[" dull and long", " warm"]'
    done = invoke(task.arguments(tmp_path / "run", labels=labels, steps=2, eval_every=None))
    assert done.exit_code == 0, done.output
    again = invoke(
        task.arguments("", "eval", model=tmp_path / "run" / "model", labels=labels, config=None)
    )
    assert f"accuracy: {accuracies(done.stdout)[1]}" in again.stdout.splitlines()


def test_truncation(task, tmp_path):
    data = tmp_path / "long.tsv"
    data.write_text("sentence\tlabel\n" + "film " * 40 + "\t0\nwarm\t1\n")
    given = {"train": data, "dev": data, "steps": 1, "eval_every": None}
    assert_one_line(
        invoke(task.arguments(tmp_path / "run", **given)), "43 tokens, and the model has 24 positio"
    )
    command = [*task.arguments(tmp_path / "run", **given), "--truncate"]
    assert invoke(command).exit_code == 0


def test_help_names_every_option():
    for command in ("train", "eval"):
        done = invoke([command, "--help"])
        assert done.exit_code == 0
        for option in ("--model", "--dev", "--template", "--labels", "--config", "--truncate"):
            assert option in done.stdout
        assert "local" not in done.stdout
