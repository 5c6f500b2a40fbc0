"""Updates of masters: fixed order, one rounding a step, nothing lost to small steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.jobs import flushing
from ops.spans import (
    DIRECTIONS,
    DTYPES,
    KEPT_BITS,
    bits,
    decays,
    draws,
    random_master,
    seeds,
    span_of,
    spans,
)
from zo_offload import ops, update
from zo_offload.ops import Draw, Span, StepUpdate, reference

steps_lists = st.lists(
    st.builds(
        StepUpdate,
        decays,
        st.lists(draws, max_size=3).map(tuple),
        seeds,
        st.integers(0, 2**32 - 1),
    ),
    max_size=3,
)
directions = st.sampled_from(DIRECTIONS)


def stored(span: Span, master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(wire, rest)`` of a master, with what padding there is."""
    wire = torch.zeros(span.elements, dtype=span.dtype)
    rest = span.rest(torch.zeros(span.rest_bytes, dtype=torch.uint8))
    ops.store_master(span, master, wire, rest)
    return wire, rest


def updated(
    span: Span, master: torch.Tensor, direction: str, *calls: list[StepUpdate]
) -> torch.Tensor:
    """The master after the calls; its wire is checked to be its rounding."""
    wire, rest = stored(span, master)
    for steps in calls:
        ops.update(span, wire, rest, direction, steps)
    after = ops.load_master(span, wire, rest)
    fresh_wire, _ = stored(span, after)
    np.testing.assert_array_equal(bits(wire), bits(fresh_wire))
    return after


@pytest.mark.parametrize("kept", ["fp32", "bf16+8", "bf16_sr"])
@settings(max_examples=50)
@given(data=st.data(), direction=directions, steps=steps_lists)
def test_many_steps_at_once_equal_one_by_one(
    kept: str, data: st.DataObject, direction: str, steps: list[StepUpdate]
):
    span = data.draw(spans(torch.bfloat16, master=kept))
    master = random_master(span.elements)
    together = updated(span, master, direction, steps)
    singly = updated(span, master, direction, *[[step] for step in steps])
    np.testing.assert_array_equal(bits(together), bits(singly))


@settings(max_examples=20)
@given(data=st.data(), direction=directions, steps=steps_lists)
def test_a_non_negative_span_is_lifted_after_every_step(
    data: st.DataObject, direction: str, steps: list[StepUpdate]
):
    span = data.draw(spans())
    master = random_master(span.elements).abs()
    expected = master
    for step in steps:
        expected = updated(span, expected, direction, [step])
        expected = torch.where(expected <= 0.0, 0.0, expected)
    found = updated(replace(span, non_negative=True), master, direction, steps)
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("flushes", [False, True])
def test_what_is_just_above_zero_and_what_is_no_number_stay(flushes: bool):
    wire = torch.zeros(128)
    wire[:5] = torch.tensor([-0.0, 1e-45, -1e-45, float("nan"), -1.0])
    with flushing(flushes):
        span = replace(span_of([(128,)]), non_negative=True)
        ops.update(span, wire, torch.zeros(0), "rademacher", [StepUpdate(1.0, ())])
    assert wire.view(torch.int32)[:6].tolist() == [0, 1, 0, 0x7FC00000, 0, 0]


def test_the_sign_is_descent():
    span, draw = span_of([(128,)]), Draw(1, 2, 3, 0.25)
    moved = updated(span, torch.zeros(128), "rademacher", [StepUpdate(1.0, (draw,))])
    assert torch.equal(moved, -ops.noise(span, "rademacher", draw))


def test_terms_are_summed_before_they_meet_the_master():
    # Each is lost against 1.0 by itself; together they are one step of it.
    small = 2.0**-24
    span = span_of([(4096,)])
    two = (Draw(1, 2, 0, small), Draw(1, 2, 1, small))
    one, other = (ops.noise(span, "rademacher", Draw(1, 2, probe, 1.0)) for probe in (0, 1))
    signs = one + other
    after = updated(span, torch.ones(4096), "rademacher", [StepUpdate(1.0, two)])
    assert torch.equal(after[signs == -2], torch.ones(int((signs == -2).sum())) + 2**-23)


def test_terms_are_added_in_the_order_of_probes():
    span = span_of([(4096,)])
    in_order = tuple(Draw(1, 2, probe, c) for probe, c in enumerate((1.0, 2.0**-24, 2.0**-24)))
    zero = torch.zeros(4096)
    forward = updated(span, zero, "rademacher", [StepUpdate(1.0, in_order)])
    backward = updated(span, zero, "rademacher", [StepUpdate(1.0, in_order[::-1])])
    assert not torch.equal(forward, backward)  # so the order below is not a matter of taste
    terms = [ops.noise(span, "rademacher", draw) for draw in in_order]
    assert torch.equal(forward, -((terms[0] + terms[1]) + terms[2]))


