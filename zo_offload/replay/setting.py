"""A run as its journal's header describes it, laid over its base: all but the steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload.config import ZOConfig, load_json, parse_config
from zo_offload.config_trainable import TrainableConfig
from zo_offload.converted import Base, converted_of
from zo_offload.errors import JournalError, ModelError, ZOError
from zo_offload.integrations.hf import load_model
from zo_offload.journal import Journal
from zo_offload.journal.header import Header, as_stored, differences
from zo_offload.masters import Masters
from zo_offload.momentum import from_header
from zo_offload.offload.aio import Aio
from zo_offload.prepare import cast_buffers
from zo_offload.replay.chosen import candidates, digest_of
from zo_offload.trainable.choose import trainable_for
from zo_offload.trainable.trainable import Trainable
from zo_offload.units import IDENTITY, ModelMap, forward_dtype, map_model
from zo_offload.windowed import history_of

COUNTER = "block, parameter, step, probe | stream << 16"
DECIDING = {
    "base_sha256", "seed", "direction", "scales", "update", "lag", "master", "wire", "streamed",
    "forward", "counter",
}  # fmt: skip
TELLING = {
    "eps", "probes", "estimator", "fitness", "natural", "clip", "direction_scale", "objective",
    "trainable",
}  # fmt: skip
"""Keys that decided the records, or may be left out."""
FLOAT32 = str(torch.float32)
COMPUTED_IN = (None, torch.bfloat16, torch.float16, torch.float32)
UNITS = (None, "sublayer", "linear")


@dataclass(frozen=True)
class Setting:
    """A run's base and how it moved.

    Attributes:
        model: Of the run: with its adapter, where it trained one.
        trainable: What moved.
        map: Its parameters.
        values: What they began with, by first name; views of the base's files, where it has them.
        base: The opened units of a converted model, which has no such values.
        dtype: What forwards computed in (None: as the model is).
        masters: Says which steps a unit lacks; it has no store.
        step: Number of steps to be taken.
        header: The journal's.
        lineage: Digest of the records of the steps.
    """

    model: Any
    trainable: Trainable
    map: ModelMap
    values: Mapping[str, torch.Tensor]
    base: Base | None
    dtype: torch.dtype | None
    masters: Masters
    step: int
    header: Mapping[str, Any]
    lineage: str


def read_steps(path: str | Path, step: int | None = None) -> Journal:
    """A journal in memory, up to a step (default: its end); its file is left as it is.

    Raises:
        JournalError: It is damaged, of another version, or holds fewer steps.
    """
    found = Journal.read(path)
    _check_known(Path(path), found.header)
    if step is None or step == found.next_step:
        return found
    if step > found.next_step:
        raise JournalError(
            f"{path}: --to {step:,}, but it holds {found.next_step:,} steps; name one of them"
        )
    copy = Journal.of(found.content, str(path))
    copy.rewind(step)
    return copy


def _check_known(path: Path, header: Header) -> None:
    ours = Header({}).contract
    if header.contract != ours:
        raise JournalError(
            f"{path}: written under kernel contract {header.contract}, this zo_offload computes "
            f"contract {ours}: bits would differ; use the version that wrote it"
        )
    fields = header.fields
    for key in sorted(DECIDING - fields.keys()):
        raise JournalError(f"{path}: header.{key} is missing; it is no journal of a training run")
    for key in sorted(fields.keys() - DECIDING - TELLING):
        raise JournalError(
            f"{path}: header.{key}: unknown to this zo_offload, and may decide bits; use the "
            "version that wrote it"
        )
    if fields["counter"] != COUNTER:
        raise JournalError(
            f"{path}: header.counter: found {fields['counter']!r}, this zo_offload counts by "
            f"{COUNTER!r}; use the version that wrote it"
        )


def open_setting(
    base: str | Path,
    journal: Journal,
    config: str | Path | Mapping[str, Any] | None,
    spill: Sequence[Path],
) -> Setting:
    """Load a base and lay it out as a journal's run did.

    Args:
        base: Directory or model id.
        journal: Of the steps to be taken.
        config: The run's JSON, or its file, which is asked for what the header has a digest of.
        spill: Folders for what loading makes anew.

    Raises:
        ModelError: The base cannot be loaded.
        JournalError: It cannot be laid out as the header says: it is another model, or the header
            does not say enough.
    """
    header = journal.header.fields
    wanted = _Wanted.of(config)
    model = load_model(base, spill)
    trainable, dtype, model_map = _laid_out(str(base), model, header, wanted)
    prepared = trainable.model
    cast_buffers(prepared, dtype, torch.device("cpu"))
    converted = converted_of(prepared)
    opened = None
    if converted is not None:
        opened = converted.open(model_map, header["master"], Aio())
    momentum = from_header(header["update"])
    masters = Masters(model_map, {}, header["direction"], header["lag"])
    masters.history = history_of(journal.records, header["seed"], momentum)
    masters.joins = momentum is not None
    values = {name: parameter.detach() for name, parameter in model_map.parameters.items()}
    return Setting(
        prepared, trainable.mode, model_map, values, opened, dtype, masters, journal.next_step,
        header, journal.records.lineage(),
    )  # fmt: skip


@dataclass(frozen=True)
class _Wanted:
    """What a run's JSON adds to its header."""

    trainable: TrainableConfig | None = None
    units: Sequence[Any] = UNITS
    dtypes: Sequence[torch.dtype | None] = COMPUTED_IN

    @classmethod
    def of(cls, config: str | Path | Mapping[str, Any] | None) -> "_Wanted":
        if config is None:
            return cls()
        from zo_offload.deepspeed_json import read_settings

        said = read_settings(config if isinstance(config, Mapping) else load_json(config))
        block = said.zeroth_order
        return cls(block.trainable, (block.unit, *UNITS), (said.dtype,))


