"""Spans and draws for hypothesis, and what the NumPy reference says about them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st

from zo_offload.ops import Draw, Segment, Span, StepUpdate, reference, torch_ops

DIRECTIONS = tuple(reference.DIRECTIONS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASTERS = {
    "fp32": (torch.float32, "fp32"),
    "fp16": (torch.float16, "fp32"),
    "planes": (torch.bfloat16, "fp32"),
    "bf16+8": (torch.bfloat16, "bf16+8"),
    "bf16_sr": (torch.bfloat16, "bf16_sr"),
}
KEPT_BITS = {"bf16+8": 24, "bf16_sr": 16}

# Zero, negative, half a step of bfloat16 and of fp16 above one, below the least fp32 denormal,
# denormal, so large that sums overflow, above fp32.
EDGE_COEFFICIENTS = (
    0.0,
    -0.0,
    1e-3,
    -1e-3,
    2.0**-8,
    2.0**-11,
    1e-46,
    -3e-45,
    1e-40,
    3e38,
    -3e38,
    1e39,
)

seeds = st.integers(0, 2**64 - 1)
coefficients = st.sampled_from(EDGE_COEFFICIENTS) | st.floats(-1e3, 1e3)
decays = st.sampled_from((1.0, 1.0 - 2.0**-16, 0.5)) | st.floats(0.9, 1.0)
draws = st.builds(
    Draw,
    seed=seeds,
    step=st.integers(0, 2**32 - 1),
    probe=st.integers(0, 2**15 - 1),
    coefficient=coefficients,
)
_shapes = st.tuples(st.integers(1, 700)) | st.tuples(st.integers(1, 20), st.integers(1, 40))
_mixed = st.lists(st.sampled_from((1.0, 0.8476, 17.25)), min_size=4, max_size=4)
# Of a part in its parameter: often none, or where blocks of a number grow a bit longer.
_offsets = st.just(0) | st.integers(0, 2**28 - 64).map(lambda block: 128 * block)
_scales = _mixed | st.just([1.0] * 4) | st.just([0.37] * 4)


def span_of(
    shapes: list[tuple[int, ...]],
    indices: list[int] | None = None,
    scales: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
    dither: bool = False,
    master: str = "fp32",
    codec: str = "identity",
    offsets: list[int] | None = None,
) -> Span:
    segments: list[Segment] = []
    start = 0
    for i, shape in enumerate(shapes):
        index, scale = indices[i] if indices else i, scales[i] if scales else 1.0
        offset = offsets[i] if offsets else 0
        segments.append(Segment(f"p{i}", index, shape, start, scale, offset))
        start += segments[-1].padded
    return Span(dtype, tuple(segments), 0, 0, dither=dither, master=master, codec=codec)


@st.composite
def spans(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float32,
    dither: bool = False,
    master: str = "fp32",
) -> Span:
    shapes = draw(st.lists(_shapes, min_size=1, max_size=4))
    index = st.integers(0, 2**20)
    indices = draw(st.lists(index, min_size=len(shapes), max_size=len(shapes), unique=True))
    offsets = draw(st.lists(_offsets, min_size=len(shapes), max_size=len(shapes)))
    scales = draw(_scales)
    return span_of(shapes, indices, scales, dtype, dither, master, offsets=offsets)


@contextlib.contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "CHUNK_ELEMENTS", elements)
        yield


def expected_noise(span: Span, direction: str, draw: Draw) -> npt.NDArray[np.float32]:
    """``coefficient * scale * z`` of a span, segment by segment."""
    out = []
    for segment in span.segments:
        place = (draw.seed, draw.step, draw.probe, segment.parameter_index)
        part = (segment.offset, segment.padded)
        with np.errstate(over="ignore", under="ignore"):
            out.append(
                reference.DIRECTIONS[direction](*place, *part, draw.coefficient * segment.scale)
            )
    return np.concatenate(out)


def expected_dither(span: Span, draw: Draw) -> npt.NDArray[np.uint32]:
    """The sixteen random bits of each element."""
    words = [
        reference.words(
            draw.seed,
            draw.step,
            draw.probe,
            reference.STREAM_DITHER,
            segment.parameter_index,
            segment.offset // reference.HALVES_PER_BLOCK,
            segment.padded // reference.HALVES_PER_BLOCK,
        )
        for segment in span.segments
    ]
    return reference.halves(np.concatenate(words))


def expected_rounding(span: Span, step: StepUpdate) -> npt.NDArray[np.uint32]:
    """The random bits by which a step rounds each element of a master of fewer bits."""
    per_block, lanes = (
        (reference.BYTES_PER_BLOCK, reference.eighths)
        if span.master == "bf16+8"
        else (reference.HALVES_PER_BLOCK, reference.halves)
    )
    stream = reference.STREAM_ROUNDING
    words = [
        reference.words(
            *(step.seed, step.step, 0, stream, s.parameter_index),
            *(s.offset // per_block, s.padded // per_block),
        )
        for s in span.segments
    ]
    return lanes(np.concatenate(words))


def held(span: Span, values: torch.Tensor) -> torch.Tensor:
    """The nearest that the span's master can hold."""
    if span.format not in KEPT_BITS:
        return values
    return torch.from_numpy(reference.nearest_master(values.numpy(), KEPT_BITS[span.format]))


