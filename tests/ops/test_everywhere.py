"""The reference's bits, whatever the job and whatever is around it, from every implementation."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ops.jobs import (
    Circumstances,
    Far,
    any_weights,
    assert_same,
    circumstances,
    done,
    expected,
    flushing,
    jobs,
    stretches,
    under,
)
from ops.spans import (
    DIRECTIONS,
    DTYPES,
    MASTERS,
    draws,
    exact,
    expected_copy,
    expected_rows,
    placed,
    seeds,
    span_of,
    threads,
)
from ops.test_philox import KNOWN_ANSWERS, hexadecimal
from zo_offload import ops
from zo_offload.ops import Draw, Segment, Span, kernels, native, reference

MOST = 2**35  # elements whose blocks a counter can number
uint32 = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("layout", MASTERS)
@settings(max_examples=50)
@given(data=st.data(), around=circumstances)
def test_any_job(layout: str, data: st.DataObject, around: Circumstances):
    job = data.draw(jobs(layout))
    right = expected(job)
    with under(around):
        found = done(ops, job, around.offset, data.draw(stretches(job.span)))
    assert_same(found, right)


@st.composite
def large(draw: st.DrawFn, *kind: Any) -> Span:
    """More than one thread takes at a time, in two parameters."""
    shapes = [(draw(st.integers(33_000, 90_000)),), (draw(st.integers(1, 50)), 900)]
    return span_of(shapes, [7, 3], draw(st.sampled_from(([1.0, 1.0], [0.37, 2.0]))), *kind)


@pytest.mark.parametrize("layout", MASTERS)
@settings(max_examples=3)
@given(data=st.data(), num_threads=st.integers(1, 5), openmp=st.booleans(), streams=st.booleans())
def test_any_number_of_threads(
    implementation: str,
    layout: str,
    data: st.DataObject,
    num_threads: int,
    openmp: bool,
    streams: bool,
):
    job = data.draw(jobs(layout, large))
    right = expected(job)
    own = implementation != kernels.TORCH and not openmp
    with pytest.MonkeyPatch.context() as patch, threads(num_threads), flushing(own):
        patch.setattr(native, "MOST_CACHED", 0 if streams else 1 << 40)  # or around the caches
        if own:  # its own threads begin and end here, and inherit the caller's flag
            native.library().zo_use_openmp(None)
        try:
            found = done(ops, job)
        finally:
            native.library.cache_clear()
            native.library()
    assert_same(found, right)


def far_stretch(draw: st.DrawFn) -> tuple[int, int]:
    """First element and number of a stretch, often about where a number grows a bit longer."""
    near = draw(st.sampled_from((2**31, 2**32, 2**33, MOST - 1024)) | st.integers(0, MOST - 1024))
    first = max(0, near // 128 + draw(st.integers(-4, 0))) * 128
    return first, draw(st.integers(1, 6)) * 128


@st.composite
def far_spans(draw: st.DrawFn) -> tuple[Span, int, int]:
    """A span of one or two parameters that no memory holds, and a stretch that may touch both."""
    first, count = far_stretch(draw)
    cut = first + 128 * draw(st.integers(0, 6))
    numbers, scale = draw(st.lists(uint32, min_size=2, max_size=2)), draw(st.floats(0.1, 2.0))
    one = Segment("one", numbers[0], (max(cut, 128),), 0)
    other = Segment("other", numbers[1], (MOST,), one.padded, scale)
    dtype = draw(st.sampled_from(DTYPES))
    return Span(dtype, (one, other), 0, 0), first, count


def part_of(span: Span, first: int, count: int, direction: str, draw: Draw) -> np.ndarray:
    """``coefficient * scale * z`` of a stretch."""
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate(
            [
                reference.DIRECTIONS[direction](
                    *(draw.seed, draw.step, draw.probe, segment.parameter_index),
                    *(start, stop - start, draw.coefficient * segment.scale),
                )
                for segment, start, stop in span.overlapping(first, first + count)
            ]
        )


@settings(max_examples=60)
@given(
    where=far_spans(), direction=st.sampled_from(DIRECTIONS), draw=draws, seed=uint32,
    around=circumstances,
)  # fmt: skip
def test_any_stretch(where, direction: str, draw: Draw, seed: int, around: Circumstances):
    span, first, count = where
    near = placed(any_weights(count, seed).to(span.dtype), around.offset)
    with np.errstate(all="ignore"):
        value = near.float().numpy() + part_of(span, first, count, direction, draw)
        right = exact(expected_copy(span, reference.canonical(value), draw))
    wire = cast("torch.Tensor", Far(near, first, span.elements))
    out = placed(torch.zeros_like(near), around.offset)
    with under(around):
        ops.perturb(span, wire, out, direction, draw, first, count)
    np.testing.assert_array_equal(exact(out), right)


@settings(max_examples=60)
@given(data=st.data(), direction=st.sampled_from(DIRECTIONS), draw=draws, around=circumstances)
def test_any_rows(data: st.DataObject, direction: str, draw: Draw, around: Circumstances):
    width, dtype = data.draw(st.integers(1, 1300)), data.draw(st.sampled_from(DTYPES))
    base = data.draw(st.sampled_from((0, 2**31, 2**32, 2**33)) | st.integers(0, MOST // 2)) // width
    chosen = data.draw(st.lists(st.integers(0, 5), max_size=6))  # in any order, again and again
    segment = Segment("table", data.draw(uint32), (base + 6, width), 0, 0.37)
    span = Span(dtype, (segment,), 0, 0)
    near = placed(any_weights(6 * width, data.draw(uint32)).to(dtype), around.offset)
    rows = torch.tensor(chosen, dtype=torch.int64)
    right = expected_rows(span, segment, near, rows, direction, draw, base)
    wire = cast("torch.Tensor", Far(near, base * width, span.elements))
    with under(around):
        found = ops.perturb_rows(span, segment, wire, rows + base, direction, draw)
    np.testing.assert_array_equal(exact(found), right)


def signs_of(counter: list[int], seed: int) -> list[int]:
    """The sign bits of a block of 128 elements, as an implementation has them."""
    block, parameter, step, last = counter
    first = block * 128
    span = Span(torch.float32, (Segment("w", parameter, (first + 128,), 0),), 0, 0)
    wire = cast("torch.Tensor", Far(torch.full((128,), -0.0), first, span.elements))
    out = torch.zeros(128)
    ops.perturb(span, wire, out, "rademacher", Draw(seed, step, last, 1.0), first, 128)
    return out.lt(0).int().tolist()


def lanes_of(counter: list[int], seed: int) -> list[float]:
    """The gaussian values of a block of eight elements."""
    block, parameter, step, last = counter
    first = block // 16 * 128
    span = Span(torch.float32, (Segment("w", parameter, (first + 128,), 0),), 0, 0)
    wire = cast("torch.Tensor", Far(torch.full((128,), -0.0), first, span.elements))
    out = torch.zeros(128)
    ops.perturb(span, wire, out, "gaussian", Draw(seed, step, last, 1.0), first, 128)
    return out[block % 16 * 8 :][:8].tolist()


def check_words(counter: list[int], seed: int, words: list[int]) -> None:
    assert signs_of(counter, seed) == [words[e // 32] >> e % 32 & 1 for e in range(128)]
    cells = [words[e // 2] >> 16 * (e % 2) & 0xFFF for e in range(8)]
    assert lanes_of(counter, seed) == reference.gaussian_cells().astype(np.float32)[cells].tolist()


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_the_published_words(name: str):
    counter, key, words = map(hexadecimal, KNOWN_ANSWERS[name])
    check_words(counter, key[0] | key[1] << 32, words)


@given(counter=st.lists(uint32, min_size=4, max_size=4), seed=seeds)
@example(counter=[0, 0, 0, 0], seed=2**64 - 1)
def test_the_words_of_any_counter(counter: list[int], seed: int):
    words = reference.philox4x32(np.array([counter], np.uint32), seed)[0]
    check_words(counter, seed, words.tolist())
