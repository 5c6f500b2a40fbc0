"""kill -9 at any instant, then the same command: as if nothing had happened."""

import random
import signal
import time
from pathlib import Path

import pytest

from cli.common import (
    STEPS,
    At,
    Child,
    Results,
    Task,
    assert_one_line,
    invoke,
    results,
    tree,
    write_config,
)
from cli.conftest import Finished
from zo_offload.journal import Journal

POINTS = [
    At("os", "replace", 1, "before"),  # run.json is written aside, and not there yet
    At("os", "replace", 1),
    At("zo_offload.integrations.hf", "load_model", 1),
    At("zo_offload.metrics", "Metrics._make", 1, "before"),
    At("zo_offload.metrics", "Metrics._make", 1),
    At("zo_offload.journal.files", "create_locked", 1, "before"),
    At("zo_offload.journal.files", "create_locked", 1),
    At("zo_offload.metrics", "Metrics.add_evaluation", 1, "before"),
    At("zo_offload.metrics", "Metrics.add_evaluation", 1),  # between evaluation and step
    At("zo_offload.journal", "Journal.append", 1, "before"),
    At("zo_offload.journal", "Journal.append", 1),  # recorded, not applied, no row yet
    At("zo_offload.metrics", "Metrics.add_step", 1),
    At("zo_offload.journal", "Journal.append", 3),  # just after the second evaluation
    At("zo_offload.metrics", "Metrics.add_evaluation", 4, "before"),
    At("zo_offload.metrics", "Metrics.add_evaluation", 4),  # the last
    At("zo_offload.engine", "ZOEngine.save_pretrained", 1),
    At("zo_offload.files", "sync_tree", 1),
    At("zo_offload.run", "draw_curve", 1, "before"),
    At("zo_offload.run", "draw_curve", 1),
    At("zo_offload.run", "as_json", 1),  # of summary.json
]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("at", POINTS, ids=str)
def test_a_kill_at_a_point(task: Task, finished: Finished, tmp_path, at: At):
    command = task.arguments(tmp_path / "run")
    child = Child(command, tmp_path / "log", at)
    assert child.wait() == -signal.SIGKILL, child.stderr
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert results(tmp_path / "run", done.stdout) == finished.results
    assert not list((tmp_path / "run").glob("*.new"))


def test_two_kills_while_the_model_is_exchanged(task: Task, finished: Finished, tmp_path):
    command = task.arguments(tmp_path / "run")
    first = Child(command, tmp_path / "log", At("zo_offload.run", "export_model", 1))
    assert first.wait() == -signal.SIGKILL
    second = Child(command, tmp_path / "log", At("shutil", "rmtree", 2))
    assert second.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    done = invoke(command)
    assert results(tmp_path / "run", done.stdout) == finished.results


def test_kills_at_random_instants(task: Task, finished: Finished, tmp_path):
    began = time.monotonic()
    whole = Child(task.arguments(tmp_path / "whole"), tmp_path / "log")
    assert whole.wait() == 0
    length = time.monotonic() - began
    for trial in range(2):
        command = task.arguments(tmp_path / str(trial))
        for _ in range(3):
            child = Child(command, tmp_path / "log")
            child.wait(random.uniform(0.1, 1.0) * length)
            child.kill()
        last = Child(command, tmp_path / "log")
        assert last.wait() == 0, last.stderr
        assert results(tmp_path / str(trial), last.stdout) == finished.results


@pytest.fixture(scope="module")
def lagging(task: Task, tmp_path_factory) -> tuple[Path, Results]:
    """A configuration whose masters lag, with snapshots between, and a run that was left alone."""
    folder = tmp_path_factory.mktemp("lagging")
    config = write_config(folder / "ds.json", lag=3, snapshot_interval=2)
    done = invoke(task.arguments(folder / "run", config=config))
    assert done.exit_code == 0, done.output
    return config, results(folder / "run", done.stdout)


