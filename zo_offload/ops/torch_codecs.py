"""Codecs in plain torch: the bytes and values of the NumPy reference, on any device.

The families are those of ``zo_offload/codec``. Work goes chunk by chunk.
"""

import math
from functools import lru_cache

import torch

from zo_offload.errors import CodecError
from zo_offload.ops import lossless12
from zo_offload.ops.layout import (
    BLOCK,
    CODE_BITS,
    HEADER_BYTES,
    LARGEST,
    LARGEST_SCALE,
    NAN_SCALE,
    NF4,
    Layout,
)
from zo_offload.ops.lossless12 import ESCAPE, PACKED, RAW, TILE, sections

CHUNK_ELEMENTS = {"cpu": 1 << 18}  # some ten temporaries of each are alive
OTHER_CHUNK_ELEMENTS = 1 << 20  # a device is told of each
_KEEP = {"nan": math.nan, "posinf": math.inf, "neginf": -math.inf}


@torch.inference_mode()
def pack(layout: Layout, wire: torch.Tensor, packed: torch.Tensor) -> int:
    """See :func:`zo_offload.ops.pack`."""
    elements = wire.numel()
    if layout.kind == "lossless12":
        return _pack_lossless(wire, packed)
    used = layout.capacity(elements, wire.dtype)
    if layout.kind == "identity":
        packed[:used].view(wire.dtype).copy_(wire)
        return used
    if layout.group:
        packed[layout.scales_at(elements) : used].zero_()
    chunk = _chunk(wire)
    for start in range(0, elements, chunk):
        stop = min(start + chunk, elements)
        value = widened(wire[start:stop])
        if layout.group:
            _pack_groups(layout, value, packed, elements, start)
        else:
            _round(value, packed[2 * start : 2 * stop].view(_NARROW[layout.kind]))
    return used


