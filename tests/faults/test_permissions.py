"""What a run leaves is for its user alone, whatever the umask."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.common import invoke, make_task, write_config

from zo_offload.offload.region import Region


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path | int) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_directories_of_a_run(tmp_path: Path):
    task = make_task(tmp_path / "task")
    config = write_config(tmp_path / "ds.json", nvme=tmp_path / "disk")
    output = tmp_path / "above" / "run"
    done = invoke(task.arguments(output, steps=1, config=config))
    assert done.exit_code == 0, done.output
    assert mode(output) == mode(output / "journal") == mode(tmp_path / "disk") == 0o700
    assert mode(output / "journal" / "run.journal") == 0o600
    assert mode(tmp_path / "disk" / "units.bin") == 0o600


def test_a_directory_that_was_there_keeps_its_mode(tmp_path: Path):
    task = make_task(tmp_path / "task")
    (tmp_path / "run").mkdir(mode=0o750)
    assert invoke(task.arguments(tmp_path / "run", steps=1)).exit_code == 0
    assert mode(tmp_path / "run") == 0o750


def test_memory_that_ranks_share():
    told: list[str] = []
    region = Region(4096, (0,), 0, lambda text: told.append(text) or text)
    (path,) = told
    assert mode(Path(path)) == 0o600
    region.close()
