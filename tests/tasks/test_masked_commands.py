"""A RoBERTa from the command line: measured, trained, exported, continued, refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.common import assert_one_line, invoke
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaForMaskedLM

from tasks.masked_models import make_masked_lm, make_masked_tokenizer
from tasks.masked_rows import DATA, MASKED_ROWS
from zo_offload.integrations.hf import limits, load_model
from zo_offload.integrations.model_kind import kind_of, kind_of_config

GOOD, BAD = ("warm", "wise", "great"), ("dull", "long", "terrible")
STEPS = 40


@dataclass(frozen=True)
class Made:
    folder: Path

    def command(self, name: str, *more: Any) -> list[str]:
        options = [f"--model={self.folder / 'model'}", f"--config={self.folder / 'cpu.json'}"]
        return [name, *options, *map(str, more)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random RoBERTa, a set of sentences in GLUE's form, and two JSONs."""
    folder = tmp_path_factory.mktemp("masked")
    make_masked_lm("Roberta").save_pretrained(folder / "model")
    make_masked_tokenizer().save_pretrained(folder / "model")
    for device in ("none", "cpu"):
        config = {
            "train_batch_size": 32,
            "zeroth_order": {"eps": 1e-3, "probes": 4, "offload_param": {"device": device}},
            "optimizer": {"type": "ZO", "params": {"lr": 2e-2}},
        }
        (folder / f"{device}.json").write_text(json.dumps(config))
    write_sentences(folder / "train.tsv", 80)
    write_sentences(folder / "dev.tsv", 40)
    return Made(folder)


def write_sentences(path: Path, count: int) -> None:
    chosen = torch.Generator().manual_seed(count)
    lines = ["sentence\tlabel"]
    for at in range(count):
        words = GOOD if at % 2 else BAD
        one, two = torch.randint(3, (2,), generator=chosen).tolist()
        lines.append(f"the film was {words[one]} and {words[two]} \t{at % 2}")
    path.write_text("\n".join(lines) + "\n")


def values(output: str) -> dict[str, float]:
    pairs = re.findall(r"^(\w+(?: before| after)?): ([\d.]+)$", output, re.MULTILINE)
    return {name: float(value) for name, value in pairs}


@pytest.fixture(scope="module")
def trained(made: Made) -> Path:
    directory = made.folder / "run"
    options = ["--task=SST-2", f"--data={made.folder}", f"--steps={STEPS}", "--eval-every=20"]
    done = invoke(made.command("train", *options, f"--output={directory}"))
    assert done.exit_code == 0, done.output
    (directory / "stdout").write_text(done.stdout)
    return directory


@torch.no_grad()
def plain(directory: Path, data: Path) -> tuple[float, float]:
    """Accuracy and loss by transformers alone."""
    model: Any = AutoModelForMaskedLM.from_pretrained(directory).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (
        " terrible", " great")]  # fmt: skip
    rows = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    texts = [f"{sentence.strip()} It was <mask>." for sentence, _ in rows]
    labels = torch.tensor([int(label) for _, label in rows])
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    masks = inputs["input_ids"] == tokenizer.mask_token_id
    logits = model(**inputs).logits[masks][:, words]
    right = (logits.argmax(dim=1) == labels).float().mean()
    return right.item(), functional.cross_entropy(logits, labels).item()


