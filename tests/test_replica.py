"""Means of lane losses: one order of addition, weights honoured, a bad loss named."""

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.errors import DivergedError
from zo_offload.replica import LaneLoss, Replica

totals = st.lists(st.tuples(st.floats(-1e8, 1e8), st.floats(0.25, 64.0)), min_size=1, max_size=12)


def lanes_of(values: list[tuple[float, float]]) -> list[LaneLoss]:
    """Two probes, two signs, one lane a micro-batch; every lane differs."""
    return [
        LaneLoss(probe, sign, i, total + probe + 0.5 * sign, weight)
        for probe in (0, 1)
        for sign in (+1, -1)
        for i, (total, weight) in enumerate(values)
    ]


@given(values=totals, seed=st.integers(0, 1000))
def test_the_order_of_arrival_changes_no_bit(values: list[tuple[float, float]], seed: int):
    lanes = lanes_of(values)
    shuffled = random.Random(seed).sample(lanes, len(lanes))
    assert Replica().mean_losses(shuffled, 0) == Replica().mean_losses(lanes, 0)


@given(values=totals)
def test_means_are_weighted_sums_in_micro_batch_order(values: list[tuple[float, float]]):
    means = Replica().mean_losses(lanes_of(values), 0)
    assert set(means) == {(0, 1), (0, -1), (1, 1), (1, -1)}
    for (probe, sign), mean in means.items():
        numerator = denominator = 0.0
        for total, weight in values:
            numerator += total + probe + 0.5 * sign
            denominator += weight
        assert mean == numerator / denominator


def test_a_sum_counts_by_its_weight():
    lanes = [LaneLoss(0, +1, 0, 6.0, 3.0), LaneLoss(0, +1, 1, 2.0, 1.0)]
    assert Replica().mean_losses(lanes, 0) == {(0, 1): 2.0}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_named(value: float):
    lanes = lanes_of([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)])
    lanes[-1] = dataclasses.replace(lanes[-1], total=value)
    with pytest.raises(DivergedError) as caught:
        Replica().mean_losses(lanes, step=41)
    message = str(caught.value)
    assert message.startswith(f"step 41: the loss is {value} (probe 1, -eps, micro-batch 2); ")
    assert "\n" not in message


def test_alone_nothing_is_sent():
    replica = Replica()
    replica.mean_losses(lanes_of([(1.0, 1.0)]), 0)
    assert (replica.rank, replica.world_size, replica.bytes_sent) == (0, 1, 0)
