"""Whole jobs for hypothesis, all that must never change their bits, and the reference's results."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st

from ops.spans import (
    DIRECTIONS,
    KEPT_BITS,
    MASTERS,
    chunks_of,
    decays,
    draws,
    exact,
    expected_copy,
    expected_noise,
    expected_rounding,
    placed,
    seeds,
    spans,
)
from zo_offload.ops import Draw, Point, Span, StepUpdate, native, reference
from zo_offload.ops.span import REST_DTYPES

Bits = npt.NDArray[np.unsignedinteger]

NANS, INFINITIES = (0x7FC00000, 0xFFC00001, 0x7F800001), (0x7F800000, 0xFF800000)
LEAST = (0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000)
SPECIAL = np.array(
    [*NANS, *INFINITIES, *LEAST, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000], np.uint32
)


def any_weights(elements: int, seed: int) -> torch.Tensor:
    """fp32 of every sort side by side: any bits, NaN, infinities, denormals, ties of formats."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 2**32, elements, np.uint32)
    usual = raw & np.uint32(0x807FFFFF) | generator.integers(98, 146, elements, np.uint32) << 23
    sorts = [
        raw,
        usual,
        raw & np.uint32(0x807FFFFF),  # denormal
        generator.choice(SPECIAL, elements),
        usual & np.uint32(0xFFFF0000) | np.uint32(0x8000),  # between two bfloat16
        usual & np.uint32(0xFFFFFF00) | np.uint32(0x80),  # between two of 24 bits
        usual & np.uint32(0xFFFFE000) | np.uint32(0x1000),  # between two of fp16
    ]
    return torch.from_numpy(np.choose(generator.integers(0, len(sorts), elements), sorts)).view(
        torch.float32
    )


@dataclass(frozen=True)
class Job:
    """A span's weights, what their masters take, what the copies take besides, and the copies."""

    span: Span
    values: torch.Tensor
    direction: str
    steps: tuple[StepUpdate, ...]
    ahead: tuple[StepUpdate, ...]
    points: tuple[Draw, ...]


@dataclass(frozen=True)
class Circumstances:
    """What must never change a bit.

    Attributes:
        offset: Elements from the begin of a cache line to that of memory.
        chunk: Elements that torch takes at a time.
        flushes: Whether the caller takes denormals for zero.
        streams: Whether native kernels write copies around the caches.
    """

    offset: int
    chunk: int
    flushes: bool
    streams: bool


circumstances = st.builds(
    Circumstances,
    st.integers(0, 70),
    st.sampled_from((256, 640, 1 << 20)),
    st.booleans(),
    st.booleans(),
)
_step = st.builds(
    StepUpdate, decays, st.lists(draws, max_size=3).map(tuple), seeds, st.integers(0, 2**32 - 1)
)
_usual = st.builds(StepUpdate, st.just(1.0), st.tuples(draws), seeds, st.integers(0, 2**32 - 1))
_steps = st.lists(_step, max_size=2) | st.lists(_usual, max_size=1)  # the latter may be fused


@st.composite
def _points(draw: st.DrawFn) -> tuple[Draw, ...]:
    one = draw(draws)
    other = Draw(one.seed, one.step, one.probe, -one.coefficient)
    return draw(st.sampled_from(((), (one,), (one, other), (other, one, one)))) + draw(
        st.lists(draws, max_size=1).map(tuple)
    )


@st.composite
def jobs(draw: st.DrawFn, layout: str, of: Any = None) -> Job:
    dtype, master = MASTERS[layout]
    dither = dtype == torch.bfloat16 and draw(st.booleans())
    span = draw(of(dtype, dither, master) if of else spans(dtype, dither, master))
    return Job(
        span,
        any_weights(span.elements, draw(st.integers(0, 2**32 - 1))),
        draw(st.sampled_from(DIRECTIONS)),
        tuple(draw(_steps)),
        tuple(draw(_steps)),
        draw(_points()),
    )


