"""Tasks from the command line: trained, measured, continued, refused."""

import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli.common import assert_one_line, invoke
from transformers import AutoModelForCausalLM, OPTConfig

from tasks.suite_rows import DATA, ROWS
from zo_offload import run
from zo_offload.errors import ConfigError
from zo_offload.reporter import Reporter
from zo_offload.run import RunOptions
from zo_offload.run_data import recorded
from zo_offload.run_task import Task
from zo_offload.tasks import batch_at, exact_match_of

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "task"
CONTEXT = 512


@dataclass(frozen=True)
class Made:
    """A model that was taught the documented example's answers, and a JSON."""

    model: Path
    config: Path

    def command(self, name: str, *more: Any) -> list[str]:
        options = [f"--model={self.model}", f"--config={self.config}"]
        return [name, *options, *map(str, more)]


@pytest.fixture(scope="session")
def made(make_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.pad_token = tokenizer.eos_token
    shape = OPTConfig(
        vocab_size=300,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    rows = [json.loads(line) for line in (EXAMPLE / "train.jsonl").read_text().splitlines()]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}\n" for row in rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(shape)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(100):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = {
        "train_batch_size": 4,
        "zeroth_order": {"eps": 1e-3, "offload_param": {"device": "cpu"}},
        "optimizer": {"type": "ZO", "params": {"lr": 1e-4}},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    return Made(folder / "model", folder / "ds.json")


def values(output: str) -> dict[str, float]:
    pairs = re.findall(r"^(\w+(?: before| after)?): ([\d.]+)$", output, re.MULTILINE)
    return {name: float(value) for name, value in pairs}


def plain_exact_match(model: Path) -> float:
    """By transformers alone, one question at a time."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    plain: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = [json.loads(line) for line in (EXAMPLE / "train.jsonl").read_text().splitlines()]
    hits = []
    for row in rows:
        ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")["input_ids"]
        new = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
        hits.append(exact_match_of(text, [row["answer"]]))
    return sum(hits) / len(hits)


def test_answers_are_generated_and_matched(made: Made):
    task = f"--task={EXAMPLE / 'colours.toml'}"
    seen = invoke(made.command("eval", task, f"--data={EXAMPLE / 'train.jsonl'}"))
    assert seen.exit_code == 0, seen.output
    found = values(seen.stdout)
    assert found["exact_match"] == pytest.approx(plain_exact_match(made.model), abs=1e-4)
    assert found["exact_match"] > 0.9
    assert (found["f1"], found["examples"]) == (found["exact_match"], 12)
    unseen = values(invoke(made.command("eval", task)).stdout)
    assert unseen["examples"] == 6
    assert unseen["exact_match"] < found["exact_match"]


def test_a_generation_task_is_trained_and_continued(made: Made, tmp_path: Path):
    task = [f"--task={EXAMPLE / 'colours.toml'}", "--steps=3", "--eval-every=2"]
    command = made.command("train", *task, f"--output={tmp_path / 'run'}")
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert set(values(done.stdout)) == {"exact_match before", "exact_match after"}
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,loss,lr,projected_grad,seconds,exact_match,dev_loss"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "exact_match"
    asked = json.loads((tmp_path / "run" / "run.json").read_text())
    assert asked["task"].endswith("colours.toml")
    assert {"examples of train (sha256)", "content of task (sha256)"} <= set(asked)
    journal = (tmp_path / "run" / "journal" / "run.journal").read_bytes()

    (tmp_path / "run" / "summary.json").unlink()
    again = invoke(command)
    assert again.exit_code == 0, again.output
    assert values(again.stdout) == values(done.stdout)
    assert (tmp_path / "run" / "journal" / "run.journal").read_bytes() == journal
    other = made.command("train", *task, "--data-seed=1", f"--output={tmp_path / 'run'}")
    assert_one_line(invoke(other), "holds another run: data_seed was 0, is now 1")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_task_is_measured_from_its_own_files(made: Made, row):
    """With a demonstration, and (of DROP, whose prompts are long) the room that it leaves."""
    command = made.command("eval", f"--task={row.name}", f"--data={DATA}", "--shots=1")
    done = invoke([*command, "--max-new-tokens=5"] if row.references else command)
    assert done.exit_code == 0, done.output
    assert set(row.metrics) <= set(values(done.stdout))
    assert values(done.stdout)["examples"] >= 1


@pytest.mark.parametrize("name", ["copa", "multirc"])
def test_choices_and_words_are_trained(made: Made, tmp_path: Path, name: str):
    more = ["--num-train=1", "--num-dev=1", "--steps=2", f"--output={tmp_path / 'run'}"]
    done = invoke(made.command("train", f"--task={name}", f"--data={DATA}", *more))
    assert done.exit_code == 0, done.output
    assert set(values(done.stdout)) == {"accuracy before", "accuracy after"}


def test_demonstrations_that_do_not_fit_are_said(made: Made, caplog: pytest.LogCaptureFixture):
    command = made.command("eval", "--task=squad", f"--data={DATA}", "--shots=2")
    done = invoke([*command, "--max-new-tokens=270"])
    assert done.exit_code == 0, done.output
    (line,) = [record.getMessage() for record in caplog.records if "--shots" in record.getMessage()]
    assert "2 demonstrations fit before 0 of 1 examples" in line


def test_demonstrations_before_a_prompt_of_ones_own(made: Made):
    files = [f"--dev={DATA / 'SST-2/dev.tsv'}", f"--train={DATA / 'SST-2/train.tsv'}"]
    prompt = ["--template={sentence} It was", "--labels= terrible, great"]
    zero = values(invoke(made.command("eval", *files[:1], *prompt)).stdout)
    done = invoke(made.command("eval", *files, *prompt, "--shots=3"))
    assert done.exit_code == 0, done.output
    assert values(done.stdout)["loss"] != zero["loss"]


REFUSED = {
    "nothing": ([], "--dev, --template, --labels: missing; give --dev, --template, "),
    "a prompt beside a task": (
        ["--task=copa", "--template={a}"], "--template: not beside --task, which has its own"),
    "data without a task": (["--data=x"], "--data: goes with --task, which is not given"),
    "a split without a task": (
        ["--split=test", f"--dev={DATA / 'SST-2/dev.tsv'}", "--template={sentence}",
         "--labels=a,b"], "--split: goes with --task; --dev names what is measured"),
    "an unknown task": (["--task=sst3"], "'sst3' is neither a file nor .*did you mean 'sst-2'"),
    "no data and no network": (["--task=copa"], "aps/super_glue could not be fetched"),
    "no such directory": (["--task=copa", "--data=/nowhere"], "/nowhere: no such file or dir"),
    "nothing is generated": (
        ["--task=copa", f"--data={DATA}", "--max-new-tokens=3"], "COPA generates nothing"),
    "too many shots": (
        ["--task=copa", f"--data={DATA}", "--shots=9"], "--shots: 2 examples to draw fr"),
    "shots of what is measured": (
        ["--task=copa", f"--data={DATA / 'COPA/val.jsonl'}", "--shots=1"],
        "--shots: demonstrations would be drawn from the examples that are measured"),
    "shots of nothing": (
        [f"--dev={DATA / 'SST-2/dev.tsv'}", "--template={sentence}", "--labels=a,b", "--shots=1"],
        "--shots: demonstrations are drawn from --train, which is not given"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_model_is_touched(
    made: Made, tmp_path: Path, options: list[str], message: str
):
    gone = Made(tmp_path / "none", made.config)
    assert_one_line(invoke(gone.command("eval", *options)), message)


def test_a_run_from_before_there_were_tasks_is_the_same_run():
    options = RunOptions("m", "d.tsv", "{a}", "x,y", train="t.tsv", steps=3, output="o")
    before = {
        "model": "m", "dev": "d.tsv", "template": "{a}", "labels": "x,y", "config": None,
        "truncate": False, "dev_limit": None, "train": "t.tsv", "steps": 3, "output": "o",
        "eval_every": None,
    }  # fmt: skip
    assert recorded(options, "shuffled") == before
    assert recorded(options, "stratified") == {**before, "order": "stratified"}


def test_an_order_by_class_needs_classes(tmp_path: Path):
    options = RunOptions("m", task="copa", data=str(DATA), order="stratified", num_dev=1)
    with pytest.raises(ConfigError, match="--order stratified: for examples of a few classes"):
        Task(options, training=True)
    assert Task(replace(options, order=None), training=True).order == "shuffled"
    by_class = replace(options, task="sst-2", order=None)
    assert Task(by_class, training=True).order == "stratified"
    assert Task(replace(by_class, order="shuffled"), training=True).order == "shuffled"


def labelled(made: Made, folder: Path, rows: list[str]) -> RunOptions:
    """A run on sentences with labels, the same ones to learn from and to measure."""
    path = folder / "rows.tsv"
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    prompt = {"template": "{sentence} It was", "labels": " bad, good"}
    return replace(RunOptions(str(made.model), train=str(path), dev=str(path)), **prompt)


def test_batches_hold_classes_in_proportion(tmp_path: Path, made: Made):
    rows = [f"a film {index}\t{int(index % 4 == 0)}" for index in range(32)]
    options = labelled(made, tmp_path, rows)
    task = Task(options, training=True)
    task.encode(Reporter())
    assert task.classes is not None
    for step in range(8):
        batch = batch_at(7, step, 8, 32, task.classes)
        assert sum(task.train[index].target for index in batch) == 2
    plain = Task(replace(options, order="shuffled"), training=True)
    plain.encode(Reporter())
    assert plain.classes is None


def test_micro_batches_are_of_like_length(tmp_path: Path, made: Made):
    """And hold together what one batch would."""
    rows = [f"a film {'and so on ' * (index * 7 % 9)}\t{index % 2}" for index in range(16)]
    options = labelled(made, tmp_path, rows)
    task = Task(options, training=True)
    task.encode(Reporter())

    def lengths(size: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
        engine = SimpleNamespace(
            stepper=SimpleNamespace(
                config=SimpleNamespace(seed=3),
                division=SimpleNamespace(data_rank=rank, num_data_ranks=ranks),
            ),
            train_batch_size=lambda: 8,
            train_micro_batch_size_per_gpu=lambda: size,
        )
        found = run.micro_batches(engine, task, step=0)
        return [batch["attention_mask"].sum(dim=1).tolist() for batch in found]

    (whole,), quarters = lengths(8), lengths(2)  # a row an option
    assert whole != sorted(whole)
    assert sorted(length for each in quarters for length in each) == sorted(whole)
    assert all(max(a) <= max(b) for a, b in itertools.pairwise(quarters))
    assert max(quarters[0]) < max(quarters[-1])
    assert [*lengths(2, 0, 2), *lengths(2, 1, 2)] == [*quarters[0::2], *quarters[1::2]]