def unpack(
    layout: Layout, packed: torch.Tensor, elements: int, dtype: torch.dtype, out: torch.Tensor,
    first: int = 0, scales: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`zo_offload.ops.unpack`."""
    with torch.inference_mode():
        chunk = _chunk(out)
        for start in range(0, out.numel(), chunk):
            part = out[start : start + chunk]
            at, stop = first + start, first + start + part.numel()
            if scales is None:
                value = decoded(layout, packed, elements, dtype, at, stop)
            else:
                layout.refuse_short(packed, elements, dtype)
                begin, end = start // layout.group, (start + part.numel()) // layout.group
                value = _unpack_groups(layout, packed, at, stop, scales[begin:end])
            _round(value, part) if out.dtype != torch.float32 else part.copy_(value)


def decoded(
    layout: Layout, packed: torch.Tensor, elements: int, dtype: torch.dtype, start: int, stop: int
) -> torch.Tensor:
    """What elements start..stop of a packed span mean: fp32, not shared.

    Raises:
        CodecError: The bytes are too few, or (lossless12) damaged.
    """
    layout.refuse_short(packed, elements, dtype)
    if layout.kind == "lossless12":
        return widened(_unpack_lossless(packed, elements, start, stop))
    if layout.group:
        scales = group_scales(layout, packed, elements, start, stop)
        return _unpack_groups(layout, packed, start, stop, scales)
    kind = _NARROW.get(layout.kind, dtype)
    size = kind.itemsize
    return widened(packed[start * size : stop * size].view(kind))


def _chunk(tensor: torch.Tensor) -> int:
    """Elements that are worked on at once."""
    return CHUNK_ELEMENTS.get(tensor.device.type, OTHER_CHUNK_ELEMENTS)


_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def widened(wire: torch.Tensor) -> torch.Tensor:
    """Wire elements in fp32, not shared; NaN keep their bits, except those of fp16."""
    if wire.dtype == torch.bfloat16:
        return wire.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).view(torch.float32)
    if wire.dtype == torch.float16:
        return wire.float().nan_to_num_(**_KEEP)
    return wire.clone()


def _round(value: torch.Tensor, out: torch.Tensor) -> None:
    """fp32 to bfloat16 (ties away) or fp16 (ties to even), every NaN as one, in place."""
    value.nan_to_num_(**_KEEP)
    if out.dtype == torch.bfloat16:
        bits = value.view(torch.int32).add_(0x8000)
        out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
        return
    out.copy_(value)
    out.view(torch.int16).masked_fill_(value.isnan(), 0x7E00)  # devices have NaN of their own


# -- group scales --


def _pack_groups(
    layout: Layout, value: torch.Tensor, packed: torch.Tensor, elements: int, start: int
) -> None:
    groups = value.view(-1, layout.group)
    scale_bits = _scales_of(layout.kind, groups)
    scale = (scale_bits << 16).view(torch.float32)
    usual = scale > 0  # neither NaN nor zero
    groups.masked_fill_(~usual.unsqueeze(1), 0.0).div_(torch.where(usual, scale, 1.0).unsqueeze(1))
    largest = LARGEST[layout.kind]
    codes = _code_of(layout.kind, value.clamp_(-largest, largest))
    scales_at = layout.scales_at(elements) + start // layout.group * 2
    scale_bytes = packed[scales_at : scales_at + 2 * len(scale_bits)]
    scale_bytes.view(torch.int16).copy_(scale_bits)
    if CODE_BITS[layout.kind] == 8:
        packed[start : start + len(codes)].copy_(codes)
        return
    low, high = codes.view(-1, 2, BLOCK // 2).unbind(1)
    both = low.bitwise_and(15).bitwise_or_(high << 4).view(-1)
    packed[start // 2 : start // 2 + len(both)].copy_(both)


def _scales_of(kind: str, groups: torch.Tensor) -> torch.Tensor:
    """The bfloat16 bits of each group's scale, int32."""
    largest = groups.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(1)  # of bits: as of magnitudes
    broken = largest >= 0x7F800000
    absmax = torch.where(broken, 0, largest).view(torch.float32)
    quotient = absmax / absmax.new_full((), LARGEST[kind])  # by a number, a device may multiply
    up = quotient.view(torch.int32).add(0xFFFF).bitwise_right_shift_(16)
    up = torch.where(largest > 0, up.clamp_(1, LARGEST_SCALE[kind]), 0)  # a quotient may underflow
    return torch.where(broken, NAN_SCALE, up)


def _code_of(kind: str, ratio: torch.Tensor) -> torch.Tensor:
    """Codes of ``x / scale``, uint8; NF4's nearest takes the lower at a tie."""
    if kind == "nf4":
        return torch.bucketize(ratio, _nf4(ratio.device)[1]).to(torch.uint8)
    if kind == "fp8_e4m3":
        return ratio.to(torch.float8_e4m3fn).view(torch.uint8)
    return ratio.round_().to(torch.int8).view(torch.uint8)


def group_scales(
    layout: Layout, packed: torch.Tensor, elements: int, start: int, stop: int
) -> torch.Tensor:
    """The scales that elements start..stop of a packed span are decoded with, fp32."""
    scales_at = layout.scales_at(elements) + 2 * (start // layout.group)
    num_scales = (stop - start) // layout.group
    scale_bits = packed[scales_at : scales_at + 2 * num_scales].view(torch.int16).int()
    return (scale_bits << 16).view(torch.float32)


def _unpack_groups(
    layout: Layout, packed: torch.Tensor, start: int, stop: int, scales: torch.Tensor
) -> torch.Tensor:
    if CODE_BITS[layout.kind] == 8:
        codes = packed[start:stop]
    else:
        codes = _nibbles(packed[start // 2 : stop // 2])
    value = _value_of(layout.kind, codes).view(-1, layout.group)
    return value.mul_(scales.unsqueeze(1)).nan_to_num_(**_KEEP).view(-1)


def _value_of(kind: str, codes: torch.Tensor) -> torch.Tensor:
    if kind == "nf4":
        return _nf4(codes.device)[0].index_select(0, codes.int())
    if kind == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if kind == "int8":
        return codes.view(torch.int8).float()
    return codes.bitwise_xor(8).float().sub_(8.0)


def _nibbles(halves: torch.Tensor) -> torch.Tensor:
    """Four-bit codes, of every 128 the low halves first."""
    block = halves.view(-1, BLOCK // 2)
    return torch.stack([block.bitwise_and(15), block >> 4], 1).view(-1)


@lru_cache(maxsize=8)
def _nf4(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and the midpoints between them, fp32."""
    values = torch.tensor(NF4, dtype=torch.float64)
    middles = (values[1:].float().double() + values[:-1].float().double()) / 2
    return values.float().to(device), middles.float().to(device)


# -- lossless12 --


def _pack_lossless(wire: torch.Tensor, packed: torch.Tensor) -> int:
    bits, elements = wire.view(torch.int16).int(), wire.numel()
    exponent = bits >> 7 & 255
    counts = torch.bincount(exponent, minlength=256)
    top = _top_of(counts)
    num_escapes = elements - int(counts[top - ESCAPE + 1 : top + 1].sum())
    place, raw_bytes = sections(elements, num_escapes), HEADER_BYTES + 2 * elements
    if place.end >= raw_bytes or num_escapes >= 2**32:
        _write_header(packed, RAW, 0, elements, 0, raw_bytes)
        packed[HEADER_BYTES:raw_bytes].view(torch.bfloat16).copy_(wire)
        return raw_bytes
    _write_header(packed, PACKED, top, elements, num_escapes, place.end)
    below = top - exponent
    escaped = (below < 0) | (below >= ESCAPE)
    packed[HEADER_BYTES : place.planes].zero_()
    _table(packed, place).copy_(_starts(escaped))
    packed[place.planes : place.codes].copy_(bits >> 8 & 128 | bits & 127)
    low, high = below.masked_fill_(escaped, ESCAPE).view(-1, 2, BLOCK // 2).unbind(1)
    packed[place.codes : place.escapes].copy_((low | high << 4).view(-1))
    packed[place.escapes : place.end].zero_()
    packed[place.escapes : place.escapes + num_escapes].copy_(exponent[escaped])
    return place.end


def _top_of(counts: torch.Tensor) -> int:
    """See :func:`zo_offload.codec.lossless.top_of`."""
    total = [0, *counts.cumsum(0).tolist()]
    held = [total[top + 1] - total[top + 1 - ESCAPE] for top in range(ESCAPE - 1, 256)]
    return held.index(max(held)) + ESCAPE - 1


def _starts(escaped: torch.Tensor) -> torch.Tensor:
    """``[tiles + 1]`` running counts of escapes before each tile, int64."""
    tiles = -(-len(escaped) // TILE)
    full = escaped.new_zeros(tiles * TILE)
    full[: len(escaped)] = escaped
    counts = full.view(tiles, TILE).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _table(packed: torch.Tensor, place: lossless12.Sections) -> torch.Tensor:
    return packed[HEADER_BYTES : HEADER_BYTES + 4 * (place.tiles + 1)].view(torch.int32)


def _write_header(packed: torch.Tensor, *fields: int) -> None:
    header = lossless12.header_bytes(*fields)
    packed[:HEADER_BYTES].copy_(torch.from_numpy(header))


def _unpack_lossless(packed: torch.Tensor, elements: int, start: int, stop: int) -> torch.Tensor:
    """bfloat16 of elements start..stop; whole tiles are checked against the table."""
    head = lossless12.read_header(
        packed[:HEADER_BYTES].cpu().numpy(), elements, num_bytes=packed.nbytes
    )
    if head.mode == RAW:
        return packed[HEADER_BYTES + 2 * start : HEADER_BYTES + 2 * stop].view(torch.bfloat16)
    place = sections(elements, head.escapes)
    tile, last = start // TILE, -(-stop // TILE)
    begin, end = tile * TILE, min(last * TILE, elements)
    codes = _nibbles(packed[place.codes + begin // 2 : place.codes + end // 2]).int()
    escaped = codes == ESCAPE
    table = _table(packed, place)[tile : last + 1].long() & 0xFFFFFFFF
    before, after = int(table[0]), int(table[-1])
    is_sound = (tile or not before) and (after == head.escapes or last < place.tiles)
    is_sound = is_sound and after <= head.escapes
    if not is_sound or not torch.equal(_starts(escaped) + before, table):
        raise CodecError(lossless12.wrong("its escapes do not match their table"))
    exponent = head.top - codes
    escapes = packed[place.escapes + before : place.escapes + after]
    exponent[escaped] = escapes.int()
    plane = packed[place.planes + start : place.planes + stop].int()
    bits = (plane & 128) << 8 | exponent[start - begin : stop - begin] << 7 | plane & 127
    return bits.to(torch.int16).view(torch.bfloat16)
