"""Small units, and bytes that tell which unit and step they are of."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zo_offload.offload.aio import PAGE, Aio
from zo_offload.offload.disk import aligned
from zo_offload.offload.folders import create_store
from zo_offload.offload.nvme import UnitStore
from zo_offload.offload.slot import Identity, StoredUnit

AIO = Aio(block_size=PAGE, queue_depth=4)
IDENTITY = Identity("ab" * 16, "cd" * 32, "bf16")
SIZES = {0: (2 * PAGE, PAGE), 1: (PAGE + 100, 77), -1: (3 * PAGE, 0)}


def unit(index: int, wire_bytes: int, rest_bytes: int) -> StoredUnit:
    shapes = hashlib.sha256(f"{index} {wire_bytes} {rest_bytes}".encode()).hexdigest()
    name = f"layers.{index}" if index >= 0 else ""
    return StoredUnit(index, name, wire_bytes, rest_bytes, shapes)


UNITS = [unit(index, *sizes) for index, sizes in SIZES.items()]


def content(index: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Wire and rest of a unit after a step."""
    wire, rest = (aligned(num_bytes) for num_bytes in SIZES[index])
    for seed, part in enumerate((wire, rest)):
        part.copy_((torch.arange(part.numel()) * 7 + step * 31 + index * 13 + seed) % 251)
    return wire, rest


def folders(path: Path, count: int = 1) -> list[Path]:
    return [path / f"disk{i}" for i in range(count)]


def created(path: Path, count: int = 1, spares: int = 2) -> list[Path]:
    places = folders(path, count)
    create_store(places, IDENTITY, UNITS, AIO, spares)
    return places


def opened(places: Sequence[Path], **given: Any) -> UnitStore:
    return UnitStore(places, IDENTITY, UNITS, AIO, **given)


def write(store: UnitStore, index: int, step: int, branch: int = 0) -> None:
    store.write(index, *content(index, step), step, branch).result()


def read(store: Any, index: int) -> int:
    """The step of a unit, after its bytes are found to be of that step."""
    wire, rest = (aligned(num_bytes) for num_bytes in SIZES[index])
    step = store.read(index, wire, rest).result()
    expected = content(index, step)
    assert torch.equal(wire, expected[0])
    assert torch.equal(rest, expected[1])
    return step


def steps(store: Any) -> dict[int, int]:
    return {index: read(store, index) for index in SIZES}
