"""The kernels in plain torch: the same bits as the NumPy reference, on any device.

Serves wherever no native kernel does. Work goes chunk by chunk, so that a unit never needs a
temporary of its own size. Philox is some 110 torch calls whatever the number of blocks, 0.2 ms on a
CPU: a chunk is large enough to hide them and small enough for a third-level cache.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch

from zo_offload.ops import reference, torch_codecs
from zo_offload.ops.draws import Draw, Point, StepUpdate
from zo_offload.ops.span import Segment, Span

CHUNK_ELEMENTS = 1 << 20
# Until glibc has seen a large block freed, it gives a chunk's temporaries back to the system and
# faults them in again for the next, which takes half the time. This block is never touched.
torch.empty(31 << 20, dtype=torch.uint8)
_LOW = 0xFFFFFFFF
_SIGN_BIT = -(1 << 31)
_DENORMAL = 1e-310


@contextmanager
def denormals_kept() -> Iterator[None]:
    """Meanwhile, denormals count in the calling thread, whatever its flush-to-zero says."""
    flushes = _DENORMAL * 1.0 == 0.0
    if flushes:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)


@torch.inference_mode()
@denormals_kept()
def perturb(
    span: Span,
    wire: torch.Tensor,
    out: torch.Tensor,
    direction: str,
    draw: Draw,
    first: int = 0,
    count: int | None = None,
    ahead: Sequence[StepUpdate] = (),
) -> None:
    """See :func:`zo_offload.ops.perturb`."""
    count = span.elements - first if count is None else count
    for start, stop in _chunks(first, first + count):
        value = _seen(span, wire, start, stop)
        for step in ahead:
            value = _moved(span, value, direction, step, start, stop)
        value.add_(_term(span, direction, draw, start, stop, wire.device))
        target = out[start - first : stop - first]
        if span.dither:
            _dither_bf16_(value, target, _random16(span, draw, start, stop, wire.device))
        elif span.dtype == torch.bfloat16:
            _round_bf16_(value, target)
        else:
            _narrow_(value, target)


def _seen(span: Span, wire: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """What the forward sees of elements start..stop, fp32, not shared."""
    if span.codec == "identity":
        return wire[start:stop].to(torch.float32, copy=True)
    return torch_codecs.decoded(span.layout, wire, span.elements, span.dtype, start, stop)


@torch.inference_mode()
@denormals_kept()
def update(
    span: Span,
    wire: torch.Tensor,
    rest: torch.Tensor,
    direction: str,
    steps: Sequence[StepUpdate],
    points: Sequence[Point] = (),
    ahead: Sequence[StepUpdate] = (),
) -> None:
    """See :func:`zo_offload.ops.update`."""
    _take_steps(span, wire, rest, direction, steps)
    for point in points:
        perturb(span, wire, point.out, direction, point.draw, ahead=ahead)


@torch.inference_mode()
@denormals_kept()
def lift(values: torch.Tensor) -> None:
    """What is not above zero becomes zero, in place; NaN stay."""
    values.masked_fill_(values <= 0.0, 0.0)


def _take_steps(
    span: Span, wire: torch.Tensor, rest: torch.Tensor, direction: str, steps: Sequence[StepUpdate]
) -> None:
    if not steps:
        return
    for start, stop in _chunks(0, span.elements):
        master = load_master(span, wire[start:stop], rest[start:stop])
        for step in steps:
            master = _moved(span, master, direction, step, start, stop)
            if span.format in _KEPT_BITS:
                _round_master_(span, master, step, start, stop)
        store_master(span, master, wire[start:stop], rest[start:stop])


def _moved(
    span: Span, value: torch.Tensor, direction: str, step: StepUpdate, start: int, stop: int
) -> torch.Tensor:
    """Elements start..stop after a step, fp32; ``value`` is used up."""
    if step.decay != 1.0:
        value = _canonical_(value.double().mul_(step.decay).float())
    total = None
    for draw in step.draws:
        if draw.coefficient == 0.0:
            continue
        term = _term(span, direction, draw, start, stop, value.device)
        total = term if total is None else total.add_(term)
    return value if total is None else _canonical_(value.sub_(total))


def load_master(span: Span, wire: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The fp32 master ``[n]`` of part of a trainable span from what travels and what rests."""
    if span.dtype != torch.bfloat16:
        return (wire if span.dtype == torch.float32 else rest).clone()
    high = wire.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    if span.format == "planes":
        high.add_(rest.to(torch.int32))
    elif span.format == "bf16+8":
        high.add_(rest.to(torch.int32).bitwise_left_shift_(8))
    return high.view(torch.float32)


