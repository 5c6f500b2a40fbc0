"""A converted model: its units lie on disk as stores hold them, so that a run opens it in seconds.

::

    DIR/base.json             what was converted, and for which settings; written last
    DIR/config.json, ...      as in any Hugging Face directory, the tokenizer's files too
    DIR/ambient.safetensors   ambient parameters
    DIR/buffers.safetensors   buffers, those that no checkpoint holds too
    DIR/units/                the units (``offload/base_files.py``), perhaps striped over more disks

Where parameters of a plain checkpoint have to be read, rounded, laid out and digested before a run
can begin, here all that is done. Any number of runs read the files; none writes them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from zo_offload.errors import StoreError
from zo_offload.offload.aio import Aio
from zo_offload.offload.base_files import BaseFiles
from zo_offload.offload.disk import aligned, errors_of
from zo_offload.offload.manifest import MANIFEST
from zo_offload.offload.sealed import read_sealed, write_sealed
from zo_offload.offload.slot import CONVERT_AGAIN as AGAIN
from zo_offload.offload.staged import stored
from zo_offload.ops import crc32c
from zo_offload.units import IDENTITY, ModelMap, Unit

FORMAT = 2
RECORD, UNITS, AMBIENT_FILE, BUFFERS_FILE = (
    "base.json", "units", "ambient.safetensors", "buffers.safetensors",
)  # fmt: skip
CONFIG = "this run's config"
SAID = {"packed": "frozen weights packed by", "frozen": "a number of frozen weights of"}
Shape = tuple[int, ...]


class Record(BaseModel):
    """What ``base.json`` says.

    Attributes:
        sha256: Digest of the base weights, as a journal's header names it.
        unit: How blocks were divided: a granularity or names of classes.
        master: What updates accumulate in.
        forward: What forwards compute in: names of dtypes.
        packed: Codecs by which frozen parameters rest packed.
        frozen: How many of the units' parameters are frozen.
        parameters: Shape and dtype that each parameter came with.
        squares: Sum of squares of each parameter, for ``direction_scale: rms``.
        folders: Further ones that the units are striped over, absolute.
        files: Length and CRC-32C of the files that are read when it is opened.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: str
    unit: str | list[str]
    master: str
    forward: list[str]
    packed: list[str]
    frozen: int
    parameters: dict[str, tuple[list[int], str]]
    squares: dict[str, float]
    folders: list[str]
    files: dict[str, tuple[int, int]]

    @property
    def settings(self) -> dict[str, Any]:
        """What the layout of units depends on."""
        return {
            "unit": self.unit,
            "master": self.master,
            "forward": self.forward,
            "packed": self.packed,
            "frozen": self.frozen,
        }


@dataclass(frozen=True)
class Converted:
    """A converted model's directory.

    Attributes:
        directory: Its path.
        record: What it says of itself.
    """

    directory: Path
    record: Record

    def open(self, model_map: ModelMap, master: str, aio: Aio) -> "Base":
        """The units' files, which must be laid out as this run lays units out.

        Raises:
            StoreError: They are not, or are missing, unfinished or damaged.
        """
        ours = layout_settings(model_map, master)
        for name, theirs in self.record.settings.items():
            if theirs != ours[name]:
                chosen = name in SAID  # by what freezes weights, which converting does not know
                mend = "give the model that was converted" if chosen else f"{AGAIN}, with {CONFIG}"
                raise StoreError(
                    f"{self.directory}: converted with {SAID.get(name, name)} {_said(theirs)}, but "
                    f"this run has {_said(ours[name])}; use that, or {mend}"
                )
        folders = [self.directory / UNITS, *map(Path, self.record.folders)]
        units = [stored(each) for each in model_map.units]
        files = BaseFiles(folders, self.record.sha256, IDENTITY, units, aio)
        return Base(files, self.record.sha256)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What one of the small files holds, mapped into memory.

        Raises:
            StoreError: It is missing or damaged.
        """
        path = self.directory / name
        if self.record.files.get(name) != measure(path):
            raise StoreError(f"{path}: damaged: not what {RECORD} says; {AGAIN}")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path}: cannot be read: {error}; {AGAIN}") from error


@dataclass(frozen=True)
class Base:
    """Opened units of a converted model.

    Attributes:
        files: Where they are read from.
        sha256: Digest of the base weights.
    """

    files: BaseFiles
    sha256: str

    def fill(self, unit: Unit, wire: torch.Tensor, rest: torch.Tensor) -> None:
        """Write what a unit came with to memory of any device."""
        if wire.device.type == "cpu":
            self.files.read(unit.index, wire, rest).result()
            return
        parts = aligned(unit.wire_bytes), aligned(unit.rest_bytes)
        self.files.read(unit.index, *parts).result()
        wire.copy_(parts[0])
        rest.copy_(parts[1])


def layout_settings(model_map: ModelMap, master: str) -> dict[str, Any]:
    """What a run's layout of units depends on, as :class:`Record` has it."""
    spans = [span for unit in model_map.units for span in unit.spans]
    forward = {str(span.dtype).removeprefix("torch.") for span in spans}
    division = model_map.division
    unit = division if isinstance(division, str) else list(division)
    return {
        "unit": unit,
        "master": master,
        "forward": sorted(forward),
        "packed": sorted({span.codec for span in spans if span.rests_packed}),
        "frozen": sum(s.numel for span in spans if not span.trainable for s in span.segments),
    }


def is_converted(directory: str | Path) -> bool:
    """Whether it holds a converted model."""
    return (Path(directory) / RECORD).is_file()


def refuse_unfinished(directory: Path) -> None:
    """Whether there is a converted model's rest, of which the record is missing.

    Raises:
        StoreError: There is.
    """
    units = directory / UNITS / MANIFEST
    if units.is_file() and not is_converted(directory):
        raise StoreError(f"{directory / RECORD}: missing from a converted model; {AGAIN}")


def read_converted(directory: Path) -> Converted:
    """A converted model, as far as its record goes.

    Raises:
        StoreError: The record is missing, damaged or of another format.
    """
    content = read_sealed(directory / RECORD, FORMAT, AGAIN)
    try:
        return Converted(directory, Record.model_validate_json(json.dumps(content)))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise StoreError(f"{directory / RECORD}: damaged at {where}; {AGAIN}") from error


def write_converted(directory: Path, record: Record) -> None:
    """Write the record, which makes the directory a converted model."""
    write_sealed(directory / RECORD, FORMAT, record.model_dump(mode="json"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Write a small file; gives its length and CRC-32C.

    Raises:
        StoreError: The system refuses.
    """
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        raise StoreError(
            f"{path}: cannot write it: {error}; make room there, or let this user write"
        ) from error
    found = measure(path)
    assert found is not None
    return found


def measure(path: Path) -> tuple[int, int] | None:
    """Length and CRC-32C of a file; None where there is none, or an empty one."""
    if not path.is_file() or not path.stat().st_size:
        return None
    with errors_of(path, "read it"):
        content = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    return len(content), crc32c(content)


def converted_of(model: nn.Module) -> Converted | None:
    """Where a model's values are, if they are in a converted model's files and not in memory."""
    return _models.get(model)


def mark_converted(model: nn.Module, converted: Converted | None) -> None:
    """Say where a model's values are; None: in memory, or in a store."""
    if converted is None:
        _models.pop(model, None)
    else:
        _models[model] = converted


_models: "WeakKeyDictionary[nn.Module, Converted]" = WeakKeyDictionary()


def _said(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else " and ".join(value) or "none"
