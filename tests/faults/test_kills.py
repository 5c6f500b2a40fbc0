"""The short form of ``make faults``: kills, faults and power cuts of a few seeds."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from faults import jobs
from faults.calls import Calls
from faults.mishaps import FAULTS, mixed
from faults.power import Disk
from faults.programs import CALLS, POWER
from faults.trials import Bench
from zo_offload.files import sync


@pytest.mark.parametrize(("name", "seed"), [("nvme, lag, snapshots", 1), ("checkpoints", 2)])
def test_kills_are_survived(bench: Callable[[str], Bench], name: str, seed: int):
    """The first that comes about: runs sync by the clock, some have fewer calls than others."""
    for each in range(seed, seed + 10):
        trial = bench(name).killed(each)
        assert trial.faults == [], trial.name
        if trial.happened:
            return
    pytest.fail("none of ten was killed")


@pytest.mark.parametrize(
    ("name", "kind", "mishap"),
    [("checkpoints", CALLS, "ENOSPC at a save"), ("nvme, lag, snapshots", POWER, "before")],
)
def test_a_fault_is_one_line_and_loses_nothing(
    bench: Callable[[str], Bench], name: str, kind: str, mishap: str
):
    trial = bench(name).faulted(kind, mishap, 1)
    assert trial.faults == [], trial.name
    assert trial.happened


def test_what_is_lost_is_told(bench: Callable[[str], Bench], monkeypatch: pytest.MonkeyPatch):
    """Else nothing that these tests say would mean anything."""
    one = bench("checkpoints")
    assert one.expected["weights"]
    monkeypatch.setitem(one.expected, "weights", "others")
    (fault,) = one.killed(3).faults
    assert fault.startswith("other results: ")


def test_calls_are_numbered(tmp_path: Path):
    seen = []
    calls = Calls([tmp_path / "in"], lambda call: seen.append(call.name) or call.as_asked())
    (tmp_path / "in").mkdir()
    with calls.watching():
        (tmp_path / "in" / "a").write_bytes(b"1")
        (tmp_path / "out").write_bytes(b"1")
        (tmp_path / "in" / "a").read_bytes()
        (tmp_path / "in" / "a").replace(tmp_path / "in" / "b")
    assert seen == ["open", "replace"]
    assert calls.counts == {"open": 1, "replace": 1}


class Cut(BaseException):
    """In the place of death."""


def cut(*_: object) -> NoReturn:
    raise Cut


def replace_and_remove(folder: Path, synced: bool) -> None:
    (folder / "new").write_bytes(b"x" * 600)
    if synced:
        sync(folder / "new")
    (folder / "new").replace(folder / "file")
    if synced:
        sync(folder)
    (folder / "file").unlink()


@pytest.mark.parametrize("synced", [True, False])
def test_a_power_cut_takes_what_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
):
    """What was synced is there after every cut; what was not is lost by some."""
    monkeypatch.setattr("faults.power.die", cut)
    found = set()
    for seed in range(16):
        folder = tmp_path / str(seed)
        folder.mkdir()
        disk = Disk([str(folder)], at=5 if synced else 3, chance=random.Random(seed))
        with disk.calls.watching(), pytest.raises(Cut):
            replace_and_remove(folder, synced)
        path = folder / "file"
        found.add(path.read_bytes() if path.exists() else b"gone")
    assert (found == {b"x" * 600}) == synced


def test_torn_sectors():
    chance = random.Random(1)
    torn = {mixed(b"a" * 1024, b"b" * 1024, chance) for _ in range(50)}
    assert torn == {a * 512 + b * 512 for a in (b"a", b"b") for b in (b"a", b"b")}


def test_every_kind_can_happen():
    assert set(jobs.JOBS) >= {"host", "device", "nvme", "convert", "checkpoints"}
    assert all(names for _, names in FAULTS.values())
