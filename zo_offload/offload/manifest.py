"""What the files of a store are: ``store.json`` in each of its folders (``docs/format.md``)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zo_offload.errors import StoreError
from zo_offload.files import sync, write_file
from zo_offload.offload.aio import PAGE
from zo_offload.offload.disk import errors_of
from zo_offload.offload.sealed import read_sealed, write_sealed
from zo_offload.offload.slot import (
    AGAIN,
    FORMAT_VERSION,
    Identity,
    StoredUnit,
    differences,
)

MANIFEST, SLOTS, CLEAN = "store.json", "units.bin", "clean"
MOST_PATHS, MOST_SLOTS = 1 << 10, 1 << 20
Pages = Annotated[int, Field(ge=PAGE, lt=2**63, multiple_of=PAGE)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Identity(_Strict):
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    base: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    codec: Annotated[str, Field(pattern=r"^[!-~]{1,16}$")]


class _Geometry(_Strict):
    num_paths: Annotated[int, Field(ge=1, le=MOST_PATHS)]
    stripe_bytes: Pages
    slot_bytes: Pages
    num_slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)]


class _Unit(_Strict):
    index: Annotated[int, Field(ge=-(2**31), lt=2**31)]
    name: str
    wire_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    rest_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    shapes: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(_Strict):
    """What ``store.json`` says, of whatever value."""

    path: Annotated[int, Field(ge=0, lt=MOST_PATHS)]
    identity: _Identity
    geometry: _Geometry
    units: list[_Unit]


@dataclass(frozen=True)
class Geometry:
    """Where slots lie.

    Attributes:
        num_paths: Files that the stripes go over.
        stripe_bytes: Of each stripe.
        slot_bytes: Of each slot: the largest unit's.
        num_slots: Units and spares.
    """

    num_paths: int
    stripe_bytes: int
    slot_bytes: int
    num_slots: int

    @property
    def file_bytes(self) -> int:
        """Of each path's file: whole stripes."""
        stripes = -(-self.num_slots * self.slot_bytes // self.stripe_bytes)
        return -(-stripes // self.num_paths) * self.stripe_bytes

    @property
    def total_bytes(self) -> int:
        """Of all paths' files."""
        return self.num_paths * self.file_bytes


def geometry_for(
    num_paths: int, units: Sequence[StoredUnit], spares: int, stripe_bytes: int
) -> Geometry:
    """How much is to be made.

    Example:
        >>> unit = StoredUnit(0, "block", 5000, 100, "00" * 32)
        >>> geometry_for(2, [unit, unit], 2, 4096)
        Geometry(num_paths=2, stripe_bytes=4096, slot_bytes=16384, num_slots=4)
    """
    assert stripe_bytes % PAGE == 0
    slot_bytes = max(unit.slot_bytes for unit in units)
    return Geometry(num_paths, stripe_bytes, slot_bytes, len(units) + spares)


def write_manifests(
    folders: Sequence[Path], geometry: Geometry, identity: Identity, units: Sequence[StoredUnit]
) -> None:
    """Say what the files are; the first folder's comes last, and makes it a store."""
    for place in reversed(range(len(folders))):
        content = {
            "path": place,
            "identity": asdict(identity),
            "geometry": asdict(geometry),
            "units": [asdict(unit) for unit in units],
        }
        write_sealed(folders[place] / MANIFEST, FORMAT_VERSION, content)


def read_manifests(
    folders: Sequence[Path], identity: Identity, units: Sequence[StoredUnit]
) -> Geometry:
    """Where slots lie, after the files are found to be what the caller expects.

    Raises:
        StoreError: One is missing, damaged, or of another format, run, base, codec or model, or
            the paths are others or in another order.
    """
    found: list[Geometry] = []
    for place, folder in enumerate(folders):
        path = folder / MANIFEST
        content = read_sealed(path, FORMAT_VERSION, identity.mend)
        manifest = _checked(path, content, identity.mend)
        found.append(Geometry(**manifest.geometry.model_dump()))
        if found[-1].num_paths != len(folders) or manifest.path != place:
            raise StoreError(
                f"{path}: path {manifest.path + 1} of {found[-1].num_paths} of a store, named as "
                f"path {place + 1} of {len(folders)}; name all of them, in the order of its making"
            )
        differing = differences(Identity(**manifest.identity.model_dump()), identity)
        stored = [StoredUnit(**unit.model_dump()) for unit in manifest.units]
        differing += _differing_units(stored, units)
        if differing:
            raise StoreError(f"{path}: weights of something else: {differing[0]}; {identity.mend}")
        if found[-1] != found[0]:
            raise StoreError(
                f"{path}: of another size than {folders[0] / MANIFEST}; {identity.mend}"
            )
    return found[0]


def _checked(path: Path, content: dict[str, Any], mend: str) -> _Manifest:
    """A sum that is right says nothing of who made the file."""
    try:
        return _Manifest.model_validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise StoreError(f"{path}: damaged at {where}; {mend}") from error


def manifest_run(path: Path) -> str:
    """The run that a folder's manifest names."""
    return _checked(path, read_sealed(path, FORMAT_VERSION, AGAIN), AGAIN).identity.run


def mark_clean(folder: Path, sequence: int, life_bytes: int) -> None:
    """Say, durably, that all slots are whole."""
    content = {"sequence": sequence, "life_bytes": life_bytes}
    path = folder / CLEAN
    with errors_of(path, "write it"):
        write_file(path, json.dumps(content).encode())


def read_clean(folder: Path) -> tuple[int, int] | None:
    """The last sequence number and the bytes written in all; None after an unclean end."""
    try:
        content = json.loads((folder / CLEAN).read_bytes())
        return int(content["sequence"]), int(content["life_bytes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None  # everything is verified then


def unmark_clean(folder: Path) -> None:
    """Take the mark away, durably, before anything is written."""
    with errors_of(folder / CLEAN, "remove it"):
        (folder / CLEAN).unlink(missing_ok=True)
        sync(folder)


def _differing_units(found: Sequence[StoredUnit], expected: Sequence[StoredUnit]) -> list[str]:
    if len(found) != len(expected):
        return [f"units: the disk has {len(found)}, this run has {len(expected)}"]
    return [
        f"{a}: {line}" for a, b in zip(found, expected, strict=True) for line in differences(a, b)
    ]