@dataclass(frozen=True)
class _Prepared:
    """A mode, and the model that it made."""

    mode: Trainable
    model: nn.Module


def _laid_out(
    base: str, model: nn.Module, header: Mapping[str, Any], wanted: _Wanted
) -> tuple[_Prepared, torch.dtype | None, ModelMap]:
    """A map that has all of the header's digests."""
    dtypes = _distinct(model, header, wanted.dtypes)
    if len(dtypes) != 1:
        said = " and ".join(header["forward"])
        reason = "several precisions of" if dtypes else "no precision of"
        mend = "name the run's JSON: --config FILE" if dtypes else "is it the run's base?"
        raise JournalError(f"{base}: the run computed in {said}, as {reason} this base do; {mend}")
    (dtype,) = dtypes
    prepared = _prepared(base, model, header, wanted, dtype)
    try:
        return prepared, dtype, _mapped(base, prepared, header, wanted.units, dtype)
    except ZOError:
        prepared.mode.abandon()
        raise


def _prepared(
    base: str,
    model: nn.Module,
    header: Mapping[str, Any],
    wanted: _Wanted,
    dtype: torch.dtype | None,
) -> _Prepared:
    """What moved, as the header has it."""
    difference = ""
    for said in candidates(model, header, wanted.trainable):
        mode = trainable_for(model, _config(header, said), dtype)
        try:
            made = mode.prepare(model)
            found = as_stored(mode.header(made)).get("trainable")
            theirs = header.get("trainable")
            difference = next(differences(theirs, found, "header.trainable"), "")
        except ZOError:
            mode.abandon()
            raise
        if not difference:
            return _Prepared(mode, made)
        mode.abandon()
    raise JournalError(
        f"{base}: not what the run trained: {difference}; name the model that it began with, and "
        "its JSON: --config FILE"
    )


def _config(header: Mapping[str, Any], trainable: Mapping[str, Any]) -> ZOConfig:
    """As far as it decides what moves."""
    block = {
        "seed": header["seed"],
        "direction": header["direction"],
        "master": header["master"],
        "wire": None if header["wire"] == IDENTITY else header["wire"],
        "update": {"lag": header["lag"]},
        "trainable": dict(trainable),
    }
    return parse_config({"zeroth_order": block})


def _mapped(
    base: str,
    prepared: _Prepared,
    header: Mapping[str, Any],
    units: Sequence[Any],
    dtype: torch.dtype | None,
) -> ModelMap:
    """The units of the run; where they decide no bits, whole blocks."""
    converted = converted_of(prepared.model)
    if converted is not None:
        units = (converted.record.unit,)
    in_groups = ""
    for unit in units:
        found = map_model(
            prepared.model, unit, header["scales"], dtype, header["master"], header["wire"],
            prepared.mode.moving,
        )  # fmt: skip
        names = {segment.name for each in found.units for _, segment in each.segments}
        if header["streamed"] not in (None, digest_of(sorted(names))):
            continue
        if found.divided:  # another division of the same bits has them together
            in_groups = in_groups or next(iter(found.divided))
            continue
        dtypes = sorted({str(span.dtype) for each in found.everything for span in each.spans})
        if dtypes != header["forward"]:
            break
        return found
    if in_groups:
        raise ModelError(
            f"{base}: {in_groups} lies there in groups of experts, which cannot be replayed; give "
            "the model that was converted"
        )
    raise JournalError(
        f"{base}: cannot be laid out as the run did (header.streamed, header.forward); name the "
        "run's JSON: --config FILE"
    )


def _distinct(
    model: nn.Module, header: Mapping[str, Any], dtypes: Sequence[torch.dtype | None]
) -> list[torch.dtype | None]:
    """Those precisions in which a run may have computed, one of each that are the same to it."""
    found: dict[tuple[str, ...], torch.dtype | None] = {}
    theirs = set(header["forward"])
    for dtype in dtypes:
        parameters = tuple(_computed_in(model, dtype))
        if set(parameters) <= theirs <= {*parameters, FLOAT32}:
            found.setdefault((*parameters, *_kept_in(model, dtype)), dtype)
    return list(found.values())


def _computed_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            yield str(forward_dtype(model, name, parameter, dtype))


def _kept_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[str]:
    """Dtypes of buffers that a checkpoint holds."""
    saved = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            yield str(dtype or buffer.dtype)
