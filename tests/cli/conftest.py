"""One task and one uninterrupted run of it."""

from pathlib import Path
from typing import NamedTuple

import pytest

from cli.common import Results, Task, invoke, make_task, results


class Finished(NamedTuple):
    directory: Path
    stdout: str
    results: Results


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def finished(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing disturbed. Tests only read it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    done = invoke(task.arguments(directory))
    assert done.exit_code == 0, done.output
    return Finished(directory, done.stdout, results(directory, done.stdout))
