"""``zo-offload convert``: lay a model's units out on disk once, for any number of runs."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload import direction
from zo_offload.config import load_json
from zo_offload.converted import (
    AMBIENT_FILE,
    BUFFERS_FILE,
    UNITS,
    Record,
    is_converted,
    layout_settings,
    read_converted,
    write_converted,
    write_tensors,
)
from zo_offload.deepspeed_json import read_settings
from zo_offload.errors import ConfigError
from zo_offload.fresh import fresh_directory, refuse_what_is_there
from zo_offload.integrations.hf import load_image_processor, load_model, save_tokenizer
from zo_offload.integrations.model_kind import kind_of
from zo_offload.integrations.skeleton import shapes_of, skeleton
from zo_offload.offload.aio import Aio
from zo_offload.offload.base_files import base_identity
from zo_offload.offload.folders import create_store
from zo_offload.offload.nvme import UnitStore
from zo_offload.offload.residency import HOST, NVME
from zo_offload.offload.run_files import Disk
from zo_offload.offload.staged import stored
from zo_offload.placement import Placement
from zo_offload.placing import Placing
from zo_offload.reporter import Reporter
from zo_offload.units import AMBIENT, IDENTITY, ModelMap
from zo_offload.weights import Weights

CPU = torch.device("cpu")
ANY = {"train_batch_size": 1, "zeroth_order": {}}


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        directory: The converted model.
        num_units: In it.
        parameters: In all of it.
        disk_bytes: Of the units' files.
        settings: What the config of a run must agree with.
        has_tokenizer: Whether one was found beside the model.
        seconds: That it took.
    """

    directory: Path
    num_units: int
    parameters: int
    disk_bytes: int
    settings: dict[str, Any]
    has_tokenizer: bool
    seconds: float


def convert(
    model_name: str,
    output: str | Path,
    config: str | Path | None = None,
    stripes: Sequence[str | Path] = (),
    reporter: Reporter | None = None,
) -> Conversion:
    """Write a model's units as a run of this config holds them.

    Args:
        model_name: Hugging Face directory or model id.
        output: A directory to make.
        config: DeepSpeed JSON: its precision, ``unit`` and ``master`` decide how units lie
            (default: the model's own precision, whole blocks, fp32).
        stripes: Further directories to make, on other disks: bytes are striped over all.
        reporter: Told of what is done.

    Raises:
        ConfigError: An output is there already, or the config is wrong.
        ModelError: The model cannot be loaded, or not be opened again from what was written.
        StoreError: There is no room, or the system refuses. Nothing is left behind.
    """
    began, reporter = time.monotonic(), reporter or Reporter()
    settings = read_settings(load_json(config) if config else ANY)
    folders = [Path(output), *map(Path, stripes)]
    refuse_what_is_there(folders)
    with reporter.phase(f"loading {model_name}"):
        if is_converted(model_name):
            raise ConfigError(
                f"--model: {model_name} is a converted model already"
                "; give it to zo-offload train, or the model it was made of"
            )
        model, kind = load_model(model_name, folders), kind_of(model_name)
    placing = Placing(model, settings.zeroth_order, CPU, settings.dtype, {})
    writer = _Writer(model, placing, reporter)
    with ExitStack() as stack:
        aside = [stack.enter_context(fresh_directory(folder)) for folder in folders]
        record = writer.write(aside, [str(folder.absolute()) for folder in folders[1:]])
        model.config.save_pretrained(aside[0])
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(aside[0])
        has_tokenizer = kind == "image" or save_tokenizer(model_name, aside[0])
        if kind == "image":
            load_image_processor(model_name).save_pretrained(str(aside[0]))
        write_converted(aside[0], record)
        skeleton(read_converted(aside[0]), model.config, kind)  # or it could not be opened
    model_map = writer.map
    return Conversion(
        folders[0],
        len(model_map.units),
        model_map.num_parameters,
        writer.disk_bytes,
        record.settings,
        has_tokenizer,
        time.monotonic() - began,
    )


@dataclass
class _Writer:
    """Lays a model out."""

    model: nn.Module
    placing: Placing
    reporter: Reporter

    def __post_init__(self) -> None:
        self.map: ModelMap = self.placing.map()
        self.aio: Aio = self.placing.aio
        self.disk_bytes = 0

    def write(self, aside: Sequence[Path], further: list[str]) -> Record:
        """Write all files but the record.

        Args:
            aside: Directories, which will be renamed.
            further: Where those after the first will be.
        """
        shapes = shapes_of(self.model)
        squares = {n: direction.square(p) for n, p in self.model.named_parameters()}
        named = self.map.parameters
        ambient = {segment.name: named[segment.name] for _, segment in self.map.ambient.segments}
        others = {n: p for n, p in self.model.named_parameters() if n not in named}
        small = {
            AMBIENT_FILE: write_tensors(aside[0] / AMBIENT_FILE, {**ambient, **others}),
            BUFFERS_FILE: write_tensors(aside[0] / BUFFERS_FILE, _buffers(self.model)),
        }
        sha256 = self._write_units([aside[0] / UNITS, *aside[1:]])
        layout = layout_settings(self.map, self.placing.config.master)
        return Record(
            sha256=sha256,
            parameters=shapes,
            squares=squares,
            folders=further,
            files=small,
            **layout,
        )

    def _write_units(self, folders: Sequence[Path]) -> str:
        """Gives the digest of the base weights."""
        with closing(self._weights(folders)) as weights:
            with self.reporter.phase("computing the digest of the weights"):
                sha256 = weights.digest()
            units = [stored(unit) for unit in self.map.units]
            identity = base_identity(sha256, IDENTITY)
            create_store(folders, identity, units, self.aio, spares=0)
            with UnitStore(folders, identity, units, self.aio) as store:
                self.disk_bytes = store.held_bytes
                counted = self.reporter.counted("writing units", self.map.units, len(units))
                for unit in counted:
                    with weights.lent(unit) as lease:
                        store.write(unit.index, lease.wire, lease.rest, step=0).result()
        return sha256

    def _weights(self, folders: Sequence[Path]) -> Weights:
        """Laid out one unit at a time, of what the model has mapped into memory."""
        tiers = {unit.index: NVME for unit in self.map.units} | {AMBIENT: HOST}
        disk = Disk(tuple(folders), self.aio, lambda step: None, lambda step: 0)
        return Weights(self.model, self.map, Placement(CPU, tiers, disk=disk), "rademacher")


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies, under every name: a checkpoint's may share memory, and some no checkpoint holds."""
    return {
        f"{path}.{name}".lstrip("."): buffer.detach().clone()
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
