"""A base's weights at a later step, some millions of elements at a time.

A piece is laid out as a run lays its masters out, takes every step in one pass of the update
kernels, which go through all of them while a tile of it is in cache, and is given away as the
forward sees it. What moves by products of small factors, or rests packed, is a whole matrix.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from zo_offload import ops
from zo_offload.ops import Segment, Span
from zo_offload.replay.setting import Setting
from zo_offload.resting import AT_ONCE, fill, seen
from zo_offload.trainable.overlay import Base
from zo_offload.units import AMBIENT, Place, Unit

PIECE = 1 << 23
"""Elements: 32 MiB of fp32 masters, far beyond what a call and unpacking records cost."""


class Values(NamedTuple):
    """Some elements of a parameter.

    Attributes:
        name: Of the parameter.
        first: Element of it that they begin with.
        elements: Flat, as the forward sees them.
    """

    name: str
    first: int
    elements: torch.Tensor


@dataclass
class Pieces:
    """Reads a base, and brings it to a step.

    Args:
        setting: The run.
    """

    setting: Setting
    _unit: tuple[int, torch.Tensor, torch.Tensor] | None = field(default=None, init=False)
    _laid_over: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def of_unit(self, unit: Unit) -> Iterator[Values]:
        """A unit's parameters in order of memory, each in one piece or several."""
        for span in unit.spans:
            yield from self.of_span(unit, span)

    def of_span(self, unit: Unit, span: Span) -> Iterator[Values]:
        """The same of a span."""
        if not span.trainable:
            for segment in span.segments:
                yield from self._frozen((unit, span, segment))
        elif self.setting.map.is_low_rank(span):
            for segment in span.segments:
                alone, wire, rest = self._piece(
                    unit, span, segment.start, segment.start + segment.padded
                )
                alone = span.alone(segment)  # whose shape is the matrix's
                self._bring(unit, span, alone, wire, rest)
                yield Values(segment.name, 0, wire[: segment.numel])
        else:
            for first in range(0, span.elements, PIECE):
                last = min(first + PIECE, span.elements)
                piece, wire, rest = self._piece(unit, span, first, last)
                self._bring(unit, span, piece, wire, rest)
                for segment, begin, end in _real(span, first, last):
                    at = segment.start + begin - first
                    yield Values(segment.name, begin, wire[at : at + end - begin])

    def unmoved(self, name: str) -> torch.Tensor:
        """A whole frozen parameter as the forward sees it."""
        (place,) = self.setting.map.places[name]
        (value,) = self._as_it_rests(place, whole=True)
        return value.elements.view(place[2].shape)

    def base_sha256(self) -> str:
        """Digest of the base weights, as a journal's header has it."""
        setting, total = self.setting, hashlib.sha256()
        if setting.base is not None:
            return setting.base.sha256
        for name, parameter in setting.map.parameters.items():
            total.update(f"{name} {tuple(parameter.shape)}\n".encode())
            for part in self._exact(*setting.map.places[name][0]):
                total.update(part.numpy().data)
        return total.hexdigest()

    def _exact(self, unit: Unit, span: Span, segment: Segment) -> Iterator[torch.Tensor]:
        """A parameter's fp32 masters in the base; of what is frozen, what the forward sees."""
        if not span.trainable:
            for piece in self._as_it_rests((unit, span, segment)):
                yield piece.elements.float()
            return
        for first in range(segment.start, segment.start + segment.padded, PIECE):
            last = min(first + PIECE, segment.start + segment.padded)
            piece, wire, rest = self._piece(unit, span, first, last)
            for _, begin, end in _real(span, first, last):
                yield ops.load_master(piece, wire, rest)[: end - begin]

    def _piece(
        self, unit: Unit, span: Span, first: int, last: int
    ) -> tuple[Span, torch.Tensor, torch.Tensor]:
        """Elements of a trained span as the base has them; their wire, and what stays beside it."""
        piece = replace(span.piece(first, last), wire_offset=0, rest_offset=0)
        if self.setting.base is not None and unit.index != AMBIENT:
            wire, rest = self._of_file(unit)
            rest = span.rest(rest)
            return piece, span.wire(wire)[first:last], rest[first:last] if span.rest_bytes else rest
        wire = piece.wire(torch.zeros(piece.wire_bytes, dtype=torch.uint8))
        rest = piece.rest(torch.zeros(piece.rest_bytes, dtype=torch.uint8))
        for segment, begin, end in _real(span, first, last):
            values = self.setting.values[segment.name].reshape(-1)
            start = segment.start + begin - first
            for at in range(0, end - begin, AT_ONCE):
                given = values[begin + at : min(begin + at + AT_ONCE, end)].float()
                part = slice(start + at, start + at + given.numel())
                beside = rest[part] if span.rest_bytes else rest
                ops.store_master(piece, given, wire[part], beside)
        return piece, wire, rest

    def _of_file(self, unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
        """A converted model's unit, read once; what is worked on in it is not asked for again."""
        if self._unit is None or self._unit[0] != unit.index:
            self._unit = None
            sizes = unit.wire_bytes, unit.rest_bytes
            wire, rest = (torch.zeros(count, dtype=torch.uint8) for count in sizes)
            assert self.setting.base is not None
            self.setting.base.fill(unit, wire, rest)
            self._unit = unit.index, wire, rest
        return self._unit[1:]

    def _bring(
        self, unit: Unit, span: Span, piece: Span, wire: torch.Tensor, rest: torch.Tensor
    ) -> None:
        masters = self.setting.masters
        for start, stop in masters.stretches(0, self.setting.step):
            due = masters.due(unit, span, stop, carried=start)
            if due:
                masters.bring(piece, wire, rest, due)

    def _frozen(self, place: Place) -> Iterator[Values]:
        """What is frozen, with the values in it that lie over it."""
        overlaid = self.setting.map.overlaid_at(place)
        if overlaid is None:
            yield from self._as_it_rests(place)
            return
        _, span, segment = place
        (value,) = self._as_it_rests(place, whole=True)
        values, patch = self._over(overlaid.values), overlaid.patch
        alone = span.alone(segment)
        wire = self._packed(place) if span.rests_packed else value.elements
        patch.write(
            value.elements, values[patch.values.start : patch.values.stop], patch.places,
            Base(alone, alone.segments[0], wire),
        )  # fmt: skip
        yield value

    def _over(self, place: Place) -> torch.Tensor:
        """All values of an overlay at the step, fp32; they are few."""
        unit, span, segment = place
        if segment.name not in self._laid_over:
            for piece in self.of_span(unit, span):
                size = self.setting.map.parameters[piece.name].numel()
                held = self._laid_over.setdefault(piece.name, torch.empty(size))
                held[piece.first : piece.first + piece.elements.numel()] = piece.elements
        return self._laid_over[segment.name]

    def _as_it_rests(self, place: Place, whole: bool = False) -> Iterator[Values]:
        """What is frozen, in the forward's dtype."""
        _, span, segment = place
        if span.rests_packed:
            alone = span.alone(segment)
            wire = self._packed(place)
            elements = seen(alone, alone.segments[0], wire).reshape(-1)
            yield Values(segment.name, 0, elements)
            return
        values = self.setting.values[segment.name].reshape(-1)
        size = segment.numel if whole else PIECE
        for first in range(0, segment.numel, size):
            out = torch.empty(min(size, segment.numel - first), dtype=span.dtype)
            for at in range(0, out.numel(), AT_ONCE):
                some = values[first + at : first + min(at + AT_ONCE, out.numel())].float()
                ops.encode(span.dtype, some, out[at : at + some.numel()])
            yield Values(segment.name, first, out)

    def _packed(self, place: Place) -> torch.Tensor:
        """A frozen parameter alone, as its codec packs it."""
        _, span, segment = place
        alone = replace(span.alone(segment), wire_offset=0, rest_offset=0)
        wire = torch.zeros(alone.wire_bytes, dtype=torch.uint8)
        fill(alone, {segment.name: self.setting.values[segment.name]}, wire, wire[:0])
        return alone.wire(wire)


def _real(span: Span, first: int, last: int) -> Iterator[tuple[Segment, int, int]]:
    """Parameters in a range of a span, and which of their elements; padding is nobody's."""
    for segment, begin, end in span.overlapping(first, last):
        if begin < min(end, segment.numel):
            yield segment, begin, min(end, segment.numel)
