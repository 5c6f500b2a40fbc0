"""``zo-offload export``: what was trained, as a directory that others load.

A finished run has exported its model; of one that was stopped, and of a checkpoint, base and
journal make it first (:mod:`zo_offload.replay`). From there on all are the same: a directory that
is loaded as views of its files and written again, a shard or a tensor in memory at a time.
"""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zo_offload.config_fields import parse_bytes
from zo_offload.converted import is_converted
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.export.card import applied, card
from zo_offload.export.delta import apply_delta, read_delta, write_delta
from zo_offload.export.source import Source, find_source, is_delta
from zo_offload.fresh import fresh_directory, refuse_what_is_there
from zo_offload.integrations.hf import load_model, save_processor
from zo_offload.replay.command import ReplayOptions, replay
from zo_offload.replay.shards import RECORD
from zo_offload.reporter import Reporter
from zo_offload.trainable.decoded import MARK
from zo_offload.trainable.peft import base_of
from zo_offload.wording import one_line

CARD = "README.md"
REPLAYED = ".replayed"  # of the directory beside the output
ADAPTER = "adapter_model.safetensors"
DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # as the hub counts


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        source: Directory of a run, of a checkpoint or of a delta.
        output: A directory to make.
        format: ``hf``, ``adapter`` or ``delta`` (default: ``adapter`` of an adapter, else ``hf``).
        base: What the run began with (default: as the run, or the delta, says).
        config: The run's JSON, of a checkpoint (:class:`ReplayOptions`).
        dtype: Of floating-point weights, as torch names it (default: what forwards computed in).
        max_shard_size: Of a file, as text.
    """

    source: str
    output: str
    format: str | None = None
    base: str | None = None
    config: str | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class Exported:
    """What was done.

    Attributes:
        directory: That was made.
        format: Of what is in it.
        num_files: With weights.
        num_bytes: Of these.
        seconds: That it took.
    """

    directory: Path
    format: str
    num_files: int
    num_bytes: int
    seconds: float


def export(options: ExportOptions, reporter: Reporter | None = None) -> Exported:
    """Write what was trained as a plain model, as an adapter, or as the difference to its base.

    Raises:
        ConfigError: The source holds nothing to export, or not in this format; or something stands
            at the output.
        CheckpointError: A tag or a delta is damaged, or the system refuses.
        JournalError, ModelError: As of a replay.
    """
    reporter, began = reporter or Reporter(), time.monotonic()
    most_bytes, out = parse_size(options.max_shard_size), Path(options.output)
    refuse_what_is_there([out])
    write = _applied if is_delta(Path(options.source)) else _written
    try:
        with fresh_directory(out) as aside:
            kind = write(options, aside, most_bytes, reporter)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--output: cannot write {out}: {error}; make room or choose another"
        ) from error
    shutil.rmtree(_replayed_at(out), ignore_errors=True)
    files = list(out.glob("*.safetensors"))
    num_bytes = sum(path.stat().st_size for path in files)
    return Exported(out, kind, len(files), num_bytes, time.monotonic() - began)


def parse_size(text: str) -> int:
    """Bytes: KB, MB, GB and TB are powers of 1,000, as the hub has them; KiB, ... of 1,024.

    Raises:
        ConfigError: It is no size.

    Example:
        >>> parse_size("5GB"), parse_size("1MiB")
        (5000000000, 1048576)
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(KB|MB|GB|TB)\s*", text)
    try:
        size = int(float(match[1]) * DECIMAL[match[2]]) if match else parse_bytes(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(
            f"--max-shard-size: expected a size such as 5GB or 512MiB, found {text!r}; write one"
        )
    return size


def _written(options: ExportOptions, aside: Path, most_bytes: int, reporter: Reporter) -> str:
    """Out of a run or a checkpoint; gives the format."""
    source = find_source(Path(options.source), options.base)
    if options.format == "delta":
        refuse_converted(str(source.base))
    model = source.model or _replayed(options, source, reporter)
    is_adapter = base_of(model) is not None
    kind = options.format or ("adapter" if is_adapter else "hf")
    _refuse_format(kind, is_adapter, source)
    dtype = _dtype(options.dtype)
    notes = {} if dtype is None else {"rounded to": str(options.dtype)}
    with reporter.phase(f"exporting to {options.output}"):
        if kind == "adapter":
            _copy_adapter(model, aside, dtype)
        elif kind == "delta":
            notes |= _write_delta(model, source, aside, dtype, most_bytes)
        else:
            notes |= _write_plain(model, aside, dtype, most_bytes)
        (aside / CARD).write_text(card(source, kind, notes), encoding="utf-8")
    return kind


def _applied(options: ExportOptions, aside: Path, most_bytes: int, reporter: Reporter) -> str:
    """A delta on its base; gives the format."""
    directory = Path(options.source)
    if options.format not in (None, "hf") or options.dtype is not None or options.config:
        raise ConfigError(
            f"{directory}: a delta becomes the model that it was made of, to the bit; leave "
            "--format, --dtype and --config out"
        )
    delta = read_delta(directory)
    base = options.base or delta.base
    refuse_converted(base)
    with reporter.phase(f"loading {base}"):
        model = load_model(base, [aside.parent])
    with reporter.phase(f"exporting to {options.output}"):
        apply_delta(directory, delta, model, aside.parent)
        model.config = _config_of(directory, model)
        _save(model, aside, most_bytes)
        _copy_beside(directory, aside)
        if (directory / CARD).is_file():
            text = (directory / CARD).read_text(encoding="utf-8", errors="replace")
            (aside / CARD).write_text(applied(text), encoding="utf-8")
    return "hf"


def _config_of(delta: Path, base: Any) -> Any:
    """The trained model's configuration, which may say another dtype than the base's."""
    path = delta / "config.json"
    try:
        path.stat()  # transformers takes its own defaults where there is none
        return type(base.config).from_pretrained(str(delta))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({one_line(str(error))[:160]}); export it again, or restore "
            "it from a copy"
        ) from error


