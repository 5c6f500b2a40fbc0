"""Scores as what is minimised: they rise, count as losses do, and what does not fit is named."""

import csv
import json
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from cli.common import assert_one_line, invoke
from forked import Forked

from tasks.taught import LABELS, TEMPLATE, make_taught
from tasks.test_commands import values
from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError
from zo_offload.journal import Journal
from zo_offload.step import Stepper
from zo_offload.tasks import Manner, Prompt, Rendered, causal_way, encode, hits, option_forward
from zo_offload.tasks.aims import check_objective
from zo_offload.tasks.reader import Example

REWARD = Path(__file__).resolve().parents[2] / "docs" / "examples" / "reward.py"
WIDTHS = {"qa": (3e-2, 2e-2), "words": (1e-1, 1e-1)}  # eps and rate


def config_of(eps: float, lr: float) -> dict:
    block = {
        "eps": eps,
        "probes": 4,
        "trainable": {"parameters": ["*.fc2.weight"]},
        "offload_param": {"device": "cpu"},
    }
    optimizer = {"type": "ZO", "params": {"lr": lr}}
    return {"train_batch_size": 32, "optimizer": optimizer, "zeroth_order": block}


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    make_taught(folder)
    for kind, widths in WIDTHS.items():
        (folder / f"{kind}.json").write_text(json.dumps(config_of(*widths)))
    return folder


def classifying(taught: Path, output: Path, *more: str) -> list[str]:
    files = [f"--train={taught / 'train.tsv'}", f"--dev={taught / 'dev.tsv'}"]
    prompt = [f"--template={TEMPLATE}", f"--labels={LABELS}"]
    model = [f"--model={taught / 'words'}", f"--config={taught / 'words.json'}"]
    return ["train", *model, *files, *prompt, f"--output={output}", *more]


def answering(taught: Path, output: Path, *more: str) -> list[str]:
    model = [f"--model={taught / 'qa'}", f"--config={taught / 'qa.json'}"]
    return ["train", *model, f"--task={taught / 'qa.toml'}", f"--output={output}", *more]


def test_accuracy_is_trained_on(taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = tmp_path / "run"
    command = classifying(taught, run, "--objective=accuracy", "--steps=50", "--eval-every=50")
    done = invoke(command)
    assert done.exit_code == 0, done.output
    found = values(done.stdout)
    assert found["accuracy before"] < 0.8
    assert found["accuracy after"] > found["accuracy before"] + 0.15
    assert found["accuracy after"] >= 0.95
    # Lanes with equal losses move nothing, are no fault, and are told.
    journal = Journal.read(run / "journal" / "run.journal")
    grads = [p.projected_grad for record in journal.records for p in record.probes]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["equal_share"] == grads.count(0.0) / len(grads) > 0
    assert summary["noise_over_signal"] is None
    assert not [r for r in caplog.records if "rounding" in r.getMessage()]
    # What is minimised is 1 - accuracy: of 32 examples so many are wrong.
    assert all((32 * loss).is_integer() for record in journal.records for loss in record.losses)
    # The run and its journal know what it minimises.
    assert json.loads((run / "run.json").read_text())["objective"] == "accuracy"
    assert journal.header.fields["objective"] == "accuracy"
    assert f"{run}: this run is finished" in invoke(command).stdout
    other = classifying(taught, run, "--steps=50", "--eval-every=50")
    assert_one_line(invoke(other), 'holds another run: objective was "accuracy", is now null')


def test_exact_match_is_trained_on(taught: Path, tmp_path: Path):
    run = tmp_path / "run"
    command = answering(taught, run, "--objective=exact_match", "--steps=20", "--eval-every=20")
    done = invoke(command)
    assert done.exit_code == 0, done.output
    found = values(done.stdout)
    assert 0 < found["exact_match before"] < 0.6
    assert found["exact_match after"] > found["exact_match before"] + 0.3
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(0 <= float(row["loss"]) <= 1 for row in rows[:-1])


def test_the_documented_reward_is_learnt(taught: Path, tmp_path: Path):
    log = tmp_path / "log"
    given = [str(taught / "qa"), str(taught / "train.jsonl"), str(tmp_path / "out")]
    done = Forked("forked:script", str(REWARD), *given, out=log, cwd=tmp_path)
    assert done.wait() == 0, done.stdout
    said = [line.split(": ") for line in done.stdout.splitlines() if line.startswith("exact")]
    before, after = (float(value) for _, value in said)
    assert 0 < before < 0.6
    assert after > before + 0.2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def examples(tokenizer, sentences, labels: str):
    rows = [Example({"a": text}, line % 2, line) for line, text in enumerate(sentences)]
    return encode(rows, Prompt("{a} it was", labels), tokenizer, 64)


@pytest.mark.parametrize("train_on", ["options", "answer"])
@pytest.mark.parametrize("chunk", [None, 77])
def test_micro_batches_of_accuracy_count_alike(model, tokenizer, sentences, train_on, chunk):
    """All options are compared, also where the answer alone is trained on by its loss."""
    way = causal_way(Manner(train_on), tokenizer).minimising("accuracy")
    encoded = examples(tokenizer, sentences[:4], " terrible, great joy")
    parts = [way.collate(encoded[:2]), way.collate(encoded[2:])]
    with torch.no_grad():
        wrong = [1 - hits(batch, option_forward(model, batch)) for batch in parts]
    config = ZOConfig(eps=1e-9, head_chunk=chunk)
    with closing(Stepper(deepcopy(model), config, objective=way.objective)) as stepper:
        result = stepper.train_step(parts, lr=1e-3)
    assert result.lane_losses == pytest.approx([float(torch.cat(wrong).mean())] * 2)
    assert result.projected_grads == (0.0,)


REFUSED = {
    "exact_match": (Manner(), "exact_match is of answers in words, and this task chooses among"),
    "f1": (Manner(), "f1 of options is of all examples at once, .*; expected loss or accuracy"),
    "accuracy": (
        Manner("answer", True, ("f1",)),
        "accuracy is of options, and this task gen.* its answers; expected loss or f1 or exact_m",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_says_nothing_of_a_task_is_refused(name: str):
    manner, words = REFUSED[name]
    with pytest.raises(ConfigError, match=f"^--objective: {words}"):
        check_objective(name, manner)
    check_objective("loss", manner)


def test_it_is_refused_before_the_model_is_touched(taught: Path, tmp_path: Path):
    command = answering(taught, tmp_path / "run", "--objective=accuracy", "--steps=1")
    assert_one_line(invoke(command), "--objective: accuracy is of options")
    assert not (tmp_path / "run").exists()


def test_a_generated_text_is_judged_beside_its_loss(tokenizer, model):
    """The dev loss is the language-model loss of the answer, whatever the objective."""
    manner = Manner("answer", True, ("exact_match",), "\n", 4)
    posed = [Rendered("it was", (" great\n",), (0,), "x", ("great",), fixed=False)]
    plain = causal_way(manner, tokenizer)
    encoded = plain.encode(posed, 64, False)
    found = []
    for way in (plain, plain.minimising("f1")):
        with closing(Stepper(deepcopy(model), ZOConfig(), objective=way.objective)) as stepper:
            found.append(way.judge(stepper, encoded))
    assert found[0] == found[1]
