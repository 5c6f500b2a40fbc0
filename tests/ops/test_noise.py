"""Noise of the torch kernels: the reference's bits, however it is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.spans import DIRECTIONS, bits, chunks_of, draws, expected_noise, span_of, spans
from zo_offload import ops
from zo_offload.ops import Draw, Span, reference

directions = st.sampled_from(DIRECTIONS)
chunks = st.sampled_from((128, 256, 384, 1024, 1 << 20))


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """Noise by itself is torch's alone: once is enough."""


@given(span=spans(), direction=directions, draw=draws, chunk=chunks)
def test_noise_equals_the_reference(span: Span, direction: str, draw: Draw, chunk: int):
    with chunks_of(chunk):
        found = ops.noise(span, direction, draw)
    np.testing.assert_array_equal(bits(found), bits(expected_noise(span, direction, draw)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(start=st.integers(0, 5000), count=st.integers(1, 700))
def test_the_reference_itself_can_be_cut_anywhere(direction: str, start: int, count: int):
    make = reference.DIRECTIONS[direction]
    whole = make(11, 2, 0, 5, 0, 6000)
    np.testing.assert_array_equal(make(11, 2, 0, 5, start, count), whole[start : start + count])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_neighbours_in_a_span_do_not_change_a_parameter(direction: str):
    draw = Draw(1, 2, 3, 0.5)
    alone = ops.noise(span_of([(300,)], [9]), direction, draw)
    between = ops.noise(span_of([(50, 3), (300,), (7,)], [8, 9, 10]), direction, draw)
    assert torch.equal(between[256 : 256 + alone.numel()], alone)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_number_of_threads_does_not_matter(direction: str):
    span, draw = span_of([(1000, 300)]), Draw(1, 2, 3, 0.5)
    two = ops.noise(span, direction, draw)
    try:
        torch.set_num_threads(1)
        one = ops.noise(span, direction, draw)
    finally:
        torch.set_num_threads(2)
    assert torch.equal(one, two)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_global_generator_is_touched(direction: str):
    before = torch.get_rng_state()
    ops.noise(span_of([(300,)]), direction, Draw(1, 2, 3, 0.5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opposite_coefficients_give_opposite_noise(direction: str):
    span = span_of([(40, 40)], scales=[0.37])
    plus = ops.noise(span, direction, Draw(1, 2, 3, 1e-3))
    minus = ops.noise(span, direction, Draw(1, 2, 3, -1e-3))
    assert torch.equal(plus, -minus)