def _replayed(options: ExportOptions, source: Source, reporter: Reporter) -> Path:
    """The model at the end of the journal; it stays beside the output until that is whole."""
    if source.base is None:
        raise ConfigError(
            f"{source.directory}: a checkpoint does not name the model that its run began with; "
            "give it: --base DIR_OR_ID"
        )
    place, config = _replayed_at(Path(options.output)), options.config or source.config
    replay(ReplayOptions(source.base, str(source.journal), str(place), config=config), reporter)
    return place


def _replayed_at(output: Path) -> Path:
    output = output.resolve()
    return output.with_name(output.name + REPLAYED)


def _refuse_format(kind: str, is_adapter: bool, source: Source) -> None:
    if kind == "adapter" and not is_adapter:
        raise ConfigError(
            f"--format adapter: {source.directory} trained the model itself; write hf or delta"
        )
    if kind == "delta" and is_adapter:
        raise ConfigError(
            f"--format delta: {source.directory} trained an adapter, which is what to add to its "
            "base; write adapter, or hf for the two merged"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _write_plain(
    directory: Path, aside: Path, dtype: torch.dtype | None, most_bytes: int
) -> dict[str, str]:
    """A model of its own; an adapter is merged into its base. Gives rows for the card."""
    base = base_of(directory)
    model = load_model(base or directory, [aside.parent], dtype=dtype)
    if base is not None:
        model = _merged(model, directory)
    _save(model, aside, most_bytes)
    _copy_beside(directory, aside)
    return {} if base is None else {"adapter": "merged into the base"}


def _merged(model: Any, directory: Path) -> Any:
    """A base with an adapter's changes in its own matrices."""
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(model, str(directory))
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--format hf: the adapter in {directory} cannot be merged into its base "
            f"({type(error).__name__}); export it with --format adapter"
        ) from error


def _write_delta(
    directory: Path, source: Source, aside: Path, dtype: torch.dtype | None, most_bytes: int
) -> dict[str, str]:
    """Gives rows for the card."""
    named = str(source.base)
    trained = load_model(directory, [aside.parent], dtype=dtype)
    base = load_model(named, [aside.parent])
    delta = write_delta(aside, base, trained, named, most_bytes)
    trained.config.save_pretrained(str(aside))
    if trained.can_generate():
        trained.generation_config.save_pretrained(str(aside))
    _copy_beside(directory, aside)
    moved = sum(entry.form != "equal" for entry in delta.tensors.values())
    return {
        "tensors that differ from the base's": f"{moved} of {len(delta.tensors)}",
        "trained weights (sha256)": delta.sha256,
    }


def refuse_converted(base: str) -> None:
    """Whether a delta can be to it.

    Raises:
        ConfigError: It cannot.
    """
    if is_converted(base):
        raise ConfigError(
            f"{base}: a converted model's weights are laid out for runs, and a delta is to the "
            "model that was converted; give that: --base"
        )


def _save(model: Any, aside: Path, most_bytes: int) -> None:
    model.save_pretrained(str(aside), max_shard_size=most_bytes)


def _copy_beside(directory: Path, aside: Path) -> None:
    """What belongs to a model beside its weights."""
    save_processor(directory, aside)
    if (directory / MARK).is_file():
        shutil.copyfile(directory / MARK, aside / MARK)


def _copy_adapter(directory: Path, aside: Path, dtype: torch.dtype | None) -> None:
    """An adapter is small, and in the layout of its library already."""
    skip = shutil.ignore_patterns(RECORD, CARD)
    shutil.copytree(directory, aside, ignore=skip, dirs_exist_ok=True)
    if dtype is not None:
        for path in aside.rglob(ADAPTER):
            save_file(_rounded(load_file(path), dtype), path, {"format": "pt"})


def _rounded(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
