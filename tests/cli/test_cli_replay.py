"""``zo-offload replay``: the model that a run exports, out of its base and its journal."""

import signal
from pathlib import Path

import pytest

from cli.common import At, Child, Task, assert_one_line, invoke, tree
from cli.conftest import Finished
from zo_offload.replay.shards import RECORD

POINTS = [
    At("zo_offload.replay.shards", "write_record", 1, "before"),
    At("zo_offload.replay.shards", "_write", 2),
    At("zo_offload.replay.shards", "Shards.write", 1),
    At("zo_offload.files", "sync_tree", 1, "before"),
    At("os", "rename", 1),
]


def command(task: Task, run: Path, out: Path, *more: str) -> list[str]:
    journal = run / "journal" / "run.journal"
    base = task.folder / "model"
    return ["replay", "--base", f"{base}", "--journal", f"{journal}", "--out", f"{out}", *more]


def assert_is_the_export(finished: Finished, out: Path) -> None:
    found = tree(out)
    del found[RECORD]
    assert found == tree(finished.directory / "model")


def test_a_replay_is_the_export_of_the_run(task: Task, finished: Finished, tmp_path: Path):
    out = tmp_path / "out"
    done = invoke(command(task, finished.directory, out, "--threads", "1"))
    assert done.exit_code == 0, done.output
    assert f"{out}: 18,528 parameters, step 6, in " in done.stdout
    assert_is_the_export(finished, out)
    again = invoke(command(task, finished.directory, out))
    assert f"{out}: holds the weights of step 6 already" in again.stdout
    model = finished.directory / "model"
    verified = invoke(command(task, finished.directory, model, "--verify"))
    assert f"{model}: 36 tensors are equal to the replay's, step 6, in " in verified.stdout


def test_a_converted_model_is_a_base_too(task: Task, finished: Finished, tmp_path: Path):
    base, out = tmp_path / "base", tmp_path / "out"
    done = invoke(["convert", "--model", str(task.folder / "model"), "--output", str(base)])
    assert done.exit_code == 0, done.output
    arguments = command(task, finished.directory, out)
    arguments[2] = str(base)
    done = invoke(arguments)
    assert done.exit_code == 0, done.output
    assert_is_the_export(finished, out)


@pytest.mark.parametrize("at", POINTS, ids=str)
def test_the_same_command_continues_after_a_kill(
    task: Task, finished: Finished, tmp_path: Path, at: At
):
    out = tmp_path / "out"
    child = Child(command(task, finished.directory, out), tmp_path / "log", at)
    assert child.wait() == -signal.SIGKILL, child.stderr
    done = invoke(command(task, finished.directory, out))
    assert done.exit_code == 0, done.output
    assert_is_the_export(finished, out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_difference_is_one_line(task: Task, finished: Finished):
    model = finished.directory / "model"
    done = invoke(command(task, finished.directory, model, "--verify", "--to", "5"))
    assert_one_line(done, r"model: model\.decoder\.\S+ differs from the replay")
