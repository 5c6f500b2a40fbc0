"""The kernels in plain torch: the same bits as the NumPy reference, on any device.

Serves wherever no native kernel does. Work goes chunk by chunk, so that intermediates stay in cache
and a unit never needs a temporary of its own size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from zo_offload.ops import reference
from zo_offload.ops.span import Segment, Span

CHUNK_ELEMENTS = 1 << 18
_LOW = 0xFFFFFFFF
_SIGN_BIT = -(1 << 31)


@dataclass(frozen=True, slots=True)
class Draw:
    """One direction, and how far to go along it.

    Attributes:
        seed: 64-bit key.
        step: Step whose direction it is.
        probe: Which of the step's directions.
        coefficient: float64 factor on z.
    """

    seed: int
    step: int
    probe: int
    coefficient: float


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """What one step does to every trainable weight: multiply by ``decay``, then subtract the draws."""

    decay: float
    draws: tuple[Draw, ...]


def perturb(
    span: Span,
    wire: torch.Tensor,
    out: torch.Tensor,
    direction: str,
    draw: Draw,
    first: int = 0,
    count: int | None = None,
) -> None:
    """Write ``round(decode(wire) + coefficient * z)`` for a stretch of a span.

    Args:
        span: What the buffers hold.
        wire: The span's wire elements, ``[elements]`` in the forward's dtype.
        out: ``[count]`` in the forward's dtype.
        direction: ``rademacher`` or ``gaussian``.
        draw: Direction and signed coefficient.
        first: First element of the stretch, a multiple of 128.
        count: Its length (default: to the end), a multiple of 128.
    """
    count = span.elements - first if count is None else count
    for start, stop in _chunks(first, first + count):
        value = wire[start:stop].float()
        value = value + _term(span, direction, draw, start, stop, wire.device)
        target = out[start - first : stop - first]
        if span.dither:
            target.copy_(_dither_bf16(value, span, draw, start, stop))
        elif span.dtype == torch.bfloat16:
            target.copy_(_round_bf16(value))
        else:
            target.copy_(value)


def update(
    span: Span, wire: torch.Tensor, rest: torch.Tensor, direction: str, steps: Sequence[StepUpdate]
) -> None:
    """Bring a trainable span's master through ``steps``, in place, each rounded once.

    Args:
        span: What the buffers hold.
        wire: The span's wire elements (for bfloat16 and fp32, part of the master itself).
        rest: What stays home beside them.
        direction: ``rademacher`` or ``gaussian``.
        steps: In order. A draw whose coefficient is zero is not added.
    """
    if not steps:
        return
    for start, stop in _chunks(0, span.elements):
        master = load_master(span.dtype, wire[start:stop], rest[start:stop])
        for step in steps:
            if step.decay != 1.0:
                master = _canonical((master.double() * step.decay).float())
            total = None
            for draw in step.draws:
                if draw.coefficient == 0.0:
                    continue
                term = _term(span, direction, draw, start, stop, wire.device)
                total = term if total is None else total + term
            if total is not None:
                master = _canonical(master - total)
        store_master(span.dtype, master, wire[start:stop], rest[start:stop])


def load_master(dtype: torch.dtype, wire: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The fp32 master ``[n]`` of a trainable span from what travels and what rests."""
    if dtype == torch.bfloat16:
        high = wire.view(torch.int16).to(torch.int32) << 16
        return (high + rest.to(torch.int32)).view(torch.float32)
    return (wire if dtype == torch.float32 else rest).clone()


def store_master(
    dtype: torch.dtype, master: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor
) -> None:
    """Inverse of :func:`load_master`: encode the wire from the master, keep the rest home."""
    if dtype == torch.bfloat16:
        bits = _canonical(master).view(torch.int32)
        wire.view(torch.int16).copy_((bits + 0x8000) >> 16)
        rest.copy_(bits)  # int32 to int16 keeps the low sixteen bits
        return
    wire.copy_(master)
    if dtype == torch.float16:
        rest.copy_(master)


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
    """``coefficient * scale * z`` for elements start..stop of a span, fp32."""
    per_block = _ELEMENTS_PER_BLOCK[direction]
    block, parameter, scale = _blocks(span, start, stop, per_block, device)
    words = _philox(block, parameter, draw, reference.STREAM_NOISE)
    if isinstance(scale, float):
        return _TERMS[direction](words, draw.coefficient * scale)
    return _SCALED_TERMS[direction](words, draw.coefficient * scale)


