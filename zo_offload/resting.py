"""A span's parameters where it rests: written when a model is taken over, and read."""

from collections.abc import Iterator, Mapping

import torch

from zo_offload import ops
from zo_offload.ops import ALIGNMENT, Layout, Segment, Span
from zo_offload.units import Unit

# Elements taken over at once. glibc keeps for a thread the room of its temporaries, also when asked
# to give back what is free; the rank that asks the disk has a thread for every rank of the machine.
AT_ONCE = 1 << 18
PACKED_AT_ONCE = 1 << 24  # elements, where codecs pack them


def exact(span: Span, segment: Segment, wire: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """fp32 values of a parameter, on the CPU; of what is frozen, those that the forward sees."""
    if not span.trainable:
        return seen(span, segment, wire).to("cpu", torch.float32, copy=True)
    part = _part(segment)
    values = ops.load_master(span, wire[part], rest[part] if span.rest_bytes else rest)
    return values.cpu().view(segment.shape)


def seen(span: Span, segment: Segment, wire: torch.Tensor) -> torch.Tensor:
    """A parameter's wire elements, where they rest; decoded, on that device, where it is packed."""
    if not span.rests_packed:
        return wire[_part(segment)].view(segment.shape)
    values = torch.empty(segment.padded, dtype=span.dtype, device=wire.device)
    ops.unpack(span.layout, wire, span.elements, span.dtype, values, segment.start)
    return values[: segment.numel].view(segment.shape)


def digest_of(unit: Unit, wire: torch.Tensor, rest: torch.Tensor) -> int:
    """Of a unit's bytes; not of padding, in which directions leave what means nothing."""
    total, first = 0, 0  # words before
    for span in unit.spans:
        for part in _digested(span, wire, rest):
            total += ops.digest(part, first)
            first += -(-part.nbytes // 4)
    return total % 2**64


def _digested(span: Span, wire: torch.Tensor, rest: torch.Tensor) -> Iterator[torch.Tensor]:
    if span.rests_packed:
        yield span.wire(wire)
        return
    for segment in span.segments:
        yield span.wire(wire)[_part(segment)]
        if span.rest_bytes:
            yield span.rest(rest)[_part(segment)]


def fill_unit(
    unit: Unit, values: Mapping[str, torch.Tensor], wire: torch.Tensor, rest: torch.Tensor
) -> None:
    """Write a unit's initial values, by parameter name; of a divided one the unit's part."""
    for span in unit.spans:
        fill(span, values, wire, rest)


def fill(
    span: Span, values: Mapping[str, torch.Tensor], wire: torch.Tensor, rest: torch.Tensor
) -> None:
    """Write a span's initial values: masters where it is trainable, else the wire alone.

    Args:
        span: Which.
        values: By parameter name.
        wire: Of its unit, as ``rest``; zeroed.
        rest: Likewise.
    """
    if span.rests_packed:
        _fill_packed(span, values, span.wire(wire))
        return
    for segment in span.segments:
        for part, given in _fp32(segment, values, wire.device):
            if span.trainable:
                resting = span.rest(rest)
                resting = resting[part] if span.rest_bytes else resting
                ops.store_master(span, given, span.wire(wire)[part], resting)
            else:
                ops.encode(span.dtype, given, span.wire(wire)[part])


def _fill_packed(span: Span, values: Mapping[str, torch.Tensor], wire: torch.Tensor) -> None:
    """Write what a codec makes of a span, packed on the CPU: the device has no room for both."""
    on_host = wire.device.type == "cpu"
    packed = wire if on_host else torch.zeros(span.packed_bytes, dtype=torch.uint8)
    (_fill_groups if span.layout.group else _fill_at_once)(span, values, packed)
    if not on_host:
        wire.copy_(packed)


def _fill_at_once(span: Span, values: Mapping[str, torch.Tensor], packed: torch.Tensor) -> None:
    """Of a codec that looks at all elements: they are in memory beside what it makes of them."""
    host = torch.device("cpu")
    elements = torch.zeros(span.elements, dtype=span.dtype)
    for segment in span.segments:
        for part, given in _fp32(segment, values, host):
            ops.encode(span.dtype, given, elements[part])
    ops.pack(span.layout, elements, packed)


def _fill_groups(span: Span, values: Mapping[str, torch.Tensor], packed: torch.Tensor) -> None:
    """Of a codec with groups, which looks at one at a time: part by part, in one small room."""
    codes, scales = _sections(span.layout, packed, span.elements)
    for segment in span.segments:
        matrix = values[segment.name].reshape(segment.shape[0], -1)
        width = matrix.shape[1]
        rows = max(ALIGNMENT, PACKED_AT_ONCE // width // ALIGNMENT * ALIGNMENT)
        room = torch.zeros(min(rows * width, segment.padded), dtype=span.dtype)
        made = torch.zeros(span.layout.capacity(room.numel(), span.dtype), dtype=torch.uint8)
        for first in range(0, len(matrix), rows):
            part = matrix[first : first + rows]
            whole = -(-part.numel() // ALIGNMENT) * ALIGNMENT
            _write_elements(part, room[: part.numel()])
            room[part.numel() : whole].zero_()
            ops.pack(span.layout, room[:whole], made)
            start = segment.start + first * width
            some_codes, some_scales = _sections(span.layout, made, whole)
            for section, some in ((codes, some_codes), (scales, some_scales)):
                begin = start * len(some) // whole
                section[begin : begin + len(some)] = some


def _write_elements(part: torch.Tensor, out: torch.Tensor) -> None:
    """Rows of a matrix as the wire has them; of one NaN and another a codec makes the same."""
    if part.dtype == out.dtype:
        out.view(part.shape).copy_(part)
    else:
        ops.encode(out.dtype, part.to("cpu", torch.float32).flatten(), out)


def _sections(
    layout: Layout, packed: torch.Tensor, elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of so many elements, views; both grow in proportion to these."""
    middle = layout.scales_at(elements)
    return packed[:middle], packed[middle : middle + elements // layout.group * 2]


def _fp32(
    segment: Segment, values: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """A parameter on a device, part by part, and where it lies among the span's elements."""
    flat = values[segment.name].reshape(-1)
    assert flat.numel() == segment.numel
    for first in range(0, segment.numel, AT_ONCE):
        some = flat[first : first + AT_ONCE]
        start = segment.start + first
        yield slice(start, start + some.numel()), some.to(device).float()


def _part(segment: Segment) -> slice:
    """Its elements among the span's."""
    return slice(segment.start, segment.start + segment.numel)
