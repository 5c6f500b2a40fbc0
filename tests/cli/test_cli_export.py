"""``zo-offload export``: of a run that is finished, and of one that was stopped."""

import shutil
import signal
from pathlib import Path

import pytest

from cli.common import At, Child, Task, assert_one_line, invoke, tree
from cli.conftest import Finished
from zo_offload.export.command import CARD

ROWS = (
    "| base | `model` |",
    "| template | `{sentence} It was` |",
    "| train | `train.tsv` |",
    "| examples a step | `4` |",
    "| steps | `6` |",
    "| learning rate | `0.01, at the last step 0.00166667` |",
    "| estimator | `spsa` |",
    "| eps | `0.001` |",
)


@pytest.fixture
def stopped(finished: Finished, tmp_path: Path) -> Path:
    """The same run, before it had exported anything."""
    directory = tmp_path / "stopped"
    shutil.copytree(finished.directory, directory)
    shutil.rmtree(directory / "model")
    (directory / "summary.json").unlink()
    return directory


def assert_is_the_export(finished: Finished, out: Path) -> None:
    found = tree(out)
    del found[CARD]
    assert found == tree(finished.directory / "model")


def test_a_finished_run(finished: Finished, tmp_path: Path):
    out = tmp_path / "out"
    done = invoke(["export", f"{finished.directory}", "--output", f"{out}"])
    assert done.exit_code == 0, done.output
    assert f"{out}: hf, 1 file of weights, 76.1 KiB, in " in done.stdout
    assert_is_the_export(finished, out)
    card = (out / CARD).read_text()
    before, after = finished.results.accuracies
    found = (f"| accuracy before | `{before}` |", f"| accuracy after | `{after}` |")
    assert [row for row in (*ROWS, *found) if row not in card] == []
    assert str(finished.directory.parent) not in card


def test_a_run_that_was_stopped_after_a_kill(finished: Finished, stopped: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = ["export", f"{stopped}", "--output", f"{out}"]
    at = At("zo_offload.export.command", "_save", 1)
    child = Child(command, tmp_path / "log", at)
    assert child.wait() == -signal.SIGKILL, child.stderr
    assert not out.exists()
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert_is_the_export(finished, out)
    assert "accuracy after" not in (out / CARD).read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_base_that_has_moved_is_named(task: Task, finished: Finished, tmp_path: Path):
    base, delta, out = tmp_path / "moved", tmp_path / "delta", tmp_path / "out"
    shutil.copytree(task.folder / "model", base)
    run = f"{finished.directory}"
    for arguments in (
        [run, "--output", f"{delta}", "--format", "delta"],
        [f"{delta}", "--base", f"{base}", "--output", f"{out}"],
    ):
        done = invoke(["export", *arguments])
        assert done.exit_code == 0, done.output
    assert_is_the_export(finished, out)
    assert "| format | `a Hugging Face model` |" in (out / CARD).read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": "m", "config": {}}', "has taken no step yet, or kept none; train first"),
        ('{"model": "m"}', "run.json: damaged .KeyError: 'config'.; restore it"),
    ],
)
def test_what_holds_no_weights_is_one_line(tmp_path: Path, text: str, words: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    out = tmp_path / "out"
    assert_one_line(invoke(["export", f"{tmp_path / 'run'}", "--output", f"{out}"]), words)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