def _blocks(
    span: Span, start: int, stop: int, per_block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | int, torch.Tensor | float]:
    """Block number, parameter index and scale of the blocks that cover elements start..stop."""
    block = torch.arange(start // per_block, stop // per_block, device=device)
    starts, indices, scales = _segment_table(span, per_block, device)
    row = torch.searchsorted(starts, block, right=True) - 1
    uniform = span.uniform_scale
    return block - starts[row], indices[row], scales[row] if uniform is None else uniform


@lru_cache(maxsize=512)
def _segment_table(
    span: Span, per_block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    starts = torch.tensor([s.start // per_block for s in span.segments], device=device)
    indices = torch.tensor([s.parameter_index for s in span.segments], device=device)
    scales = torch.tensor([s.scale for s in span.segments], dtype=torch.float64, device=device)
    return starts, indices, scales


def _philox(
    block: torch.Tensor, parameter: torch.Tensor | int, draw: Draw, stream: int
) -> torch.Tensor:
    """Philox4x32-10 in int64 arithmetic (products wrap, shifts are masked): int32 words ``[n, 4]``."""
    m0, m1 = reference.PHILOX_MULTIPLIERS
    k0, k1 = draw.seed & _LOW, (draw.seed >> 32) & _LOW
    # The third word is the step and the fourth probe and stream: scalars in the first round.
    product = (draw.step & _LOW) * m1
    p0 = block * m0
    c0, c1 = (parameter ^ (product >> 32) ^ k0), torch.full_like(block, product & _LOW)
    c2, c3 = ((p0 >> 32) & _LOW) ^ (draw.probe | stream << 16) ^ k1, p0 & _LOW
    if not isinstance(c0, torch.Tensor):
        c0 = torch.full_like(block, c0)
    for _ in range(reference.PHILOX_ROUNDS - 1):
        k0 = (k0 + reference.PHILOX_WEYL[0]) & _LOW
        k1 = (k1 + reference.PHILOX_WEYL[1]) & _LOW
        p0, p1 = c0 * m0, c2 * m1
        c0 = ((p1 >> 32) & _LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = ((p0 >> 32) & _LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_LOW), p0.bitwise_and_(_LOW)
    return torch.stack((c0, c1, c2, c3), dim=1).to(torch.int32)


@lru_cache(maxsize=8)
def _shifts(device: torch.device) -> torch.Tensor:
    return 31 - torch.arange(32, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _cells(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(reference.gaussian_cells()).to(device)


def _flip_signs(words: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    signs = (words.unsqueeze(-1) << _shifts(words.device)).bitwise_and_(_SIGN_BIT)
    return signs.bitwise_xor_(bits).view(torch.float32).view(-1)


def _rademacher(words: torch.Tensor, coefficient: float) -> torch.Tensor:
    value = torch.tensor(coefficient, dtype=torch.float64, device=words.device).float()
    return _flip_signs(words, value.view(torch.int32))


def _rademacher_scaled(words: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return _flip_signs(words, coefficients.float().view(torch.int32).view(-1, 1, 1))


def _cell_numbers(words: torch.Tensor) -> torch.Tensor:
    return torch.stack((words & 0xFFF, (words >> 16) & 0xFFF), dim=2)


def _gaussian(words: torch.Tensor, coefficient: float) -> torch.Tensor:
    table = (_cells(words.device) * coefficient).float()
    return table.index_select(0, _cell_numbers(words).view(-1))


def _gaussian_scaled(words: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    cells = _cells(words.device).index_select(0, _cell_numbers(words).view(-1)).view(-1, 8)
    return (cells * coefficients.view(-1, 1)).float().view(-1)


_ELEMENTS_PER_BLOCK = {
    "rademacher": reference.SIGNS_PER_BLOCK,
    "gaussian": reference.HALVES_PER_BLOCK,
}
_TERMS = {"rademacher": _rademacher, "gaussian": _gaussian}
_SCALED_TERMS = {"rademacher": _rademacher_scaled, "gaussian": _gaussian_scaled}


def _canonical(value: torch.Tensor) -> torch.Tensor:
    """Every NaN as 0x7fc00000."""
    return torch.where(value.isnan(), float("nan"), value)


def _round_bf16(value: torch.Tensor) -> torch.Tensor:
    bits = _canonical(value).view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def _dither_bf16(
    value: torch.Tensor, span: Span, draw: Draw, start: int, stop: int
) -> torch.Tensor:
    """Stochastic rounding; the dither does not depend on the coefficient, so both signs share it."""
    block, parameter, _ = _blocks(span, start, stop, reference.HALVES_PER_BLOCK, value.device)
    words = _philox(block, parameter, draw, reference.STREAM_DITHER)
    random16 = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=2).view(-1)
    bits = _canonical(value).view(torch.int32)
    random16 = torch.where(value.isfinite(), random16, 0)
    return ((bits + random16) >> 16).to(torch.int16).view(torch.bfloat16)


def perturb_rows(
    span: Span, segment: Segment, wire: torch.Tensor, rows: torch.Tensor, direction: str, draw: Draw
) -> torch.Tensor:
    """Some rows of a perturbed two-dimensional parameter, without perturbing the others.

    Args:
        span: Holds the parameter.
        segment: The parameter, ``[height, width]``.
        wire: The span's wire elements.
        rows: ``[n]`` row numbers, repetition allowed.
        direction: ``rademacher`` or ``gaussian``.
        draw: Direction and signed coefficient.

    Returns:
        ``[n, width]``, the bits that :func:`perturb` gives those rows.
    """
    width, per_block = segment.shape[1], _ELEMENTS_PER_BLOCK[direction]
    table = wire[segment.start : segment.start + segment.numel].view(segment.shape)
    first = rows * width  # element number of each row's start
    slack = 0 if width % per_block == 0 else per_block - 1
    across = -(-(width + slack) // per_block)  # blocks that a row may touch
    block = (first // per_block).unsqueeze(1) + torch.arange(across, device=rows.device)
    words = _philox(block.reshape(-1), segment.parameter_index, draw, reference.STREAM_NOISE)
    term = _TERMS[direction](words, draw.coefficient * segment.scale).view(
        len(rows), across * per_block
    )
    column = (first % per_block).unsqueeze(1) + torch.arange(width, device=rows.device)
    value = table.index_select(0, rows).float() + term.gather(1, column)
    return _round_bf16(value) if span.dtype == torch.bfloat16 else value.to(span.dtype)
