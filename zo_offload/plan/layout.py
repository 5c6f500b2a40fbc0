"""A model's units as arrays of numbers: what the plan computes with.

Units are those of training (``placing.py``), of a model that training's own mode has prepared. A
map keeps what a codec packs apart from the rest, so that one serves every wire format.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from zo_offload.blocks import repeated_blocks
from zo_offload.offload.planner import Counts, Flags, Needs, UnitBytes, copy_bytes
from zo_offload.ops import layout_of
from zo_offload.placing import Placing
from zo_offload.plan.formats import LOSSLESS, wire_bytes
from zo_offload.plan.request import Request
from zo_offload.units import IDENTITY, ModelMap, codec_for, in_units


@dataclass(frozen=True)
class Dims:
    """Widths that activations and FLOPs follow from, in elements.

    Attributes:
        hidden: Of the stream between blocks.
        vocabulary: Of the head.
        attention: Heads times their width, over all blocks.
        boundary: Most that a lane holds a token while it stands before a unit inside a block.
        inner: Most that a block holds a token while it runs.
        active: Parameters that a token is multiplied with, experts at their share.
    """

    hidden: int
    vocabulary: int
    attention: int
    boundary: int
    inner: int
    active: int


@dataclass(frozen=True)
class Spans:
    """What lies in units: arrays, an entry a span.

    Attributes:
        unit: In which; 0 is the ambient pseudo-unit, unit i is i + 1.
        elements: With padding.
        plain: Bytes that the forward reads.
        rest: Bytes that stay with the masters.
        moves: Whether it is trained.
        is_packed: Whether a codec packs it.
        dtypes: What the forward computes in.
    """

    unit: Counts
    elements: Counts
    plain: Counts
    rest: Counts
    moves: Flags
    is_packed: Flags
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, model_map: ModelMap) -> "Spans":
        """Of a model."""
        found = [
            (number, span) for number, u in enumerate(model_map.everything) for span in u.spans
        ]
        rows = [(i, span.elements, span.plain_bytes, span.rest_bytes) for i, span in found]
        unit, elements, plain, rest = np.array(rows, dtype=np.int64).T
        moves = np.array([span.trainable for _, span in found])
        is_packed = np.array([span.codec != IDENTITY for _, span in found])
        dtypes = tuple(span.dtype for _, span in found)
        return cls(unit, elements, plain, rest, moves, is_packed, dtypes)

    def summed(self, counts: npt.NDArray, num_units: int) -> Counts:
        """By unit."""
        return np.bincount(self.unit, counts, num_units).astype(np.int64)


@dataclass(frozen=True)
class Sizes:
    """Bytes of every unit under a request.

    Attributes:
        of: As a run counts them, the ambient pseudo-unit's first.
        shrinks: Of what crosses the bus, as far as lossless12 is expected to save them.
        moving: Of the masters (wire and rest) that a step moves; the ambient ones first.
    """

    of: UnitBytes
    shrinks: Counts
    moving: Counts

    @property
    def wire(self) -> Counts:
        """What rests of each unit and travels, packed only where it is frozen."""
        return self.of.wire[1:]

    @property
    def rest(self) -> Counts:
        """What stays with the masters."""
        return self.of.rest[1:]

    def travels(self, as_masters: bool) -> Counts:
        """What crosses the bus: packed, or as it rests where the device updates it."""
        return (self.of.wire if as_masters else self.of.packed)[1:] - self.shrinks[1:]


@dataclass(frozen=True, eq=False)
class Layout:
    """A model at one granularity, as one mode moves it.

    Attributes:
        granularity: See ``granularity.py``.
        dtype: What the forward computes in.
        needs: What a run asks for.
        spans: Of its units.
        num_parameters: Of the model.
        dims: Of the model.
    """

    granularity: str
    dtype: torch.dtype
    needs: Needs
    spans: Spans
    num_parameters: int
    dims: Dims
    _sizes: dict[str, Sizes] = field(default_factory=dict)
    _needs: dict[tuple, Needs] = field(default_factory=dict)

    @property
    def model_map(self) -> ModelMap:
        """The model's units."""
        return self.needs.model_map

    @property
    def names(self) -> tuple[str, ...]:
        """Of the units."""
        return tuple(unit.name for unit in self.model_map.units)

    @property
    def interval(self) -> int:
        """Steps between two moves of masters, where the mode says so."""
        low_rank = self.model_map.low_rank
        return low_rank.interval if low_rank is not None else 1

    @cached_property
    def values_bytes(self) -> int:
        """Of what lies over matrices."""
        names = {overlay.name for overlay in self.model_map.overlays.values()}
        segments = self.model_map.ambient.segments
        return sum(copy_bytes(span, s) for span, s in segments if s.name in names)

    def sizes(self, wire: str) -> Sizes:
        """Bytes of units whose matrices a codec packs.

        Raises:
            ConfigError: The codec cannot serve the forward.
        """
        if wire not in self._sizes:
            self._sizes[wire] = _priced(self.spans, wire, len(self.model_map.units) + 1)
        return self._sizes[wire]

    def needs_of(self, request: Request) -> Needs:
        """What a run of a request asks for."""
        at_hand = request.where == "device"
        said = {
            "num_slots": request.num_slots,
            "num_draws": request.draws,
            "lags": request.lag > 0 or self.model_map.low_rank is not None,
            "whole_slots": at_hand,
            "host_moves": not at_hand,
            "head_chunk": request.head_chunk,
            "num_paths": request.num_paths,
            "stripe_bytes": request.stripe_bytes,
        }
        key = (request.wire, *said.values())
        if key not in self._needs:
            self._needs[key] = replace(self.needs, given=self.sizes(request.wire).of, **said)
        return self._needs[key]


