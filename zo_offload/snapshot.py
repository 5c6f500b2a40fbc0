"""The exact weights of one step in a directory: a safetensors file a unit, and a manifest.

Replay from the base rebuilds any step, so a snapshot is never needed; it saves the time of replay.
It holds every trainable parameter under its own name (of one that units divide, each unit's file
holds a part) as its fp32 master, which may lag behind the step, and at most one unit is in memory
while it is written or read. What is frozen is the base's, and is not in it. The manifest says what
each file must be and how many steps it carries; nothing is believed before its length and digest
are right.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zo_offload import files
from zo_offload.errors import CheckpointError
from zo_offload.units import Unit
from zo_offload.weights import Weights

FORMAT = 3
MANIFEST = "weights.json"
CHUNK_BYTES = 1 << 24
TOO_MUCH = (RecursionError, OverflowError)  # of brackets, of a number that is no integer


@dataclass(frozen=True)
class UnitFile:
    """A unit's masters.

    Attributes:
        name: Of the file in the snapshot's directory.
        num_bytes: Its length.
        sha256: Its digest, in hexadecimal.
        carries: Number of steps in the masters.
    """

    name: str
    num_bytes: int
    sha256: str
    carries: int


@dataclass(frozen=True)
class Snapshot:
    """A directory that holds the weights after ``step`` steps.

    Attributes:
        directory: Where the files lie.
        step: Number of steps behind them.
        lineage: Digest of the records of those steps: which run, and which line of its history.
        units: The files, in the order of the model's units; of frozen ones there is none.
        frozen: SHA-256 of what is frozen (:meth:`Masters.frozen_sha256`).
    """

    directory: Path
    step: int
    lineage: str
    units: tuple[UnitFile, ...]
    frozen: str

    def check(self, weights: Weights) -> None:
        """Compare every file with the manifest and the model, before anything is changed.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model: a tensor is missing,
                or of another shape or dtype.
        """
        trained = len(_trained(weights))
        if len(self.units) != trained:
            raise CheckpointError(
                f"{self.directory}: {len(self.units)} files, but the model has {trained} units "
                "that are trained; it is of another model, or of another zeroth_order.unit or "
                "device_budget"
            )
        for unit, file in zip(_trained(weights), self.units, strict=True):
            path = self.directory / file.name
            found = _measure(path)
            if found != (file.num_bytes, file.sha256):
                raise CheckpointError(
                    f"{path}: damaged: {found[0]:,} bytes (sha256 {found[1][:12]}...), the "
                    f"manifest says {file.num_bytes:,} ({file.sha256[:12]}...)"
                    "; load another tag, or restore the file from a copy"
                )
            _check_tensors(path, unit, _load(path))  # views of the file

    def check_frozen(self, weights: Weights) -> None:
        """Compare what the snapshot leaves out, where it may be another run's.

        Raises:
            CheckpointError: The frozen weights are others here.
        """
        here = weights.frozen_sha256()
        if here != self.frozen:
            raise CheckpointError(
                f"{self.directory}: beside frozen weights of sha256 "
                f"{self.frozen[:12] or '(none)'}..., here are {here[:12] or '(none)'}...: frozen "
                "weights are not in a checkpoint; use the same base, wire and trainable parameters"
            )

    def restore(self, weights: Weights, behind_only: bool = False) -> None:
        """Put every unit's weights in place; call :meth:`check` first.

        Args:
            weights: Where to.
            behind_only: Leave units that carry as many steps already.

        Raises:
            CheckpointError: A file cannot be read.
        """
        with weights.replacing():
            for unit, file in zip(_trained(weights), self.units, strict=True):
                behind = weights.carried(unit) < file.carries
                if weights.is_mine(unit) and (behind or not behind_only):
                    weights.restore(unit, _load(self.directory / file.name), file.carries)

    def of_unit(
        self, weights: Weights, unit: Unit
    ) -> tuple[Mapping[str, torch.Tensor], int] | None:
        """A unit's masters, and the steps that they carry; None where it has none.

        Call :meth:`check` first.
        """
        for each, file in zip(_trained(weights), self.units, strict=True):
            if each is unit:
                return _load(self.directory / file.name), file.carries
        return None


def write_snapshot(directory: Path, weights: Weights, step: int, lineage: str) -> None:
    """Write all weights, current to ``step``, into an empty directory.

    Raises:
        CheckpointError: The system refuses.
    """
    written: list[list[Any]] = []
    units = _trained(weights)
    count = len(units)
    try:
        for number, unit in enumerate(units, start=1):
            name = f"unit-{number:05}-of-{count:05}.safetensors"
            masters, carries = weights.held(unit)
            save_file(masters, directory / name, {"format": "pt"})
            written.append([name, *_measure(directory / name), carries])
        manifest = {
            "format": FORMAT,
            "step": step,
            "lineage": lineage,
            "frozen": weights.frozen_sha256(),
            "files": written,
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: cannot write the weights: {error}"
            "; make room there, or let this user write"
        ) from error


def read_snapshot(directory: Path) -> Snapshot:
    """A snapshot's manifest.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = directory / MANIFEST
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] == FORMAT:
            units = tuple(
                UnitFile(str(name), int(num_bytes), str(digest), int(carries))
                for name, num_bytes, digest, carries in held["files"]
            )
            snapshot = Snapshot(
                directory, int(held["step"]), str(held["lineage"]), units, str(held["frozen"])
            )
        else:
            snapshot = None
    except (OSError, ValueError, KeyError, TypeError, *TOO_MUCH) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {type(error).__name__}: {error}"
            "; load another tag, or restore it from a copy"
        ) from error
    if snapshot is None:
        raise CheckpointError(
            f"{path}: format {held['format']}, but this zo_offload reads format {FORMAT}"
            "; use the version that wrote it"
        )
    for unit in snapshot.units:
        if Path(unit.name).name != unit.name:
            raise CheckpointError(
                f"{path}: {unit.name!r} is no plain file name; restore it from a copy"
            )
        if not 0 <= unit.carries <= snapshot.step:
            raise CheckpointError(
                f"{path}: {unit.name} carries {unit.carries} of {snapshot.step} steps"
                "; restore it from a copy"
            )
    return snapshot


