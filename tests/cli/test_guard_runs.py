"""A run that goes wrong, goes back by itself, and ends as if nobody had killed it meanwhile."""

import json
import signal
from pathlib import Path

import pytest
from distributed.launch import forked, wait

from cli.common import At, Child, Results, Task, assert_one_line, invoke, results
from zo_offload.journal import Journal

STEPS = 25


def config_of(task: Task, path: Path, guard: dict[str, str]) -> Path:
    config = json.loads((task.folder / "ds.json").read_text())
    config["optimizer"]["params"]["lr"] = 0.1  # far too high
    config["train_micro_batch_size_per_gpu"] = 2  # on two ranks the same micro-batches as on one
    config["zeroth_order"]["guard"] = {"window": 20, **guard}
    path.write_text(json.dumps(config))
    return path


def arguments(task: Task, folder: Path, **guard: str) -> list[str]:
    guard = guard or {"explosion": "rollback", "divergence": "rollback"}
    config = config_of(task, folder / "ds.json", guard)
    return task.arguments(folder / "run", config=config, steps=STEPS, eval_every=STEPS)


@pytest.fixture(scope="module")
def rolled(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path, str]:
    folder = tmp_path_factory.mktemp("rolled")
    done = invoke(arguments(task, folder))
    assert done.exit_code == 0, done.output
    return results(folder / "run", done.stdout), folder / "run", done.stderr


def test_it_goes_back_and_ends(rolled):
    _, directory, errors = rolled
    summary = json.loads((directory / "summary.json").read_text())
    number = summary["rollbacks"]
    assert number >= 2
    told = [line for line in errors.splitlines() if line.startswith("Warning: step ")]
    assert len([line for line in told if "rolled back to step" in line]) == number
    records = Journal.read(directory / "journal" / "run.journal").records
    assert (len(records), records.stream, records.branch) == (STEPS, number, number)
    last = records[-1]
    assert last.probes[0].number == number
    assert last.lr == pytest.approx(0.1 * 0.5**number * (1 - last.step / STEPS))
    rows = (directory / "metrics.csv").read_text().splitlines()
    assert len(rows) == STEPS + 2  # the names, and the last evaluation


@pytest.mark.parametrize(
    "at",
    [
        At("zo_offload.journal", "Journal.rewind", 1, "before"),
        At("zo_offload.journal", "Journal.rewind", 1),
        At("zo_offload.journal", "Journal.rewind", 2),
        At("zo_offload.run", "start_engine", 2),
    ],
    ids=str,
)
def test_killed_around_a_roll_back_it_ends_alike(task: Task, rolled, tmp_path, at: At):
    command = arguments(task, tmp_path)
    child = Child(command, tmp_path / "log", at)
    assert child.wait() == -signal.SIGKILL, child.stderr
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert results(tmp_path / "run", done.stdout) == rolled[0]


def test_ranks_go_back_together(task: Task, tmp_path):
    ended = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        command = arguments(task, folder)
        said = wait(forked("cli.common:run_in_child", ranks, command, out=folder / "log"))
        assert all(code == 0 for code, _ in said), said
        ended.append(results(folder / "run", said[0][1]))
    assert ended[0] == ended[1]
    records = Journal.read(tmp_path / "2" / "run" / "journal" / "run.journal").records
    assert records.stream > 0


def test_a_run_that_is_told_to_stop_keeps_its_steps(task: Task, tmp_path):
    command = arguments(task, tmp_path, explosion="stop")
    assert_one_line(invoke(command), r"step \d+: the loss is .*lower the learning rate")
    before = len(Journal.read(tmp_path / "run" / "journal" / "run.journal").records)
    assert before > 0
    assert_one_line(invoke(command), r"step \d+: the loss is .*lower the learning rate")
    assert len(Journal.read(tmp_path / "run" / "journal" / "run.journal").records) == before