def _priced(spans: Spans, wire: str, num_units: int) -> Sizes:
    packed, shrinks = spans.plain.copy(), np.zeros(len(spans.plain))
    packs = spans.is_packed.copy()
    for dtype in set(spans.dtypes):
        members = spans.is_packed & np.array([each == dtype for each in spans.dtypes])
        if not members.any():
            continue
        codec = codec_for(wire, dtype)
        if codec == IDENTITY:
            packs &= ~members
            continue
        layout = layout_of(codec)
        most = {n: layout.capacity(n, dtype) for n in set(spans.elements[members].tolist())}
        packed[members] = [most[n] for n in spans.elements[members].tolist()]
        usual = np.ceil(spans.elements[members] * wire_bytes(wire, dtype))
        shrinks[members] = np.maximum(packed[members] - usual, 0) * (codec == LOSSLESS)
    wire_of = np.where(packs & ~spans.moves, packed, spans.plain)
    found = UnitBytes(
        wire=spans.summed(wire_of, num_units),
        rest=spans.summed(spans.rest, num_units),
        packed=spans.summed(packed, num_units),
        plain=spans.summed(spans.plain, num_units),
        moves=spans.summed(spans.moves, num_units) > 0,
        packs=spans.summed(spans.moves & packs, num_units) > 0,
    )
    moving = spans.summed((wire_of + spans.rest) * spans.moves, num_units)
    return Sizes(found, spans.summed(shrinks, num_units), moving)


def lay_out(placing: Placing, num_parameters: int, dims: Callable[[bool], Dims]) -> Layout:
    """Divide a prepared model on the meta device.

    Args:
        placing: The model, and what is asked of it.
        num_parameters: Of the model before it was prepared.
        dims: Gives widths, of a model whose experts are divided or not.

    Raises:
        ConfigError, ModelError: Training would refuse it.
    """
    model_map = placing.map()
    assert placing.dtype is not None
    return Layout(
        granularity=placing.config.unit if isinstance(placing.config.unit, str) else "block",
        dtype=placing.dtype,
        needs=placing.needs(model_map),
        spans=Spans.of(model_map),
        num_parameters=num_parameters,
        dims=dims(bool(model_map.divided)),
    )


def _holds_experts(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 1  # a convolution of depth has a 1


def dims_of(config: Any, model: Any, dtype: torch.dtype, divided: bool) -> Dims:
    """Widths, from the configuration and the matrices of the largest block.

    A block holds its input, the stream and the normed stream; beside them every product of the MLP
    (gate, up and theirs), or twice those of attention (as they are and rotated), or what its chosen
    experts take and give. Attention is computed in parts: no product of lengths is held.

    A lane that stands before a group of experts holds the block's input, the stream, what experts
    take and what they have given, what the next one takes and the one before it made and gave (at
    most all tokens), scores, and which experts are chosen.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    shapes = [tuple(p.shape) for p in _a_block(model).parameters() if p.ndim in (2, 3)]
    flat = [_across(shape, hidden) for shape in shapes if len(shape) == 2] or [hidden]
    widest = max(flat)
    others = sum(width for width in flat if width < widest)
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)
    experts = [_across(shape[1:], hidden) for shape in shapes if len(shape) == 3]
    boundary = 2 * hidden + max(widest, others)
    if divided:
        count = max(shape[0] for shape in shapes if len(shape) == 3)
        table = chosen * (count + 1) * (torch.int64.itemsize // dtype.itemsize)  # one hot
        boundary = max(boundary, 6 * hidden + max(experts) + count + table + 5 * chosen)
    routed = chosen * (4 * hidden + sum(experts)) if experts else 0
    inner = 3 * hidden + max(flat.count(widest) * widest, 2 * others, routed)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    head_dim = getattr(text, "head_dim", None) or hidden // max(heads, 1)
    return Dims(
        hidden=hidden,
        vocabulary=int(text.vocab_size),
        attention=heads * head_dim * int(text.num_hidden_layers),
        boundary=boundary,
        inner=inner,
        active=_active(chosen, model),
    )


def _across(shape: tuple[int, ...], hidden: int) -> int:
    """The side of a matrix that is not the stream's."""
    return next((size for size in shape if size != hidden), hidden)


def _a_block(model: nn.Module) -> nn.Module:
    blocks = [block for _, block in repeated_blocks(model)]
    return max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))


def _active(chosen: int, model: Any) -> int:
    """Parameters of a token's matrix products; a table that is only gathered has none."""
    total, inside = 0, in_units(model)
    for name, parameter in model.named_parameters():
        if name in inside:
            experts = parameter.shape[0] if _holds_experts(tuple(parameter.shape)) else 1
            total += parameter.numel() * min(chosen, experts) // experts
    head = getattr(model.get_output_embeddings(), "weight", None)
    return total + (0 if head is None else head.numel())
