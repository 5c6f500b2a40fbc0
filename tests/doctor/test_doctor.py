"""``zo-offload doctor`` as a user runs it, and each thing that it finds wrong."""

import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from zo_offload import cli
from zo_offload.doctor import command, machine, rates
from zo_offload.doctor.row import Row
from zo_offload.offload import disk
from zo_offload.offload.direct import DirectFile
from zo_offload.ops import kernels


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "FEW", 1 << 14)
    monkeypatch.setattr(rates, "MANY", 1 << 16)
    monkeypatch.setattr(rates, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "FILE_BYTES", 4 << 20)


def doctor(*arguments: Any) -> Result:
    result = CliRunner().invoke(cli.main, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def named(rows: Any, name: str) -> Row:
    return next(row for row in rows if row.name == name)


def test_a_line_of_json_and_nothing_left_behind(tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    result = doctor("--json", *(f"--path={folder}" for folder in folders))
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["ok"] is True
    assert found["versions"]["zo_offload"]
    assert found["processor"]["kernels"] == kernels.name()
    assert len(found["disks"]) == 3  # each, and both
    assert {"host_gbps", "nvme_gbps"} <= set(found["plan"])
    assert all(rate > 0 for rate in found["plan"].values())
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_plan_takes_the_rates_as_they_are_said(tmp_path: Path):
    lines = doctor("--path", tmp_path).stdout.splitlines()
    (options,) = [line for line in lines if line.startswith("for zo-offload plan: --host-gbps ")]
    given = options.removeprefix("for zo-offload plan: ").split()
    taken = cli.plan_run.make_context("plan", ["--model", "opt-125m", *given]).params
    assert given == [
        "--host-gbps", f"{taken['host_gbps']:g}", "--nvme-gbps", f"{taken['nvme_gbps']:g}"
    ]  # fmt: skip


def test_a_path_that_is_not_there_stops_runs(tmp_path: Path):
    result = doctor("--path", tmp_path / "none")
    assert result.exit_code == 1
    assert f"stops runs: {tmp_path}/none: was it moved, or its disk not mounted?" in result.stdout


def test_a_package_that_is_missing_stops_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    row = named(machine.installed(), "no-such-package")
    assert (row.value, row.mend, row.prevents) == (None, "pip install no-such-package", True)


def test_a_package_that_cannot_be_imported_stops_runs(monkeypatch: pytest.MonkeyPatch):
    def import_module(name: str) -> None:
        raise RuntimeError("no CUDA_HOME")

    monkeypatch.setattr(machine.importlib, "import_module", import_module)
    row = named(machine.installed(), "deepspeed")
    assert row.prevents
    assert "cannot be imported: no CUDA_HOME" in row.text


def test_kernels_of_torch_are_slow_and_stop_nothing():
    with kernels.using(kernels.TORCH):
        row = named(machine.processor(), "kernels")
    assert (row.value, row.prevents) == ("torch", False)
    assert "install zo_offload again" in row.mend


def test_kernels_that_are_not_there_stop_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_chosen", False)
    monkeypatch.setenv(kernels.VARIABLE, "none")
    rows = command.examine([])
    assert named(rows, "kernels").prevents
    assert "host_gbps" not in command.plan_options(rows)


def test_few_open_files_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))
    assert named(machine.limits(), "open files").mend == "ulimit -n 1024, as far as 512 allows"


def test_memory_that_ranks_cannot_share_is_said(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    row = named(machine.limits(), "memfd")
    assert (row.value, row.text) == (False, "refused: Operation not permitted")
    assert "start one rank" in row.mend


def test_a_file_system_without_direct_io_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(disk, "_turned_direct", lambda fd: False)
    with caplog.at_level(logging.ERROR, "zo_offload"):
        row = named(command.examine([tmp_path]), str(tmp_path))
    assert row.text.endswith("through the page cache")
    assert "no direct I/O" in row.mend
    assert not row.prevents


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: DirectFile, pieces: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DirectFile, "write", fail)
    with pytest.raises(OSError, match="Input/output"):
        rates.disk([tmp_path], 1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_given_so_long_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Time that is up before it began: one part goes each way."""
    written = []
    write = DirectFile.write
    monkeypatch.setattr(
        DirectFile, "write", lambda self, pieces: written.append(pieces) or write(self, pieces)
    )
    found = rates.disk([tmp_path], 0.0)
    assert len(written) == 1
    assert found.both_gbps <= max(found.read_gbps, found.write_gbps)


def test_a_directory_named_twice_is_one(tmp_path: Path):
    (tmp_path / "further").mkdir()
    rows = list(command._disks([tmp_path, tmp_path / "further" / ".."]))
    assert [row.prevents for row in rows] == [False]
