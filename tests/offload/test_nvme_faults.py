"""What is damaged, cut off, lost or refused: found, named, and the newest whole version serves."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
    write,
)
from zo_offload.errors import StoreError
from zo_offload.offload import slot as slot_module
from zo_offload.offload.aio import PAGE
from zo_offload.offload.nvme import UnitStore
from zo_offload.offload.sealed import read_sealed, write_sealed
from zo_offload.offload.slot import SlotHeader, parse

SLOT_BYTES = 4 * PAGE
PARTS = {"wire": PAGE + 5, "rest": 3 * PAGE + 4000}  # of unit 0
FIELDS = {
    "magic": 0,
    "version": 8,
    "branch": 12,
    "run": 20,
    "base": 40,
    "shapes": 80,
    "codec": 114,
    "unit": 128,
    "zero": 132,
    "step": 136,
    "sequence": 144,
    "lengths": 153,
    "CRCs": 170,
    "life": 178,
    "unused": 2000,
    "CRC": 4094,
}


def flip(path: Path, at: int, bit: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def slot_of(path: Path, index: int) -> int:
    """Where a unit's newest version lies, by the headers alone."""
    data = path.read_bytes()
    found = []
    for at in range(0, len(data) - SLOT_BYTES + 1, SLOT_BYTES):
        header = parse(data[at : at + PAGE])
        if header and header.unit == index:
            found.append((header.sequence, at))
    return max(found)[1]


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """Every unit at steps 1 and 2, each in a slot of its own, closed."""
    places = created(tmp_path, spares=4)
    with opened(places) as store:
        for step in (1, 2):
            for index in SIZES:
                write(store, index, step)
    return places


@pytest.fixture
def path(places: list[Path]) -> Path:
    return places[0] / "units.bin"


def is_clean(places: list[Path]) -> bool:
    return (places[0] / "clean").exists()


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_named_when_it_is_read(places: list[Path], path: Path, part: str):
    at = slot_of(path, 0)
    flip(path, at + PARTS[part])
    message = (
        rf"{path}: unit 0 \(layers.0\), step 2, in the slot at offset {at:,}: its {part} has "
        "CRC-32C [0-9a-f]{8}, written with [0-9a-f]{8}; the disk or memory is at fault"
    )
    with opened(places) as store:
        with pytest.raises(StoreError, match=message):
            read(store, 0)
        assert read(store, 1) == 2
    assert not is_clean(places)
    with opened(places) as store:  # says so and serves what is left
        (torn,) = store.torn
        assert torn.startswith(f"unit 0 (layers.0), step 2: its {part} has CRC-32C")
        assert steps(store) == {0: 1, 1: 2, -1: 2}


def test_a_damaged_wire_is_found_without_the_rest(places: list[Path], path: Path):
    flip(path, slot_of(path, 0) + PARTS["wire"])
    with opened(places) as store, pytest.raises(StoreError, match="its wire has CRC-32C"):
        store.read(0, content(0, 0)[0]).result()


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_in_a_header_costs_one_version(tmp_path: Path, field: str):
    """The older one serves, after all bytes were compared."""
    places = created(tmp_path)
    path = places[0] / "units.bin"
    with opened(places) as store:
        for step in (1, 2):
            write(store, 0, step)
    at = slot_of(path, 0)
    flip(path, at + FIELDS[field])
    with opened(places) as store:
        assert store.torn == [f"slot {at // SLOT_BYTES}: its header is damaged"]
        assert read(store, 0) == 1


@pytest.mark.parametrize("part", PARTS)
def test_after_a_crash_a_torn_version_gives_way_to_the_older(tmp_path: Path, part: str):
    places = created(tmp_path)
    path = places[0] / "units.bin"
    with opened(places) as store:
        for step in (1, 2):
            for index in (0, 1):
                write(store, index, step)
    flip(path, slot_of(path, 0) + PARTS[part])
    (places[0] / "clean").unlink()
    with opened(places) as store:
        assert len(store.torn) == 1
        assert (read(store, 0), read(store, 1)) == (1, 2)
    with opened(places) as store:  # a clean end does not bring the torn one back
        assert store.torn == []
        assert (read(store, 0), read(store, 1)) == (1, 2)