def test_zero_shot_is_what_transformers_says(made: Made):
    found = invoke(made.command("eval", "--task=sst2", f"--data={made.folder}"))
    assert found.exit_code == 0, found.output
    accuracy, loss = plain(made.folder / "model", made.folder / "dev.tsv")
    assert values(found.stdout)["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert values(found.stdout)["loss"] == pytest.approx(loss, abs=1e-4)
    assert values(found.stdout)["examples"] == 40


def test_it_learns(made: Made, trained: Path):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["loss_after"] < 0.7 * summary["loss_before"]
    assert summary["accuracy_after"] >= 0.9 > 0.7 > summary["accuracy_before"]
    asked = json.loads((trained / "run.json").read_text())
    assert asked["task"] == "SST-2"
    assert "kind" not in asked
    command = ["eval", f"--model={trained / 'model'}", "--task=sst2", f"--data={made.folder}"]
    found = values(invoke(command).stdout)
    assert found["accuracy"] >= 0.9
    exported = json.loads((trained / "model" / "config.json").read_text())
    assert exported["architectures"] == ["RobertaForMaskedLM"]
    accuracy, loss = plain(trained / "model", made.folder / "dev.tsv")
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert found["loss"] == pytest.approx(loss, abs=1e-4)


def test_where_the_weights_rest_changes_no_bit(made: Made, trained: Path, tmp_path: Path):
    options = ["--task=SST-2", f"--data={made.folder}", f"--steps={STEPS}", "--eval-every=20"]
    command = made.command("train", *options, f"--output={tmp_path / 'run'}")
    command[2] = f"--config={made.folder / 'none.json'}"
    done = invoke(command)
    assert done.exit_code == 0, done.output
    both = [load_file(each / "model" / "model.safetensors") for each in (trained, tmp_path / "run")]
    assert both[0].keys() == both[1].keys()
    assert all(both[0][name].equal(value) for name, value in both[1].items())
    losses = [
        [line.split(",")[1] for line in (each / "metrics.csv").read_text().splitlines()]
        for each in (trained, tmp_path / "run")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) > STEPS


def test_the_same_command_continues(made: Made, trained: Path):
    journal = (trained / "journal" / "run.journal").read_bytes()
    (trained / "summary.json").unlink()
    options = ["--task=SST-2", f"--data={made.folder}", f"--steps={STEPS}", "--eval-every=20"]
    again = invoke(made.command("train", *options, f"--output={trained}"))
    assert again.exit_code == 0, again.output
    assert values(again.stdout) == values((trained / "stdout").read_text())
    assert (trained / "journal" / "run.journal").read_bytes() == journal
    other = made.command("train", *options, "--per-class=8", f"--output={trained}")
    assert_one_line(invoke(other), "holds another run: examples of (dev|train)|per_class was null")


@pytest.mark.parametrize("row", MASKED_ROWS, ids=[row.name for row in MASKED_ROWS])
def test_every_task_is_measured_from_its_own_files(made: Made, row):
    done = invoke(made.command("eval", f"--task={row.name}", f"--data={DATA}"))
    assert done.exit_code == 0, done.output
    assert values(done.stdout)["examples"] >= 1


def test_classes_are_counted_and_too_few_are_said(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "warm \t1\n" * 9 + "dull \t0\n" * 2)
    options = ["--task=SST-2", f"--data={tmp_path}", "--steps=1", "--per-class=3"]
    done = invoke(made.command("train", *options, f"--output={tmp_path / 'run'}"))
    assert done.exit_code == 0, done.output
    (line,) = [each.getMessage() for each in caplog.records if "per-class" in each.getMessage()]
    assert line == (
        "--per-class: 3 training examples of each class are asked for, there are 2 of 'terrible'"
    )


def test_a_prompt_of_ones_own(made: Made, tmp_path: Path):
    prompt = ["--template={sentence} It was {mask}.", "--labels= terrible, great"]
    found = invoke(made.command("eval", f"--dev={made.folder / 'dev.tsv'}", *prompt))
    assert found.exit_code == 0, found.output
    by_name = values(invoke(made.command("eval", "--task=sst2", f"--data={made.folder}")).stdout)
    assert values(found.stdout)["accuracy"] == by_name["accuracy"]


REFUSED = {
    "a task without a prompt": (["--task=copa"], "'copa' has no prompt for a masked LM, which -"),
    "a task for the other kind": (
        ["--task=trec", "--kind=causal"], "'trec' has no prompt for a causal LM, which --model is"),
    "a template without a mask": (
        [f"--dev={DATA / 'SST-2/dev.tsv'}", "--template={sentence}", "--labels= a, b"],
        "--template: no {mask}, and --model is a masked LM; write {mask} where the label word"),
    "a mask for a causal LM": (
        [f"--dev={DATA / 'SST-2/dev.tsv'}", "--template={sentence}{mask}", "--labels= a, b",
         "--kind=causal"],
        "--template: {mask} is for masked LMs, and --model is a causal LM; remove it, or say"),
    "demonstrations": (
        ["--task=sst2", f"--data={DATA}", "--shots=2"], "--shots: demonstrations are for causal"),
    "classes and numbers": (
        ["--task=sst2", f"--data={DATA}", "--per-class=2", "--num-dev=3"],
        "--per-class: not beside --num-dev; it says how many of every class"),
    "classes without a task": (["--per-class=2"], "--per-class: goes with --task, which is not"),
    "a word of several tokens": (
        [f"--dev={DATA / 'SST-2/dev.tsv'}", "--template={sentence}{mask}", "--labels= great, bus"],
        "label word ' bus': [0-9] tokens "),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_line(made: Made, options: list[str], message: str):
    assert_one_line(invoke(made.command("eval", *options)), message)


def test_positions_before_the_padding_are_no_tokens(made: Made, tmp_path: Path):
    """RoBERTa's positions begin after its padding's: 66 of them take 64 tokens."""
    assert limits(made.folder / "model", "masked") == (64, 400)
    assert limits(made.folder / "model") == (66, 400)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "warm " * 80 + "\t1\n")
    options = ["--task=sst2", f"--data={tmp_path / 'dev.tsv'}"]
    refused = invoke(made.command("eval", *options))
    assert_one_line(refused, r"dev\.tsv:2: \d+ tokens, and the model takes 64; shorten")
    done = invoke(made.command("eval", *options, "--truncate"))
    assert done.exit_code == 0, done.output


def test_the_kind_is_what_the_config_says(made: Made, tmp_path: Path):
    assert kind_of(made.folder / "model") == "masked"
    assert kind_of(tmp_path / "none") == "causal"  # whoever loads it says that it is not there
    assert isinstance(load_model(made.folder / "model"), RobertaForMaskedLM)
    kinds = {
        "masked": [
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            {"model_type": "deberta-v2"},
            {"model_type": "roberta"},
        ],
        "causal": [
            {"architectures": ["OPTForCausalLM"], "model_type": "opt"},
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            {"architectures": ["RobertaForCausalLM"], "model_type": "roberta"},
            {"architectures": None, "model_type": "llama"},
            {"model_type": "roberta", "is_decoder": True},
            {"model_type": "t5"},
            {},
        ],
        "image": [
            {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
            {"model_type": "swin"},
        ],
    }
    for kind, configs in kinds.items():
        assert {kind_of_config(config) for config in configs} == {kind}, kind


def test_a_converted_masked_lm_is_one(made: Made, tmp_path: Path):
    done = invoke(["convert", f"--model={made.folder / 'model'}", f"--output={tmp_path / 'base'}"])
    assert done.exit_code == 0, done.output
    found = []
    for model in (made.folder / "model", tmp_path / "base"):
        command = ["eval", f"--model={model}", "--task=sst2", f"--data={made.folder}"]
        found.append(values(invoke(command).stdout))
    assert found[0] == found[1] != {}