def random_master(elements: int, seed: int = 0) -> torch.Tensor:
    """Weights of every magnitude with some special values among them."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-44, 38, (elements,), generator=generator)
    values = torch.randn(elements, generator=generator) * 10.0**exponent
    special = torch.tensor([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 1.0])
    values[: len(special)] = special[:elements]
    return values


def bits(value: torch.Tensor | np.ndarray) -> npt.NDArray[np.integer]:
    """The bits of 16- or 32-bit floats, all NaN alike."""
    if isinstance(value, torch.Tensor):
        nan = value.isnan().numpy()
        raw = value.contiguous().view({2: torch.int16, 4: torch.int32}[value.itemsize]).numpy()
    else:
        nan = np.isnan(value) if value.dtype.kind == "f" else np.zeros(value.shape, bool)
        raw = value.view({2: np.int16, 4: np.int32}[value.itemsize])
    return np.where(nan, 0x7FC0, raw)


def exact(value: torch.Tensor | np.ndarray) -> npt.NDArray[np.unsignedinteger]:
    """All bits, NaN as they are."""
    size = value.itemsize
    array = value
    if isinstance(value, torch.Tensor):
        array = value.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size]).numpy()
    return np.asarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])


def placed(value: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins ``offset`` elements after a cache line does."""
    line = 64 // value.itemsize
    memory = torch.empty(value.numel() + offset + line, dtype=value.dtype, device=value.device)
    begin = -memory.data_ptr() % 64 // value.itemsize + offset
    return memory[begin : begin + value.numel()].copy_(value)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    torch.zeros(1 << 18).add_(1)  # they begin now, and inherit no flag that is set later
    try:
        yield
    finally:
        torch.set_num_threads(before)


def expected_rows(
    span: Span,
    segment: Segment,
    wire: torch.Tensor,
    rows: torch.Tensor,
    direction: str,
    draw: Draw,
    base: int = 0,
) -> npt.NDArray[np.unsignedinteger]:
    """All bits of perturbed rows ``[n, width]``, each made alone.

    ``wire`` begins at row ``base``, from where ``rows`` are counted.
    """
    width, out = segment.shape[1], []
    for row in rows.tolist():
        first = (base + row) * width + segment.offset
        place = (draw.seed, draw.step, draw.probe, segment.parameter_index, first, width)
        held = wire[segment.start + row * width :][:width].float().numpy()
        with np.errstate(all="ignore"):
            noise = reference.DIRECTIONS[direction](*place, draw.coefficient * segment.scale)
            out.append(exact(expected_copy(span, reference.canonical(held + noise), draw)))
    kind = {2: np.uint16, 4: np.uint32}[span.dtype.itemsize]
    return np.array(out, kind).reshape(len(rows), width)


def expected_copy(span: Span, value: np.ndarray, draw: Draw) -> np.ndarray:
    """fp32 values as a perturbed copy of the span holds them."""
    if span.dither:
        return reference.dither_bf16(value, expected_dither(span, draw))
    if span.dtype == torch.bfloat16:
        return reference.round_bf16(value)
    return value.astype(np.float16) if span.dtype == torch.float16 else value