def test_a_unit_without_a_whole_version_is_reported(places: list[Path], path: Path):
    for at in range(0, path.stat().st_size, SLOT_BYTES):
        header = parse(path.read_bytes()[at : at + PAGE])
        if header and header.unit == 1:
            flip(path, at + PAGE)
    (places[0] / "clean").unlink()
    with opened(places) as store:
        assert store.missing == [1]
        assert store.version(1) is None
        with pytest.raises(StoreError, match=r"no version of unit 1 \(layers.1\) is whole"):
            read(store, 1)
        write(store, 1, step=0)  # the owner restores it
        assert steps(store) == {0: 2, 1: 0, -1: 2}


def test_an_unreadable_sector_counts_as_damage(places, path, monkeypatch):
    at, honest = slot_of(path, 0), os.preadv
    (places[0] / "clean").unlink()

    def failing(fd: int, views: list[memoryview], offset: int) -> int:
        if offset == at + PAGE:
            raise OSError(errno.EIO, "Input/output error")
        return honest(fd, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with opened(places) as store:
        (torn,) = store.torn
        assert "cannot read 4,096 bytes at offset" in torn
        assert steps(store) == {0: 1, 1: 2, -1: 2}


def test_a_file_cut_short_is_named(places: list[Path], path: Path):
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(StoreError, match=f"{path}: {size - 1:,} bytes, but {size:,} were made"):
        opened(places)


@pytest.mark.parametrize("name", ["units.bin", "store.json"])
def test_a_missing_file_is_named(places: list[Path], name: str):
    (places[0] / name).unlink()
    with pytest.raises(StoreError, match=f"{name}: cannot .*No such file or directory"):
        opened(places)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(StoreError, match="nowhere: cannot hold it: No such file or directory"):
        opened([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (replace(IDENTITY, run="12" * 16), "run: the disk has 'abab"),
        (replace(IDENTITY, base="00" * 32), "base: the disk has 'cdcd"),
        (replace(IDENTITY, codec="int8"), "codec: the disk has 'bf16', this run has 'int8'"),
    ],
)
def test_weights_of_something_else_are_refused(places, identity, name):
    message = f"store.json: weights of something else: {name}.*; remove its folder"
    with pytest.raises(StoreError, match=message):
        UnitStore(places, identity, UNITS, AIO)


def test_another_model_is_refused(places: list[Path]):
    shapes = [replace(UNITS[0], shapes="00" * 32), *UNITS[1:]]
    with pytest.raises(StoreError, match=r"unit 0 \(layers.0\): shapes: the disk has '"):
        UnitStore(places, IDENTITY, shapes, AIO)
    with pytest.raises(StoreError, match="units: the disk has 3, this run has 2"):
        UnitStore(places, IDENTITY, UNITS[:2], AIO)


def test_slots_of_another_run_are_refused(places: list[Path], path: Path):
    """A file put in the place of another, under the right manifest."""
    other = replace(IDENTITY, run="11" * 16)
    header = SlotHeader(other, 0, UNITS[0].shapes, 0, 9, 99, *SIZES[0], 0, 0, 0)
    with path.open("r+b") as file:
        file.write(header.pack().numpy().tobytes())
    with pytest.raises(StoreError, match="slot 0 at offset 0 is of something else: run: the disk"):
        opened(places)


def test_another_format_is_refused(places, monkeypatch):
    monkeypatch.setattr(slot_module, "FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match="slot format 1, but this zo_offload reads format 2; use"):
        opened(places)
    manifest = places[0] / "store.json"
    write_sealed(manifest, 7, read_sealed(manifest, 1, ""))
    with pytest.raises(StoreError, match="format 7, but this zo_offload reads format 1; "):
        opened(places)


def rewritten(path: Path, **changes: Any) -> None:
    """With a right sum."""
    write_sealed(path, 1, {**read_sealed(path, 1, ""), **changes})


def test_a_manifest_of_our_sum_and_not_of_our_making_is_refused(places: list[Path]):
    path = places[0] / "store.json"
    rewritten(path, geometry={**read_sealed(path, 1, "")["geometry"], "num_slots": "many"})
    words = rf"^{path}: damaged at geometry\.num_slots; .*remove its folder"
    with pytest.raises(StoreError, match=words):
        opened(places)


def test_folders_of_two_sizes_are_refused(tmp_path: Path):
    places = created(tmp_path, 2)
    first, second = (place / "store.json" for place in places)
    geometry = read_sealed(second, 1, "")["geometry"]
    rewritten(second, geometry={**geometry, "num_slots": geometry["num_slots"] + 1})
    with pytest.raises(StoreError, match=f"^{second}: of another size than {first}; .*remove its"):
        opened(places)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_damaged_manifest_is_refused_or_means_the_same(manifest: Path, place: float, bit: int):
    """White space may change; nothing else."""
    text = manifest.read_bytes()
    at = int(place * len(text))
    changed = text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]
    manifest.write_bytes(changed)
    refusal = refusal_of([manifest.parent])
    manifest.write_bytes(text)
    if refusal is None:
        assert json.loads(changed) == json.loads(text)
    else:
        assert refusal.startswith(f"{manifest}: damaged; ")


def refusal_of(places: list[Path]) -> str | None:
    try:
        opened(places).close()
    except StoreError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return created(tmp_path_factory.mktemp("store"))[0] / "store.json"


def test_paths_in_another_order_are_refused(tmp_path: Path):
    places = created(tmp_path, 2)
    with pytest.raises(StoreError, match="path 2 of 2 of a store, named as path 1 of 2; name all"):
        opened(places[::-1])
    with pytest.raises(StoreError, match="path 1 of 2 of a store, named as path 1 of 1"):
        opened(places[:1])


def failing_once(name: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses one call, with a full disk."""
    honest, calls = getattr(os, name), []

    def call(*given: object) -> int:
        calls.append(given)
        if len(calls) == after + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(*given)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("after", [0, 2, 3])  # the first part, the last, the header
def test_a_refused_write_leaves_the_version_before(places, monkeypatch, after):
    with opened(places) as store:
        failing_once("pwritev", after, monkeypatch)
        with pytest.raises(StoreError, match="No space left on device; free some space there"):
            write(store, 0, step=3)
        assert read(store, 0) == 2
        for step in range(4, 9):  # and its slot is not lost
            write(store, 0, step)
        assert steps(store) == {0: 8, 1: 2, -1: 2}
    assert not is_clean(places)
    with opened(places) as store:
        assert steps(store) == {0: 8, 1: 2, -1: 2}
    assert is_clean(places)


def test_after_a_failed_sync_nothing_is_written(places, path, monkeypatch):
    with opened(places) as store:
        write(store, 0, step=3)
        failing_once("fdatasync", 0, monkeypatch)
        with pytest.raises(StoreError, match=f"{path}: cannot sync it: No space left"):
            store.sync()
        with pytest.raises(StoreError, match="nothing is written after that: start again"):
            write(store, 0, step=4)
        with pytest.raises(StoreError, match="nothing is written after that: start again"):
            store.sync()
        assert read(store, 0) == 3
    assert not is_clean(places)


def test_the_clean_mark_goes_before_the_first_write(places, monkeypatch):
    """Else a crash would leave slots that are believed."""
    seen = []
    honest = os.pwritev

    def watched(*given) -> int:
        seen.append(is_clean(places))
        return honest(*given)

    monkeypatch.setattr(os, "pwritev", watched)
    with opened(places) as store:
        steps(store)
        assert is_clean(places)
        write(store, 0, step=3)
    assert seen
    assert not any(seen)
    assert is_clean(places)


def test_a_mark_of_other_slots_is_not_believed(places: list[Path], path: Path):
    """A mark that stayed, or was copied, without the slots that it is about."""
    old = (places[0] / "clean").read_bytes()
    with opened(places) as store:
        write(store, 0, step=3)
    (places[0] / "clean").write_bytes(old)
    flip(path, slot_of(path, 0) + PAGE)
    with opened(places) as store:
        assert len(store.torn) == 1
        assert not is_clean(places)


def test_after_a_crash_what_was_found_is_synced_before_anything_is_written(places, monkeypatch):
    """Else the older versions, whose slots are free now, would be all that is durable."""
    (places[0] / "clean").unlink()
    calls = []
    for name in ("pwritev", "fdatasync"):
        honest = getattr(os, name)

        def seen(*given, name=name, honest=honest):
            calls.append(name)
            return honest(*given)

        monkeypatch.setattr(os, name, seen)
    with opened(places) as store:
        write(store, 0, step=3)
    assert calls[0] == "fdatasync"