def test_decay_is_a_float64_product_rounded_once():
    span, decay = span_of([(4096,)]), 1.0 - 1.7e-5
    master = random_master(4096)
    after = updated(span, master, "rademacher", [StepUpdate(decay, ())])
    exact = (master.double() * decay).float()
    np.testing.assert_array_equal(bits(after), bits(exact))
    assert not torch.equal(exact[9:], master[9:] * torch.tensor(decay))  # an fp32 product differs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coefficient", [0.0, -0.0])
def test_a_zero_coefficient_leaves_every_bit(dtype: torch.dtype, coefficient: float):
    span = span_of([(300,)], dtype=dtype)
    wire, rest = stored(span, random_master(span.elements))
    before = wire.view(torch.uint8).clone(), rest.view(torch.uint8).clone()
    step = StepUpdate(1.0, (Draw(1, 2, 3, coefficient),))
    ops.update(span, wire, rest, "rademacher", [step, StepUpdate(1.0, ())])
    assert torch.equal(wire.view(torch.uint8), before[0])
    assert torch.equal(rest.view(torch.uint8), before[1])


def test_no_steps_touch_nothing():
    span = span_of([(128,)])
    wire = torch.full((128,), float("nan")).view(torch.int32).fill_(0x7FABCDEF).view(torch.float32)
    ops.update(span, wire, torch.zeros(0), "rademacher", [])
    assert set(wire.view(torch.int32).tolist()) == {0x7FABCDEF}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_thousand_steps_of_1e_7_agree_with_float64(direction: str):
    span = span_of([(2048,)], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(2048, generator=generator) * 0.02
    grads = torch.randn(1000, generator=generator, dtype=torch.float64) * 5
    steps = [
        StepUpdate(1.0, (Draw(7, step, 0, update.sgd([float(g)], lr=1e-7)[0]),))
        for step, g in enumerate(grads)
    ]
    exact = master.double()
    for step in steps:
        (draw,) = step.draws
        unit = ops.noise(span, direction, Draw(draw.seed, draw.step, draw.probe, 1.0))
        exact -= draw.coefficient * unit.double()
    after = updated(span, master, direction, steps).double()
    moved = float((exact - master).norm())
    assert moved > 100 * float((after - exact).norm())
    assert float((after - exact).norm() / exact.norm()) < 1e-6


def test_small_decay_adds_up():
    span = span_of([(4096,)], dtype=torch.bfloat16)
    master = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.02
    owed, steps = 1.0, []
    for _ in range(10_000):
        decay, owed = update.gather_decay(owed, lr=1e-6, weight_decay=0.1)
        steps.append(StepUpdate(decay, ()))
    after = updated(span, master, "rademacher", steps)
    shrunk = 1.0 - float(after.double().norm() / master.double().norm())
    assert math.isclose(shrunk, 1.0e-3, rel_tol=0.01)
    exact = math.prod(step.decay for step in steps)
    assert math.isclose(shrunk, 1.0 - exact, rel_tol=1e-3)


@pytest.mark.parametrize("kept", KEPT_BITS)
def test_small_masters_are_unbiased(kept: str):
    """A step far below their grain moves them as far as it should, on average."""
    num, lr = 1 << 16, 2.0**-14 if kept == "bf16_sr" else 2.0**-22
    span = span_of([(num,)], dtype=torch.bfloat16, master=kept)
    steps = [StepUpdate(1.0, (Draw(7, k, 0, lr),), 7, k) for k in range(8)]
    after = updated(span, torch.full((num,), 1.5), "rademacher", steps).double()
    z = sum(ops.noise(span, "rademacher", step.draws[0]).double() for step in steps)
    error = after - (1.5 - z)
    grain = 2.0**-7 if kept == "bf16_sr" else 2.0**-15
    assert abs(float(error.mean())) < 5 * grain * len(steps) ** 0.5 / num**0.5
    assert float(error.std()) < grain * len(steps) ** 0.5


def test_the_nearest_of_a_smaller_master_is_stored():
    values = random_master(4096)
    for kept, bits_kept in KEPT_BITS.items():
        span = span_of([(4096,)], dtype=torch.bfloat16, master=kept)
        found = ops.load_master(span, *stored(span, values))
        expected_values = reference.nearest_master(values.numpy(), bits_kept)
        np.testing.assert_array_equal(bits(found), bits(expected_values))
