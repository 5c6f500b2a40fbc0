"""The store: versions come back as they were written, in this run or the next."""

import os
import stat
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.common import (
    AIO,
    IDENTITY,
    SIZES,
    UNITS,
    content,
    created,
    opened,
    read,
    steps,
    unit,
    write,
)
from zo_offload.errors import StoreError
from zo_offload.offload.aio import PAGE, Aio
from zo_offload.offload.base_files import BaseFiles, base_identity
from zo_offload.offload.disk import aligned
from zo_offload.offload.folders import create_store, is_store
from zo_offload.offload.nvme import UnitStore

SLOT_BYTES = 4 * PAGE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_versions_come_back(tmp_path: Path, count: int):
    places = created(tmp_path, count)
    with opened(places) as store:
        assert store.missing == list(SIZES)
        for index in SIZES:
            write(store, index, step=1)
        for index in (0, 1, 0):
            write(store, index, step=5, branch=2)
        assert steps(store) == {0: 5, 1: 5, -1: 1}
        version = store.version(0)
        assert version is not None
        assert (version.step, version.branch) == (5, 2)
    with opened(places) as store:
        assert store.missing == store.torn == []
        assert steps(store) == {0: 5, 1: 5, -1: 1}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 9000)), min_size=1, max_size=3),
    count=st.integers(1, 3),
    start=st.sampled_from([0, 3]),
)
@settings(max_examples=15)
def test_any_sizes_and_addresses(sizes: list[tuple[int, int]], count: int, start: int):
    units = [unit(index, *each) for index, each in enumerate(sizes)]
    parts = [
        [torch.randint(0, 256, (start + n,), dtype=torch.uint8)[start:] for n in each]
        for each in sizes
    ]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(i)) for i in range(count)]
        create_store(places, IDENTITY, units, AIO)
        with UnitStore(places, IDENTITY, units, AIO) as store:
            for index, (wire, rest) in enumerate(parts):
                store.write(index, wire, rest, step=index).result()
        # transfers of another size: the stripes stay as they were made
        with UnitStore(places, IDENTITY, units, Aio(block_size=4 * PAGE)) as store:
            for index, expected in enumerate(parts):
                found = [torch.zeros_like(part) for part in expected]
                assert store.read(index, found[0], found[1]).result() == index
                assert all(map(torch.equal, found, expected))


def test_the_wire_alone(tmp_path: Path):
    with opened(created(tmp_path)) as store:
        write(store, 0, step=3)
        before, wire = store.bytes_read, aligned(SIZES[0][0])
        assert store.read(0, wire).result() == 3
        assert torch.equal(wire, content(0, 3)[0])
        assert store.bytes_read - before == SIZES[0][0]


def test_writes_under_way_and_reads_keep_order(tmp_path: Path):
    """Many more writes than spares; a read sees the write before it."""
    with opened(created(tmp_path)) as store:
        for step in range(12):
            futures = [store.write(index, *content(index, step), step) for index in SIZES]
            assert steps(store) == dict.fromkeys(SIZES, step)
            assert all(future.done() for future in futures)


def test_the_journal_is_synced_before_anything_is_written(tmp_path, monkeypatch):
    happened = []
    honest = os.pwritev
    store = opened(created(tmp_path), before_write=lambda: happened.append("journal"))

    def seen(*given) -> int:
        happened.append("write")
        return honest(*given)

    monkeypatch.setattr(os, "pwritev", seen)
    write(store, 0, step=1)
    assert happened[0] == "journal"
    assert happened.count("journal") == 1

    def refuse() -> None:
        raise OSError("no journal")

    store._before_write = refuse
    del happened[:]
    with pytest.raises(OSError, match="no journal"):
        write(store, 0, step=2)
    assert happened == []
    assert read(store, 0) == 1
    store.close()


