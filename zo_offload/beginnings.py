"""What a unit's weights can be replayed from: the run's own snapshots, and the base as files."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from zo_offload.agreement import Beginning
from zo_offload.errors import ModelError, StoreError
from zo_offload.integrations.hf import load_model
from zo_offload.kinds import kind_of_architecture
from zo_offload.parts import part_of
from zo_offload.resting import fill_unit
from zo_offload.resume import usable
from zo_offload.snapshot import Series
from zo_offload.step import Stepper
from zo_offload.units import AMBIENT, Unit


def beginnings(stepper: Stepper, series: Series | None, unit: Unit) -> Iterator[Beginning]:
    """From the latest snapshot that holds all of the unit, to the base.

    The base is what the run was told of: a converted model's files, or the directory that a Hugging
    Face model was loaded from. Whether it is what the run began with shows in the bits.
    """
    names = {segment.name for _, segment in unit.segments}
    snapshots = usable(stepper, series, stepper.step) if series is not None else ()
    for snapshot in snapshots:
        found = snapshot.of_unit(stepper.weights, unit)
        if found is not None and names <= found[0].keys():
            yield partial(fill_unit, unit, found[0]), found[1]
    base = stepper.weights.base
    if base is not None and unit.index != AMBIENT:
        yield partial(base.fill, unit), 0
    elif (directory := _directory(stepper)) is not None:
        try:
            kind = kind_of_architecture(type(stepper.model).__name__)
            given = dict(load_model(directory, kind=kind).named_parameters())
        except (ModelError, StoreError):
            return
        if names <= given.keys():
            values = {s.name: part_of(given[s.name].detach(), s) for _, s in unit.segments}
            yield partial(fill_unit, unit, values), 0


def _directory(stepper: Stepper) -> Path | None:
    name = getattr(stepper.model, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None
