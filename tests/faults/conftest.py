"""One task, and a bench a job."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli.common import make_task

from faults.jobs import JOBS
from faults.trials import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """By the name of a job."""
    folder = tmp_path_factory.mktemp("faults")
    task = make_task(folder / "task")
    made: dict[str, Bench] = {}

    def of(name: str) -> Bench:
        if name not in made:
            place: Path = folder / str(len(made))
            made[name] = Bench(name, JOBS[name], task, place)
        return made[name]

    return of
