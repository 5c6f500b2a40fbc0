"""The reference's bits, whatever the job and whatever is around it, from every implementation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ops.far import check_rows, check_stretch, check_words, far_rows, far_spans, uint32
from ops.jobs import (
    Circumstances,
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
    MASTERS,
    draws,
    seeds,
    span_of,
    threads,
)
from ops.test_philox import KNOWN_ANSWERS, hexadecimal
from zo_offload import ops
from zo_offload.ops import Draw, Span, kernels, native, reference

directions = st.sampled_from(DIRECTIONS)


@pytest.mark.sampled(8)
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
            if own:
                native.library.cache_clear()
                native.library()  # with torch's threads again
    assert_same(found, right)


@settings(max_examples=60)
@given(where=far_spans(), weights=uint32, direction=directions, draw=draws, around=circumstances)
def test_any_stretch(where, weights: int, direction: str, draw: Draw, around: Circumstances):
    check_stretch(where, weights, direction, draw, around)


@settings(max_examples=60)
@given(where=far_rows(), weights=uint32, direction=directions, draw=draws, around=circumstances)
def test_any_rows(where, weights: int, direction: str, draw: Draw, around: Circumstances):
    check_rows(where, weights, direction, draw, around)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_the_published_words(name: str):
    counter, key, words = map(hexadecimal, KNOWN_ANSWERS[name])
    check_words(counter, key[0] | key[1] << 32, words)


@given(counter=st.lists(uint32, min_size=4, max_size=4), seed=seeds)
@example(counter=[0, 0, 0, 0], seed=2**64 - 1)
def test_the_words_of_any_counter(counter: list[int], seed: int):
    words = reference.philox4x32(np.array([counter], np.uint32), seed)[0]
    check_words(counter, seed, words.tolist())
