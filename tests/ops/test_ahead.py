"""Steps that the masters do not carry yet: taken in fp32 by what the forward sees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.spans import (
    DIRECTIONS,
    MASTERS,
    bits,
    chunks_of,
    draws,
    expected_copy,
    expected_noise,
    random_master,
    spans,
)
from ops.test_update import expected as expected_master
from ops.test_update import steps_lists, stored
from zo_offload import ops
from zo_offload.ops import Draw, Point, Span, StepUpdate, reference

directions = st.sampled_from(DIRECTIONS)
chunks = st.sampled_from((128, 640, 1 << 20))


def expected(
    span: Span, wire: torch.Tensor, direction: str, ahead: list[StepUpdate], draw: Draw
) -> np.ndarray:
    value = wire.float().numpy()
    with np.errstate(all="ignore"):
        for step in ahead:
            terms = [expected_noise(span, direction, d) for d in step.draws if d.coefficient != 0.0]
            value = reference.update_master(value, terms, step.decay)
        value = value + expected_noise(span, direction, draw)
        return expected_copy(span, value, draw)


@pytest.mark.parametrize("master_kind", MASTERS)
@settings(max_examples=30)
@given(
    data=st.data(),
    direction=directions,
    steps=steps_lists,
    ahead=steps_lists,
    draw=draws,
    chunk=chunks,
    dither=st.booleans(),
)
def test_equals_the_reference(
    master_kind: str, data, direction: str, steps, ahead, draw: Draw, chunk: int, dither: bool
):
    dtype, kept = MASTERS[master_kind]
    span = data.draw(spans(dtype, dither and dtype == torch.bfloat16, kept))
    master = random_master(span.elements)
    wire, rest = stored(span, master)
    outs = torch.zeros_like(wire), torch.zeros_like(wire)
    opposite = Draw(draw.seed, draw.step, draw.probe, -draw.coefficient)
    pairs = list(zip(outs, (draw, opposite), strict=True))
    with chunks_of(chunk):
        points = [Point(out, each) for out, each in pairs]
        ops.update(span, wire, rest, direction, steps, points, ahead)
        alone = torch.zeros_like(wire)
        ops.perturb(span, wire, alone, direction, draw, ahead=ahead)
    after = ops.load_master(span, wire, rest)  # the steps ahead have left no trace
    np.testing.assert_array_equal(
        bits(after), bits(expected_master(span, master, direction, steps))
    )
    for out, each in pairs:
        right = expected(span, wire, direction, ahead, each)
        np.testing.assert_array_equal(bits(out), bits(right))
    np.testing.assert_array_equal(bits(alone), bits(outs[0]))