def moved(span: Span, value: np.ndarray, direction: str, step: StepUpdate) -> np.ndarray:
    """fp32 values of a span after a step."""
    terms = [expected_noise(span, direction, d) for d in step.draws if d.coefficient != 0.0]
    return reference.update_master(value, terms, step.decay)


def expected(job: Job) -> list[Bits]:
    """Wire, rest where there is one, and copies, as the reference has them."""
    span, layout = job.span, job.span.format
    value = reference.canonical(job.values.numpy())
    if layout in KEPT_BITS:
        value = reference.nearest_master(value, KEPT_BITS[layout])
    with np.errstate(all="ignore"):
        for step in job.steps:
            value = moved(span, value, job.direction, step)
            if layout in KEPT_BITS and (step.decay != 1.0 or any(_terms(step))):
                random = expected_rounding(span, step)
                value = reference.round_master(value, random, KEPT_BITS[layout])
        wire, rest = reference.encode(value, layout)
        seen = wire.astype(np.float32)
        if span.dtype == torch.bfloat16:
            seen = (wire.astype(np.uint32) << np.uint32(16)).view(np.float32)
        for step in job.ahead:
            seen = moved(span, seen, job.direction, step)
        copies = [
            reference.canonical(seen + expected_noise(span, job.direction, draw))
            for draw in job.points
        ]
        copies = [
            expected_copy(span, copy, draw) for copy, draw in zip(copies, job.points, strict=True)
        ]
    return [exact(part) for part in (wire, rest, *copies) if part is not None]


def _terms(step: StepUpdate) -> list[bool]:
    return [draw.coefficient != 0.0 for draw in step.draws]


def done(
    serving: Any, job: Job, offset: int = 0, stretch: slice | None = None, device: str = "cpu"
) -> list[Bits]:
    """The same by an implementation: its ``store_master``, then its ``update``.

    The last copy's ``stretch`` is made again, alone.
    """
    span, kind = job.span, REST_DTYPES[job.span.format]

    def memory(elements: int, dtype: torch.dtype) -> torch.Tensor:
        return placed(torch.full((elements,), 77, dtype=dtype, device=device), offset)

    wire = memory(span.elements, span.dtype)
    rest = memory(span.elements if kind else 0, kind or torch.uint8)
    outs = [memory(span.elements, span.dtype) for _ in job.points]
    points = [Point(out, draw) for out, draw in zip(outs, job.points, strict=True)]
    serving.store_master(span, placed(job.values.to(device), offset), wire, rest)
    serving.update(span, wire, rest, job.direction, job.steps, points, job.ahead)
    if stretch is not None and points:
        first, out = stretch.start, memory(stretch.stop - stretch.start, span.dtype)
        last = points[-1].draw, first, len(out), job.ahead
        serving.perturb(span, wire, out, job.direction, *last)
        np.testing.assert_array_equal(exact(out.cpu()), exact(outs[-1].cpu())[stretch])
    return [exact(part.cpu()) for part in (wire, *([rest] if kind else []), *outs)]


@st.composite
def stretches(draw: st.DrawFn, span: Span) -> slice:
    """Elements of a span, in whole blocks."""
    first = draw(st.integers(0, span.elements // 128 - 1))
    return slice(first * 128, draw(st.integers(first + 1, span.elements // 128)) * 128)


def assert_same(found: list[Bits], right: list[Bits]) -> None:
    for mine, theirs in zip(found, right, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@contextlib.contextmanager
def flushing(flushes: bool = True) -> Iterator[None]:
    """Meanwhile, the calling thread takes denormals for zero, where the machine can."""
    flushes = flushes and torch.set_flush_denormal(True)
    try:
        yield
        assert not flushes or 1e-310 * float(flushes) == 0.0  # still: the caller's own flag is kept
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def under(around: Circumstances) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, chunks_of(around.chunk), flushing(around.flushes):
        patch.setattr(native, "MOST_CACHED", 0 if around.streams else 1 << 40)
        yield
