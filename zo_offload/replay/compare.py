"""A replay beside what was exported: the first tensor that differs, by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zo_offload.errors import CheckpointError
from zo_offload.replay.pieces import Pieces, Values
from zo_offload.replay.setting import Setting
from zo_offload.reporter import Reporter
from zo_offload.units import Unit


def compare(setting: Setting, pieces: Pieces, there: Any, path: Path, reporter: Reporter) -> int:
    """Rebuild every weight and compare it, bit by bit; nothing is written.

    Args:
        setting: The run.
        pieces: Its weights.
        there: A model as it was exported, loaded.
        path: Where from.
        reporter: Told of each unit.

    Returns:
        How many tensors were compared.

    Raises:
        CheckpointError: One differs.
    """
    units = units_to_write(setting)
    exported = dict(there.named_parameters()) | dict(there.named_buffers())
    compared: set[str] = set()
    for unit in reporter.counted("comparing units", units, len(units)):
        for piece in what_is_written(setting, pieces, unit):
            theirs = exported.get(piece.name)
            _check_like(path, piece.name, _shape(setting, piece.name), piece.elements, theirs)
            last = piece.first + piece.elements.numel()
            assert theirs is not None
            _check(path, piece, theirs.detach().reshape(-1)[piece.first : last])
            compared.add(piece.name)
    for name, buffer in _saved_buffers(setting.model):
        _check_like(path, name, tuple(buffer.shape), buffer, exported.get(name))
        _check(path, Values(name, 0, buffer.reshape(-1)), exported[name].reshape(-1))
        compared.add(name)
    return len(compared)


def units_to_write(setting: Setting) -> list[Unit]:
    """Those that an export holds something of: of an adapter, what moves."""
    units = setting.map.everything
    if setting.trainable.mode != "peft":
        return [unit for unit in units if unit.spans]
    return [unit for unit in units if not unit.is_frozen]


def what_is_written(setting: Setting, pieces: Pieces, unit: Unit) -> Iterator[Values]:
    """The weights of a unit as an export has them."""
    over = {overlay.name for overlay in setting.map.overlays.values()}
    adapter = setting.trainable.mode == "peft"
    for span in unit.spans:
        if span.trainable or not adapter:
            for piece in pieces.of_span(unit, span):
                if piece.name not in over:
                    yield piece


def _shape(setting: Setting, name: str) -> tuple[int, ...]:
    return tuple(setting.map.parameters[name].shape)


def _saved_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    saved = set(model.state_dict(keep_vars=True))
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _check_like(
    path: Path, name: str, shape: tuple[int, ...], ours: torch.Tensor, theirs: Any
) -> None:
    found = None if theirs is None else (tuple(theirs.shape), theirs.dtype)
    if found != (shape, ours.dtype):
        said = "missing" if found is None else f"{list(found[0])} of {found[1]}"
        raise CheckpointError(
            f"{path}: {name} is {said}, the replay gives {list(shape)} of {ours.dtype}; it is no "
            "export of this run"
        )


def _check(path: Path, ours: Values, theirs: torch.Tensor) -> None:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[theirs.itemsize]
    bits, others = ours.elements.view(kind), theirs.contiguous().view(kind)
    if torch.equal(bits, others):
        return
    at = int(torch.nonzero(bits != others)[0])
    raise CheckpointError(
        f"{path}: {ours.name} differs from the replay, first in element {ours.first + at:,}: "
        f"{theirs[at].item()!r}, the replay gives {ours.elements[at].item()!r}; it is of another "
        "step or run, or damaged"
    )
