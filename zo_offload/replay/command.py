"""``zo-offload replay``: a step's weights as a plain Hugging Face directory, or a check of one."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from zo_offload import files
from zo_offload.errors import CheckpointError, ConfigError, JournalError
from zo_offload.fresh import refuse_what_is_there
from zo_offload.integrations.hf import load_model, save_processor
from zo_offload.journal import Journal
from zo_offload.journal.header import as_stored, canonical
from zo_offload.replay.compare import compare, units_to_write, what_is_written
from zo_offload.replay.pieces import Pieces
from zo_offload.replay.setting import Setting, open_setting, read_steps
from zo_offload.replay.shards import Shards, clear, held, refuse_another, write_record
from zo_offload.reporter import Reporter
from zo_offload.units import ModelMap
from zo_offload.views import nothing


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay.

    Attributes:
        base: Directory or model id that the run began with.
        journal: The run's.
        out: A directory to make; with ``verify``, one to compare.
        to: Steps to take (default: all).
        verify: Write nothing.
        threads: Of the kernels (default: torch's).
        config: The run's JSON, or its file, which is asked for what the journal has a digest of
            alone.
    """

    base: str
    journal: str
    out: str
    to: int | None = None
    verify: bool = False
    threads: int | None = None
    config: str | Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Replayed:
    """What was done.

    Attributes:
        directory: Written, or compared.
        step: Steps behind the weights.
        parameters: Of the model.
        kept: Units that an earlier process had finished.
        compared: Tensors that are equal; None where they were written.
        seconds: That it took.
        was_there: Whether it had been done before.
    """

    directory: Path
    step: int
    parameters: int
    kept: int = 0
    compared: int | None = None
    seconds: float = 0.0
    was_there: bool = False


def replay(options: ReplayOptions, reporter: Reporter | None = None) -> Replayed:
    """Rebuild the weights after a step from the base and the journal of a run.

    Args:
        options: What, and where to.
        reporter: Told of what is done.

    Raises:
        JournalError: The journal is damaged, holds fewer steps, or is not of this base.
        ModelError: The base cannot be loaded.
        ConfigError: The output is there already, or holds another replay.
        CheckpointError: With ``verify``, the first tensor that differs; else the system refuses.
    """
    reporter, began, out = reporter or Reporter(), time.monotonic(), Path(options.out)
    with reporter.phase(f"reading {options.journal}"):
        journal = read_steps(options.journal, options.to)
    record = record_of(journal)
    if not options.verify and refuse_another(out, record):
        clear(out.resolve(), record)
        return Replayed(out, journal.next_step, 0, was_there=True)
    if options.verify and not out.is_dir():
        raise ConfigError(
            f"--verify: compares what --out holds, and there is no directory {out}; name an export"
        )
    if not options.verify:
        refuse_what_is_there([out])
    with _threads(options.threads):
        with reporter.phase(f"loading {options.base}"):
            setting = open_setting(options.base, journal, options.config, [out.parent])
        pieces = Pieces(setting)
        with reporter.phase("computing the digest of the base"):
            _check_base(options, setting, pieces)
        if options.verify:
            with reporter.phase(f"loading {out}"):
                there = load_model(out, [out.parent])
            compared = compare(setting, pieces, there, out, reporter)
            kept = 0
        else:
            compared, kept = None, _write(options, setting, pieces, record, reporter)
    return Replayed(
        out, setting.step, setting.map.num_parameters, kept, compared, time.monotonic() - began
    )


def record_of(journal: Journal) -> dict[str, Any]:
    """What makes a replay this one."""
    fields = journal.header.fields
    return {
        "base": fields["base_sha256"],
        "journal": hashlib.sha256(canonical(as_stored(fields))).hexdigest(),
        "step": journal.next_step,
        "lineage": journal.records.lineage(),
    }


def _check_base(options: ReplayOptions, setting: Setting, pieces: Pieces) -> None:
    found, wanted = pieces.base_sha256(), setting.header["base_sha256"]
    if found != wanted:
        raise JournalError(
            f"{options.base}: its weights have sha256 {found[:12]}..., and {options.journal} is of "
            f"a run that began with {str(wanted)[:12]}...; give that base"
        )


def _write(
    options: ReplayOptions,
    setting: Setting,
    pieces: Pieces,
    record: Mapping[str, Any],
    reporter: Reporter,
) -> int:
    """Gives the number of units that were finished before."""
    out = Path(options.out).resolve()
    with held(out, record) as work:
        rebuilt, kept = _rebuild(setting, pieces, work, reporter)
        with reporter.phase(f"exporting to {options.out}"):
            _export(options, setting, rebuilt, out, record)
    clear(out, record)
    return kept


def _rebuild(
    setting: Setting, pieces: Pieces, work: Path, reporter: Reporter
) -> tuple["Rebuilt", int]:
    """Every unit that is not in the directory yet; an adapter is small, and stays in memory."""
    units, kept = units_to_write(setting), 0
    counted = reporter.counted("rebuilding units", units, len(units))
    rebuilt = Rebuilt(setting.map, pieces)
    if setting.trainable.mode == "peft":
        for unit in counted:
            for piece in what_is_written(setting, pieces, unit):
                shape = setting.map.parameters[piece.name].shape
                empty = torch.empty(shape, dtype=piece.elements.dtype)
                whole = rebuilt.moved.setdefault(piece.name, empty).view(-1)
                whole[piece.first : piece.first + piece.elements.numel()] = piece.elements
        return rebuilt, 0
    shards = Shards(work, setting.map)
    for unit in counted:
        if shards.has(unit):
            kept += 1
        else:
            shards.write(unit, what_is_written(setting, pieces, unit))
        rebuilt.moved.update(shards.mapped(unit))
    return rebuilt, kept


@dataclass
class Rebuilt:
    """Weights at the step, as modes ask for them.

    Attributes:
        map: Of the model.
        moved: Those that were rebuilt, by first name.
    """

    map: ModelMap
    pieces: Pieces
    moved: dict[str, torch.Tensor] = field(default_factory=dict)

    def value(self, name: str) -> torch.Tensor:
        """See :class:`Values`."""
        name = self.map.aliases.get(name, name)
        return self.moved[name] if name in self.moved else self.pieces.unmoved(name)


def _export(
    options: ReplayOptions,
    setting: Setting,
    rebuilt: Rebuilt,
    out: Path,
    record: Mapping[str, Any],
) -> None:
    """The model as its run exports it, and its tokenizer; at ``out`` when all of it is whole."""
    for name, parameter in setting.map.parameters.items():
        (_, span, _), *_ = setting.map.places[name]
        shape = tuple(parameter.shape)
        empty = nothing(shape, span.dtype, torch.device("cpu"))
        parameter.data = rebuilt.moved.get(name, empty)
    try:
        with files.new_directory(out) as aside:
            setting.trainable.save(setting.model, rebuilt, aside)
            save_processor(options.base, aside)
            write_record(aside, record)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--out: cannot write {out}: {error}; make room or choose another"
        ) from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
