"""What a replay has finished: a safetensors file for each unit, in a directory beside its output.

A file is written aside, synced, then renamed: one that is there is whole, and is not made again.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from zo_offload import files
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.replay.pieces import Values
from zo_offload.units import ModelMap, Unit

RECORD = "replay.json"
WORK = ".replaying"  # of the directory beside the output
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # of safetensors
TOLD = {"base": "base", "journal": "journal", "lineage": "history", "step": "step"}


@contextmanager
def held(output: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """The directory of a replay that is under way, for this process alone.

    Raises:
        ConfigError: It holds another replay, or something else, or a process is at work there.
    """
    directory = output.with_name(output.name + WORK)
    try:
        _make(directory)
        with files.locked(directory):
            _claim(directory, record)
            yield directory
    except BlockingIOError:
        raise ConfigError(
            f"--out: another process is at work in {directory}; wait for it, or choose another"
        ) from None


def clear(output: Path, record: Mapping[str, Any]) -> None:
    """Remove what a replay that is done has left beside its output."""
    directory = output.with_name(output.name + WORK)
    if directory.is_dir() and refuse_another(directory, record):
        shutil.rmtree(directory)


def refuse_another(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether a directory holds this replay; False where it holds no record.

    Raises:
        ConfigError: It holds another one.
    """
    path = directory / RECORD
    if not path.is_file():
        return False
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        key = next((key for key in record if there.get(key) != record[key]), None)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove {directory}") from error
    if key is not None:
        raise ConfigError(
            f"--out: {directory} holds another replay: its {TOLD[key]} is "
            f"{_short(there.get(key))}, here it is {_short(record[key])}; choose another --out, or "
            f"remove {directory}"
        )
    return True


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Say whose a directory is."""
    files.write_file(directory / RECORD, (json.dumps(dict(record), indent=1) + "\n").encode())


class Shards:
    """The files of a model's units.

    Args:
        directory: Holds them.
        model_map: The units; what lies over others is in no file.
    """

    def __init__(self, directory: Path, model_map: ModelMap) -> None:
        self._directory = directory
        self._count = len(model_map.everything)
        self._over = {overlay.name for overlay in model_map.overlays.values()}

    def has(self, unit: Unit) -> bool:
        """Whether a unit's file is there, whole."""
        return self._path(unit).exists()

    def write(self, unit: Unit, pieces: Iterable[Values]) -> None:
        """Write a unit's file.

        Args:
            unit: Which.
            pieces: Of its parameters, in any order.

        Raises:
            CheckpointError: The system refuses.
        """
        path = self._path(unit)
        aside = path.with_name(path.name + files.ASIDE)
        head, places = self._layout(unit)
        try:
            with aside.open("wb") as file:
                file.write(head)
                file.flush()
                for piece in pieces:
                    if piece.name in places:
                        elements = piece.elements
                        at = len(head) + places[piece.name] + piece.first * elements.itemsize
                        _write(file.fileno(), elements.view(torch.uint8).numpy().data, at)
                os.fsync(file.fileno())
            aside.replace(path)
            files.sync(self._directory)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot write it: {error.strerror or error}; make room, and the same "
                "command goes on"
            ) from error

    def mapped(self, unit: Unit) -> dict[str, torch.Tensor]:
        """A unit's parameters, as views of its file."""
        with safe_open(self._path(unit), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _layout(self, unit: Unit) -> tuple[bytes, dict[str, int]]:
        """A file's header, and where each parameter begins behind it; the widest first."""
        said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for span, segment in sorted(unit.segments, key=lambda each: -each[0].dtype.itemsize):
            if segment.name in self._over:
                continue
            first, end = end, end + segment.numel * span.dtype.itemsize
            places[segment.name] = first
            said[segment.name] = {
                "dtype": NAMES[span.dtype],
                "shape": list(segment.shape),
                "data_offsets": [first, end],
            }
        text = json.dumps(said).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, places

    def _path(self, unit: Unit) -> Path:
        return self._directory / f"unit-{unit.index + 2:05}-of-{self._count:05}.safetensors"


def _write(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def _claim(directory: Path, record: Mapping[str, Any]) -> None:
    if refuse_another(directory, record):
        return
    if any(path.name != files.LOCK and path.suffix != files.ASIDE for path in directory.iterdir()):
        raise ConfigError(f"--out: {directory} holds something else; move it away")
    write_record(directory, record)


def _make(directory: Path) -> None:
    try:
        files.make_directory(directory)
    except OSError as error:
        raise ConfigError(
            f"--out: cannot make {directory}: {error.strerror}; choose another"
        ) from error


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else str(value)
