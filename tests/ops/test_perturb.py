"""Perturbed copies: one rounding, in every forward dtype."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from ops.spans import (
    DIRECTIONS,
    DTYPES,
    bits,
    expected_dither,
    random_master,
    span_of,
)
from zo_offload import ops
from zo_offload.ops import Draw, Span

directions = st.sampled_from(DIRECTIONS)
chunks = st.sampled_from((128, 640, 1 << 20))


def perturbed(span: Span, wire: torch.Tensor, direction: str, draw: Draw) -> torch.Tensor:
    out = torch.full_like(wire, float("nan"))
    ops.perturb(span, wire, out, direction, draw)
    return out


def test_bf16_rounds_ties_away_from_zero():
    span = span_of([(256,)], dtype=torch.bfloat16)
    for sign in (1.0, -1.0):
        wire = torch.full((256,), sign, dtype=torch.bfloat16)
        # Steps are 2^-7 above one and 2^-8 below it: one sum is a tie, the other exact.
        found = perturbed(span, wire, "rademacher", Draw(0, 0, 0, 2.0**-8)).float()
        assert set(found.tolist()) == {sign * (1 + 2.0**-7), sign * (1 - 2.0**-8)}


def test_bf16_keeps_denormals():
    span = span_of([(128,)], dtype=torch.bfloat16)
    found = perturbed(span, torch.zeros(128).bfloat16(), "rademacher", Draw(0, 0, 0, 2.0**-130))
    assert set(found.float().abs().tolist()) == {2.0**-130}


@pytest.mark.parametrize(
    ("value", "coefficient", "result"),
    [
        (65504.0, 16.0, float("inf")),  # a tie, and the even neighbour is out of range
        (65504.0, 15.0, 65504.0),
        (1.0, 2.0**-11, 1.0),  # a tie goes to the even neighbour
        (0.0, 2.0**-25, 0.0),  # half of the least denormal
        (0.0, 1.5 * 2.0**-24, 2.0**-23),
        (0.0, 3 * 2.0**-24, 3 * 2.0**-24),
    ],
)
def test_fp16_rounds_to_nearest_even(value: float, coefficient: float, result: float):
    span = span_of([(128,)], dtype=torch.float16)
    wire = torch.full((128,), value, dtype=torch.float16)
    found = perturbed(span, wire, "rademacher", Draw(0, 0, 0, coefficient)).float()
    upward = ops.noise(span, "rademacher", Draw(0, 0, 0, 1.0)) > 0
    assert set(found[upward].tolist()) == {result}


def test_dither_is_one_for_both_signs():
    span = span_of([(512,)], dtype=torch.bfloat16, dither=True)
    wire = torch.ones(512).bfloat16()
    carry = []
    for coefficient in (2.0**-10, -(2.0**-10)):
        draw = Draw(5, 6, 7, coefficient)
        upward = ops.noise(span, "rademacher", draw) > 0
        # Above one, an eighth of a step: rounded up where the sixteen bits reach 7/8.
        carry.append((upward, perturbed(span, wire, "rademacher", draw) > 1))
    rounds_up = torch.from_numpy(expected_dither(span, Draw(5, 6, 7, 0.0)) >= 0xE000)
    for upward, up in carry:
        assert torch.equal(up[upward], rounds_up[upward])


def test_dither_is_unbiased():
    num, coefficient = 1 << 18, 2.0**-10
    span = span_of([(num,)], dtype=torch.bfloat16, dither=True)
    wire = torch.ones(num).bfloat16()
    found = perturbed(span, wire, "rademacher", Draw(0, 0, 0, coefficient)).double()
    upward = ops.noise(span, "rademacher", Draw(0, 0, 0, 1.0)) > 0
    for sign, step in ((+1, 2**-7), (-1, 2**-8)):
        chosen, target = upward == (sign > 0), 1 + sign * coefficient
        # The variance of rounding a share p of a step up is p (1 - p).
        share = coefficient / step
        error = step * (share * (1 - share) / int(chosen.sum())) ** 0.5
        assert abs(float(found[chosen].mean()) - target) < 5 * error


def test_dither_does_not_repeat_the_noise():
    span = span_of([(1 << 16,)])
    noise = ops.noise(span, "gaussian", Draw(0, 0, 0, 1.0)).double()
    dither = torch.from_numpy(expected_dither(span, Draw(0, 0, 0, 1.0)).astype(np.float64))
    correlation = torch.corrcoef(torch.stack((noise, dither)))[0, 1]
    assert abs(float(correlation)) < 5 / noise.numel() ** 0.5


@pytest.mark.parametrize("dither", [False, True])
def test_infinities_and_nan_are_kept(dither: bool):
    span = span_of([(3,)], dtype=torch.bfloat16, dither=dither)
    wire = torch.zeros(128).bfloat16()
    wire[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    for seed in range(20):
        found = perturbed(span, wire, "rademacher", Draw(seed, 0, 0, 1e-3))[:3]
        assert found.view(torch.int16).tolist() == [0x7F80, 0xFF80 - (1 << 16), 0x7FC0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("width", [1, 5, 8, 100, 128, 129, 256, 300])
def test_rows_equal_those_of_the_whole(dtype: torch.dtype, direction: str, width: int):
    height, draw = 50, Draw(2**64 - 1, 3, 1, -1e-3)
    span = span_of([(77,), (height, width)], [4, 2], [1.0, 0.37], dtype, offsets=[0, 128 * 3])
    segment = span.segments[1]
    wire = random_master(span.elements).to(dtype)
    rows = torch.tensor([0, height - 1, 7, 7, 31])
    whole = perturbed(span, wire, direction, draw)[segment.start :][: segment.numel]
    found = ops.perturb_rows(span, segment, wire, rows, direction, draw)
    assert found.dtype == dtype
    np.testing.assert_array_equal(bits(found), bits(whole.view(height, width)[rows]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_wire_is_only_read(dtype: torch.dtype):
    span = span_of([(300,)], dtype=dtype)
    wire = random_master(span.elements).to(dtype)
    before = wire.clone()
    perturbed(span, wire, "rademacher", Draw(0, 0, 0, 1e-3))
    np.testing.assert_array_equal(bits(wire), bits(before))