def test_a_slot_is_written_again_only_after_a_sync(tmp_path, monkeypatch):
    """In the order in which the system sees it."""
    calls: list[tuple[str, int]] = []
    honest_write, honest_sync = os.pwritev, os.fdatasync

    def seen(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(("write", offset // SLOT_BYTES))
        return honest_write(fd, views, offset)

    def synced(fd: int) -> None:
        calls.append(("sync", 0))
        honest_sync(fd)

    with opened(created(tmp_path, spares=2)) as store:
        for index in SIZES:
            write(store, index, step=0)
        monkeypatch.setattr(os, "pwritev", seen)
        monkeypatch.setattr(os, "fdatasync", synced)
        for step in range(1, 9):
            write(store, 0, step)
    unsynced: set[int] = set()  # slots whose version has a successor that is not safe yet
    held = 0
    for call, slot in calls:
        if call == "sync":
            unsynced.clear()
        elif slot != held:
            assert slot not in unsynced
            unsynced.add(held)
            held = slot
    assert [call for call, _ in calls].count("sync") == 4  # two spares: one for two writes


def test_a_slot_that_is_read_is_not_written(tmp_path, monkeypatch):
    """The reader of an old version gets it whole, however many newer ones are written meanwhile."""
    with opened(created(tmp_path, spares=2)) as store:
        for index in SIZES:
            write(store, index, step=0)
        honest = os.preadv
        late = []

        def in_the_midst(fd: int, views: list[memoryview], offset: int) -> int:
            if not late:
                late.append(True)
                for step in range(1, 7):
                    for index in (0, 1):
                        write(store, index, step)
            return honest(fd, views, offset)

        monkeypatch.setattr(os, "preadv", in_the_midst)
        assert read(store, 0) == 0
        assert read(store, 0) == 6


def test_wear_is_counted_over_the_run(tmp_path: Path):
    places = created(tmp_path)
    with opened(places) as store:
        write(store, 0, step=1)
        write(store, 1, step=1)
        life = store.life_bytes
        assert life == store.bytes_written == 4 * PAGE + 4 * PAGE
    with opened(places) as store:
        assert store.life_bytes == life
        assert store.bytes_written == 0
        write(store, -1, step=1)
        assert store.life_bytes == life + 4 * PAGE
    (places[0] / "clean").unlink()  # as after a crash: the slots know it too
    with opened(places) as store:
        assert store.life_bytes == life + 4 * PAGE


def test_two_runs_cannot_have_it(tmp_path: Path):
    places = created(tmp_path, 2)
    with (
        opened(places),
        pytest.raises(StoreError, match=f"{places[0]}: another run has these files; end that run"),
    ):
        opened(places)
    opened(places).close()


def test_a_second_close_does_nothing(tmp_path: Path):
    places = created(tmp_path)
    store = opened(places)
    store.close()
    with opened(places) as other:
        write(other, 0, step=1)
        store.close()
        assert not (places[0] / "clean").exists()


def test_threads_share_a_store(tmp_path: Path):
    """Each with a unit of its own; spares and syncs are everyone's."""
    with opened(created(tmp_path, spares=2)) as store:

        def work(index: int) -> list[int]:
            found = []
            for step in range(25):
                write(store, index, step)
                found.append(read(store, index))
            return found

        with ThreadPoolExecutor(len(SIZES)) as pool:
            assert list(pool.map(work, SIZES)) == [list(range(25))] * len(SIZES)


def test_only_this_user_reads_it(tmp_path: Path):
    places = created(tmp_path, 2)
    opened(places).close()
    for folder in places:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "units.bin").stat().st_mode) == 0o600


def test_is_made_once_and_made_good(tmp_path: Path):
    places = created(tmp_path, 2)
    assert is_store(places)
    with pytest.raises(StoreError, match="disk0: a store is there already; open it, or remove"):
        created(tmp_path, 2)
    (places[0] / "store.json").unlink()  # a crash before the last file
    assert not is_store(places)
    created(tmp_path, 2)
    opened(places).close()


def test_another_runs_files_are_not_cleared(tmp_path: Path):
    first, second = tmp_path / "new", tmp_path / "old"
    create_store([tmp_path / "x", second], base_identity(IDENTITY.base, "bf16"), UNITS, AIO)
    with pytest.raises(StoreError, match="old: a store is there already"):
        create_store([first, second], IDENTITY, UNITS, AIO)
    assert (second / "units.bin").exists()


@pytest.fixture
def base(tmp_path: Path) -> list[Path]:
    """All units at step 0."""
    places = [tmp_path / "base0", tmp_path / "base1"]
    identity = base_identity(IDENTITY.base, IDENTITY.codec)
    create_store(places, identity, UNITS, AIO, spares=0)
    with UnitStore(places, identity, UNITS, AIO) as store:
        for index in SIZES:
            write(store, index, step=0)
        with pytest.raises(StoreError, match="without spare slots is written once"):
            write(store, 0, step=1)
    return places


def base_files(places: list[Path]) -> BaseFiles:
    return BaseFiles(places, IDENTITY.base, IDENTITY.codec, UNITS, AIO)


def test_a_base_is_never_written(tmp_path: Path, base: list[Path]):
    paths = sorted(path for place in base for path in place.iterdir())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    for path in [*paths, *base]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    shared, other = base_files(base), base_files(base)  # any number at once
    assert steps(shared) == steps(other) == dict.fromkeys(SIZES, 0)
    flags = [
        line.split()[1]
        for fd, _ in shared._file._files
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        if line.startswith("flags")
    ]
    assert [int(each, 8) & os.O_ACCMODE for each in flags] == [os.O_RDONLY] * 2
    shared.close()
    other.close()
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_an_unfinished_base_is_refused(base: list[Path]):
    (base[0] / "clean").unlink()
    with pytest.raises(StoreError, match="base0: a base that was not finished; convert"):
        base_files(base)


def test_a_base_that_lacks_units_is_refused(tmp_path: Path):
    identity = base_identity(IDENTITY.base, IDENTITY.codec)
    create_store([tmp_path], identity, UNITS, AIO, spares=0)
    with UnitStore([tmp_path], identity, UNITS, AIO) as store:
        write(store, 0, step=0)
    with pytest.raises(StoreError, match="a base with 1 of 3 units; convert the model again"):
        base_files([tmp_path])


def test_what_lands_during_a_sync_waits_for_the_next(tmp_path, monkeypatch):
    """The sync may have begun before it."""
    with opened(created(tmp_path, spares=2)) as store:
        for index in SIZES:
            write(store, index, step=0)
        honest, during = os.fdatasync, []

        def late(fd: int) -> None:
            honest(fd)
            if not during:
                during.append(store._table.current[0])
                write(store, 0, step=1)

        monkeypatch.setattr(os, "fdatasync", late)
        store.sync()
        assert store._table.retired == during
        store.sync()
        assert store._table.retired == []


def test_a_read_waits_for_the_write_before_it(tmp_path, monkeypatch):
    asked, honest_write = threading.Event(), os.pwritev

    def slow(*given) -> int:
        asked.wait(20)
        return honest_write(*given)

    with opened(created(tmp_path)) as store:
        write(store, 0, step=1)
        monkeypatch.setattr(os, "pwritev", slow)
        future = store.write(0, *content(0, 2), step=2)
        honest = store._changed.wait_for

        def wait_for(condition: Callable[[], bool]) -> bool:
            asked.set()  # only now may the write go on
            return honest(condition)

        monkeypatch.setattr(store._changed, "wait_for", wait_for)
        assert read(store, 0) == 2
        future.result()
