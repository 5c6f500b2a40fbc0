"""What the system refuses of a store's folders is said: which file, which act, why, the mend."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zo_offload.converted import measure, write_tensors
from zo_offload.errors import StoreError
from zo_offload.integrations import spill
from zo_offload.offload import disk, folders, manifest, sealed
from zo_offload.offload.slot import Identity, StoredUnit

IDENTITY = Identity(run="00" * 16, base="00" * 32, codec="identity")
ONE = manifest.geometry_for(1, [StoredUnit(0, "a", 4, 4, "00" * 32)], 0, 4096)


def hold(path: Path) -> None:
    with folders.held([path]):
        pass


def written(path: Path) -> Path:
    (path / "x").write_bytes(b"x")
    return path / "x"


def refusing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def refused(*given: Any, **named: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(owner, name, refused)


REFUSED: dict[str, tuple[Any, str, Callable[[Path], Any], str]] = {
    "make": (
        folders, "make_directory", lambda path: folders.create_store([path], IDENTITY, []),
        "make it",
    ),
    "hold": (folders, "locked", lambda path: hold(path), "hold it"),
    "check": (Path, "stat", lambda path: folders.check_files([path], ONE, IDENTITY), "look at it"),
    "stat": (Path, "stat", lambda path: disk.allocate([path / "slots"], 1), "look at it"),
    "statvfs": (os, "statvfs", lambda path: disk.allocate([path / "slots"], 1), "ask for its free"),
    "measure": (np, "memmap", lambda path: measure(written(path)), "read it"),
    "clear": (Path, "unlink", lambda path: folders._clear(path, IDENTITY, True), "clear it"),
    "unmark": (Path, "unlink", manifest.unmark_clean, "remove it"),
    "mark": (manifest, "write_file", lambda path: manifest.mark_clean(path, 1, 1), "write it"),
    "seal": (sealed, "write_file", lambda path: sealed.write_sealed(path, 1, {}), "write it"),
    "unseal": (Path, "read_bytes", lambda path: sealed.read_sealed(path, 1, "no"), "read it"),
    "room": (os, "statvfs", spill._room, "ask for its free space"),
    "mounts": (Path, "read_text", spill._is_in_memory, "read it"),
    "place": (os, "stat", spill._is_in_memory, "look at it"),
    "maps": (Path, "open", lambda path: spill.is_in_file(torch.zeros(1)), "read it"),
    "file": (spill, "TemporaryFile", lambda path: spill.in_file(torch.zeros(1), path), "write 4 b"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    owner, call, act, doing = REFUSED[name]
    with monkeypatch.context() as patch:
        refusing(patch, owner, call)
        with pytest.raises(StoreError) as caught:
            act(tmp_path)
    what, _, mend = str(caught.value).partition("; ")
    assert f": cannot {doing}" in what
    assert what.endswith(": Input/output error")
    assert mend == disk.MENDS[errno.EIO]


def test_tensors_that_cannot_be_written_are_named(tmp_path: Path):
    path = tmp_path / "none" / "x.safetensors"
    with pytest.raises(StoreError, match=rf"{path}: cannot write it: .*; make room there, or let"):
        write_tensors(path, {"a": torch.zeros(1)})