class Series:
    """The snapshots of one run, every so many steps; the oldest go.

    Args:
        directory: Holds them.
        interval: Steps between two; 0 for none.
        keep: How many stay.
    """

    def __init__(self, directory: Path, interval: int, keep: int) -> None:
        self._directory = directory
        self._interval = interval
        self._keep = keep

    def is_due(self, step: int) -> bool:
        """Whether the weights after ``step`` steps are to be kept."""
        return bool(self._interval) and step > 0 and step % self._interval == 0

    def write(self, weights: Weights, step: int, lineage: str) -> None:
        """Add a snapshot, then let the oldest go.

        Raises:
            CheckpointError: The system refuses; earlier ones are untouched.
        """
        try:
            for later in [path for path in self._paths() if path > self._path(step)]:
                files.remove_directory(later)  # of a branch that is no more
            with files.new_directory(self._path(step)) as aside:
                write_snapshot(aside, weights, step, lineage)
            for old in self._paths()[self._keep :]:
                files.remove_directory(old)
        except OSError as error:
            raise CheckpointError(
                f"{self._directory}: cannot keep a snapshot: {error}"
                "; make room there, or let this user write"
            ) from error

    def read(self, step: int) -> Snapshot:
        """The snapshot of a step.

        Raises:
            CheckpointError: There is none, it is damaged, or it is of another step.
        """
        directory = self._path(step)
        snapshot = read_snapshot(directory)
        if snapshot.step != step:
            raise CheckpointError(
                f"{directory}: holds the weights of step {snapshot.step}"
                "; remove it: an older one is taken, or the journal's steps from the base on"
            )
        return snapshot

    def steps(self) -> list[int]:
        """Of which there are snapshots, newest first."""
        return [int(path.name.removeprefix("step-")) for path in self._paths()]

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:09}"

    def _paths(self) -> list[Path]:
        found = self._directory.glob("step-[0-9]*") if self._directory.is_dir() else ()
        return sorted((p for p in found if p.name[5:].isdecimal()), reverse=True)


def _trained(weights: Weights) -> list[Unit]:
    """Units of which there are masters."""
    return [unit for unit in weights.map.everything if not unit.is_frozen]


def _measure(path: Path) -> tuple[int, str]:
    """A file's length and SHA-256."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}; restore it from a copy"
        ) from error
    return num_bytes, digest.hexdigest()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; restore it from a copy") from error


def _check_tensors(path: Path, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = {s.name: s.shape for span, s in unit.segments if span.trainable}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = next(n for n in {**expected, **found} if expected.get(n) != found.get(n))
        raise CheckpointError(
            f"{path}: {name} is {found.get(name, 'missing')}, the model has "
            f"{expected.get(name, 'none')}; it is of another model"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected torch.float32")