LAGGING = [
    [At("zo_offload.journal", "Journal.append", step)] for step in (2, 3, 4)
] + [  # each is of the process that continues where the one before it was killed
    [
        At("zo_offload.snapshot", "write_snapshot", 1),  # written aside
        At("zo_offload.metrics", "Metrics.add_step", 1),
        At("zo_offload.snapshot", "Series.write", 1),
        At("zo_offload.journal", "Journal.append", 1, "before"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("points", LAGGING, ids=lambda points: ", ".join(map(str, points)))
def test_kills_while_masters_lag(
    task: Task, finished: Finished, lagging: tuple[Path, Results], tmp_path, points: list[At]
):
    config, whole = lagging
    assert whole.journal != finished.results.journal  # whose header names the lag
    command = task.arguments(tmp_path / "run", config=config)
    for at in points:
        child = Child(command, tmp_path / "log", at)
        assert child.wait() == -signal.SIGKILL, child.stderr
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert results(tmp_path / "run", done.stdout) == whole


ON_DISK = [
    [At("zo_offload.offload.folders", "write_manifests", 1, "before")],
    [At("zo_offload.offload.folders", "write_manifests", 1)],
    [At("zo_offload.offload.run_files", "RunFiles.write", 2, "before")],
    [At("zo_offload.offload.direct", "DirectFile._transfer", 3)],  # of a unit, not its header
    [At("zo_offload.offload.nvme", "UnitStore._settled", 4)],
    [At("zo_offload.offload.nvme", "UnitStore.sync", 1)],
    [At("zo_offload.offload.manifest", "write_file", 1, "before")],  # of the mark of a clean end
    [
        At("zo_offload.metrics", "Metrics.add_step", 2),
        At("zo_offload.offload.nvme", "recover", 1),
        At("zo_offload.offload.nvme", "UnitStore._settled", 1),
        At("zo_offload.offload.run_files", "RunFiles.write", 2, "before"),
    ],
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("points", ON_DISK, ids=lambda points: ", ".join(map(str, points)))
def test_kills_while_weights_rest_on_a_disk(
    task: Task, finished: Finished, tmp_path, points: list[At]
):
    config = write_config(tmp_path / "ds.json", nvme=tmp_path / "disk")
    command = task.arguments(tmp_path / "run", config=config)
    for at in points:
        child = Child(command, tmp_path / "log", at)
        assert child.wait() == -signal.SIGKILL, (str(at), child.stderr)
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert results(tmp_path / "run", done.stdout) == finished.results


def test_two_runs_at_once_are_refused(task: Task, finished: Finished, tmp_path):
    command = task.arguments(tmp_path / "run")
    at = At("zo_offload.metrics", "Metrics.add_step", 2, "after", signal.SIGSTOP)
    child = Child(command, tmp_path / "log", at)
    try:
        child.wait_until_stopped()
        assert_one_line(invoke(command), "another process is at work in ")
        assert_one_line(invoke(task.arguments(tmp_path / "run", steps=9)), "steps was 6, is now 9")
    finally:
        child.resume()
    assert child.wait() == 0
    assert results(tmp_path / "run", child.stdout) == finished.results


def stopped(task: Task, output, tmp_path, steps: int = 3) -> list[str]:
    """The command of a run that was killed after some steps."""
    command = task.arguments(output)
    child = Child(command, tmp_path / "log", At("zo_offload.metrics", "Metrics.add_step", steps))
    assert child.wait() == -signal.SIGKILL
    return command


def test_what_is_said_when_a_run_continues(task: Task, finished: Finished, tmp_path):
    command = stopped(task, tmp_path / "run", tmp_path)
    done = invoke(command)
    assert "continuing after 3 steps" in done.stdout.splitlines()
    assert "step 0:" not in done.stdout


@pytest.mark.parametrize("loss", ["gone", "empty", "torn", "garbage"])
def test_lost_metrics_are_made_up_from_the_journal(
    task: Task, finished: Finished, tmp_path, loss: str
):
    command = stopped(task, tmp_path / "run", tmp_path, steps=4)
    path = tmp_path / "run" / "metrics.csv"
    content = path.read_bytes()
    if loss == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "torn": content[:-9], "garbage": b"\x00\xff," * 200_000}[loss]
        )
    done = invoke(command)
    assert done.exit_code == 0, done.output
    found = results(tmp_path / "run", done.stdout)
    assert found.weights == finished.results.weights
    assert found.accuracies == finished.results.accuracies
    without = [",".join(line.split(",")[:4]) for line in found.metrics]
    assert without == [",".join(line.split(",")[:4]) for line in finished.results.metrics]
    if loss == "torn":
        assert found.metrics == finished.results.metrics


def test_a_torn_journal_is_continued(task: Task, finished: Finished, tmp_path):
    command = stopped(task, tmp_path / "run", tmp_path)
    path = tmp_path / "run" / "journal" / "run.journal"
    path.write_bytes(path.read_bytes()[:-7])
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert "continuing after 2 steps" in done.stdout
    assert results(tmp_path / "run", done.stdout) == finished.results
    assert "Warning: " in done.stderr
    assert "cut off a torn tail" in done.stderr


def test_a_damaged_journal_is_left_alone(task: Task, tmp_path):
    command = stopped(task, tmp_path / "run", tmp_path)
    path = tmp_path / "run" / "journal" / "run.journal"
    Journal.open(path, Journal.read(path).header.fields).close()  # what was not synced is now
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)
    before = tree(tmp_path / "run")
    assert_one_line(invoke(command), "is damaged")
    assert tree(tmp_path / "run") == before


def test_a_damaged_record_of_the_run_is_left_alone(task: Task, tmp_path):
    command = stopped(task, tmp_path / "run", tmp_path)
    for content in (b"", b"[]", b"{", b"\xff", b'{"config": 3}'):
        (tmp_path / "run" / "run.json").write_bytes(content)
        before = tree(tmp_path / "run")
        assert_one_line(invoke(command), r"run\.json: damaged; restore it")
        assert tree(tmp_path / "run") == before


def test_a_damaged_summary(task: Task, finished: Finished, tmp_path):
    command = task.arguments(tmp_path / "run")
    assert invoke(command).exit_code == 0
    for content in ("", "[]", "{}", '{"steps": 1, "more": 2}'):
        (tmp_path / "run" / "summary.json").write_text(content)
        assert_one_line(invoke(command), r"summary\.json: damaged .*remove this file")
    (tmp_path / "run" / "summary.json").unlink()
    done = invoke(command)
    assert f"continuing after {STEPS} steps" in done.stdout
    assert results(tmp_path / "run", done.stdout) == finished.results