def store_master(span: Span, master: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor) -> None:
    """See :func:`zo_offload.ops.store_master`."""
    if span.dtype == torch.float32:
        _canonical_(wire.copy_(master))
        return
    if span.dtype == torch.float16:
        _narrow_(rest.copy_(master), wire)
        return
    bits = master.nan_to_num(**_KEEP).view(torch.int32)
    if span.format == "bf16+8":
        bits.add_(0x80).bitwise_and_(-0x100)
        rest.copy_(bits >> 8)  # int32 to int8 keeps the low eight bits
    elif span.format == "planes":
        rest.copy_(bits)  # int32 to int16 keeps the low sixteen bits
    wire.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def encode(dtype: torch.dtype, values: torch.Tensor, wire: torch.Tensor) -> None:
    """See :func:`zo_offload.ops.encode`."""
    if dtype == torch.bfloat16:
        _round_bf16_(values.clone(), wire)
    else:
        _narrow_(values.clone(), wire)


@denormals_kept()
def noise(
    span: Span, direction: str, draw: Draw, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """``coefficient * scale * z`` of a whole span, fp32 ``[elements]``."""
    device = torch.device(device)
    parts = [_term(span, direction, draw, a, b, device) for a, b in _chunks(0, span.elements)]
    return torch.cat(parts)


def _chunks(first: int, last: int) -> list[tuple[int, int]]:
    return [(a, min(a + CHUNK_ELEMENTS, last)) for a in range(first, last, CHUNK_ELEMENTS)]


def _term(
    span: Span, direction: str, draw: Draw, start: int, stop: int, device: torch.device
) -> torch.Tensor:
    """``coefficient * scale * z`` for elements start..stop of a span, fp32, not shared."""
    per_block = _ELEMENTS_PER_BLOCK[direction]
    block, parameter, scale = _blocks(span, start, stop, per_block, device)
    words = _philox(block, parameter, draw, reference.STREAM_NOISE)
    if isinstance(scale, torch.Tensor):
        return _SCALED_TERMS[direction](words, draw.coefficient * scale)
    return _TERMS[direction](words, draw.coefficient * scale)


def _blocks(
    span: Span, start: int, stop: int, per_block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | int, torch.Tensor | float]:
    """Block number, parameter index and scale of the blocks that cover elements start..stop."""
    inside = span.overlapping(start, stop)
    if len(inside) == 1:
        segment, first, last = inside[0]
        block = torch.arange(first // per_block, last // per_block, device=device)
        return block, segment.parameter_index, segment.scale
    block = torch.arange(start // per_block, stop // per_block, device=device)
    counts = sent([(last - first) // per_block for _, first, last in inside], torch.int64, device)

    def spread(values: list, dtype: torch.dtype) -> torch.Tensor:
        table = sent(values, dtype, device)
        return table.repeat_interleave(counts, output_size=len(block))

    segments = [segment for segment, _, _ in inside]
    begins = [(segment.start - segment.offset) // per_block for segment in segments]
    block -= spread(begins, torch.int64)
    parameter = spread([segment.parameter_index for segment in segments], torch.int64)
    scales = [segment.scale for segment in segments]
    return block, parameter, spread(scales, torch.float64) if len(set(scales)) > 1 else scales[0]


def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A few numbers on a device, which nobody waits for: they are read before this returns."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def digest(words: torch.Tensor, first: int) -> int:
    """See :func:`zo_offload.ops.reference.digest`; ``words`` are int32 ``[n]``."""
    total = 0
    for start in range(0, len(words), CHUNK_ELEMENTS):
        x = words[start : start + CHUNK_ELEMENTS].long().bitwise_and_(_LOW)
        place = torch.arange(first + start, first + start + len(x), device=x.device)
        x = x.add_(place.bitwise_left_shift_(32)).add_(_signed(0x9E3779B97F4A7C15))
        x = x.bitwise_xor_(_shifted(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
        x = x.bitwise_xor_(_shifted(x, 27)).mul_(_signed(0x94D049BB133111EB))
        total += int(x.bitwise_xor_(_shifted(x, 31)).sum())
    return total % 2**64


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(values: torch.Tensor, count: int) -> torch.Tensor:
    """To the right, as unsigned numbers."""
    return (values >> count).bitwise_and_((1 << 64 - count) - 1)


def _philox(
    block: torch.Tensor, parameter: torch.Tensor | int, draw: Draw, stream: int
) -> torch.Tensor:
    """Philox4x32-10 in int64 arithmetic: int32 words ``[n, 4]``.

    Products wrap modulo 2^64, as they should. Only a word that is about to be multiplied must be
    clean above its 32 bits; the others are whole products whose low half counts.
    """
    m0, m1 = reference.PHILOX_MULTIPLIERS
    k0, k1 = draw.seed & _LOW, (draw.seed >> 32) & _LOW
    # Words that all blocks share stay single elements until a round mixes them with the others.
    c0, c2 = block, block.new_full((1,), draw.step & _LOW)
    c1 = parameter if isinstance(parameter, torch.Tensor) else block.new_full((1,), parameter)
    c3 = block.new_full((1,), draw.probe | stream << 16)
    for _ in range(reference.PHILOX_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c2 = _mix(p1, c1, k0), _mix(p0, c3, k1)
        c1, c3 = p1, p0
        k0, k1 = (k0 + reference.PHILOX_WEYL[0]) & _LOW, (k1 + reference.PHILOX_WEYL[1]) & _LOW
    words = block.new_empty((len(block), 4), dtype=torch.int32)
    for i, word in enumerate((c0, c1, c2, c3)):
        words[:, i] = word  # int64 to int32 keeps the low half
    return words


def _mix(product: torch.Tensor, word: torch.Tensor, key: int) -> torch.Tensor:
    high = product >> 32
    high = high.bitwise_xor_(word) if len(high) >= len(word) else high ^ word
    return high.bitwise_xor_(key).bitwise_and_(_LOW)


@lru_cache(maxsize=8)
def _shifts(device: torch.device) -> torch.Tensor:
    return 31 - torch.arange(32, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def cells(device: torch.device) -> torch.Tensor:
    """The gaussian's 4,096 values on a device, float64."""
    return torch.tensor(reference.gaussian_cells(), device=device)


def _flip_signs(words: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    signs = (words.unsqueeze(-1) << _shifts(words.device)).bitwise_and_(_SIGN_BIT)
    return signs.bitwise_xor_(bits).view(torch.float32).view(-1)


def _rademacher(words: torch.Tensor, coefficient: float) -> torch.Tensor:
    value = torch.full((), coefficient, dtype=torch.float64, device=words.device).float()
    return _flip_signs(words, value.view(torch.int32))


def _rademacher_scaled(words: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return _flip_signs(words, coefficients.float().view(torch.int32).view(-1, 1, 1))


def _halves(words: torch.Tensor, mask: int) -> torch.Tensor:
    """Sixteen-bit lanes, low half first (little-endian), under a mask: int16 ``[8 n]``."""
    return words.view(torch.int16).view(-1) & mask


def _gaussian(words: torch.Tensor, coefficient: float) -> torch.Tensor:
    table = (cells(words.device) * coefficient).float()
    return table.index_select(0, _halves(words, 0xFFF).long())


def _gaussian_scaled(words: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    values = cells(words.device).index_select(0, _halves(words, 0xFFF).long()).view(-1, 8)
    return values.mul_(coefficients.view(-1, 1)).float().view(-1)


_ELEMENTS_PER_BLOCK = {
    "rademacher": reference.SIGNS_PER_BLOCK,
    "gaussian": reference.HALVES_PER_BLOCK,
}
_TERMS = {"rademacher": _rademacher, "gaussian": _gaussian}
_SCALED_TERMS = {"rademacher": _rademacher_scaled, "gaussian": _gaussian_scaled}


_KEEP = {"nan": math.nan, "posinf": math.inf, "neginf": -math.inf}


def _canonical_(value: torch.Tensor) -> torch.Tensor:
    """Every NaN becomes 0x7fc00000, in place."""
    return value.nan_to_num_(**_KEEP)


def _narrow_(value: torch.Tensor, out: torch.Tensor) -> None:
    """fp32 as it is, or the nearest fp16, ties to even, written to ``out``; NaN as one, in both.

    A device's own fp16 of NaN is another than a CPU's.
    """
    out.copy_(_canonical_(value))
    if out.dtype == torch.float16 and out.device.type != "cpu":
        out.view(torch.int16).masked_fill_(value.isnan(), 0x7E00)


def _round_bf16_(value: torch.Tensor, out: torch.Tensor) -> None:
    """Nearest bfloat16, ties away from zero, written to ``out``; ``value`` is used up."""
    bits = _canonical_(value).view(torch.int32).add_(0x8000)
    out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))


def _dither_bf16_(value: torch.Tensor, out: torch.Tensor, random16: torch.Tensor) -> None:
    """Stochastic rounding written to ``out``; infinities and NaN are kept; ``value`` is used up."""
    bits = _canonical_(value).view(torch.int32)
    bits.add_(torch.where(value.isfinite(), random16, 0))
    out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))


# Of an fp32 master's bits, those that a smaller master keeps.
_KEPT_BITS = {"bf16+8": 24, "bf16_sr": 16}


def _round_master_(
    span: Span, master: torch.Tensor, step: StepUpdate, start: int, stop: int
) -> None:
    """Stochastic rounding, in place, from the step's own noise; infinities and NaN are kept."""
    draw = Draw(step.seed, step.step, 0, 0.0)
    eight = span.format == "bf16+8"
    per_block = reference.BYTES_PER_BLOCK if eight else reference.HALVES_PER_BLOCK
    block, parameter, _ = _blocks(span, start, stop, per_block, master.device)
    words = _philox(block, parameter, draw, reference.STREAM_ROUNDING)
    lanes = words.view(torch.uint8).view(-1).int() if eight else _halves(words, -1).int()
    random = lanes.bitwise_and_(0xFF if eight else 0xFFFF)
    bits = master.view(torch.int32)
    bits.add_(torch.where(master.isfinite(), random, 0))
    bits.bitwise_and_(-1 << (32 - _KEPT_BITS[span.format]))


def _random16(span: Span, draw: Draw, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Dither for elements start..stop; it does not know the coefficient, so both signs share it."""
    block, parameter, _ = _blocks(span, start, stop, reference.HALVES_PER_BLOCK, device)
    words = _philox(block, parameter, draw, reference.STREAM_DITHER)
    return _halves(words, -1).int().bitwise_and_(0xFFFF)


@denormals_kept()
def perturb_rows(
    span: Span, segment: Segment, wire: torch.Tensor, rows: torch.Tensor, direction: str, draw: Draw
) -> torch.Tensor:
    """See :func:`zo_offload.ops.perturb_rows`."""
    width, per_block = segment.shape[1], _ELEMENTS_PER_BLOCK[direction]
    if len(rows) == 0:
        return torch.empty(0, width, dtype=span.dtype, device=rows.device)
    table = wire[segment.start : segment.start + segment.numel].view(segment.shape)
    first = rows * width + segment.offset  # element number of each row's start
    slack = 0 if width % per_block == 0 else per_block - 1
    across = -(-(width + slack) // per_block)  # blocks that a row may touch
    block = (first // per_block).unsqueeze(1) + torch.arange(across, device=rows.device)
    words = _philox(block.reshape(-1), segment.parameter_index, draw, reference.STREAM_NOISE)
    term = _TERMS[direction](words, draw.coefficient * segment.scale).view(
        len(rows), across * per_block
    )
    column = (first % per_block).unsqueeze(1) + torch.arange(width, device=rows.device)
    value = table.index_select(0, rows).float() + term.gather(1, column)
    perturbed = torch.empty_like(value, dtype=span.dtype)
    if span.dtype == torch.bfloat16:
        _round_bf16_(value, perturbed)
    else:
        _narrow_(value, perturbed)
    return perturbed
