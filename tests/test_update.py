"""From projected gradients to coefficients, and weight decay that is gathered until it counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.ops import Draw, StepUpdate
from zo_offload.update import DECAY_GRAIN, gather_decay, joined, sgd

finite = st.floats(-1e6, 1e6)


@given(grads=st.lists(finite, min_size=1, max_size=16), lr=st.floats(0, 1))
def test_sgd_averages_over_probes(grads: list[float], lr: float):
    assert sgd(grads, lr) == [lr * g / len(grads) for g in grads]


def test_sgd_descends():
    """The loss rises along z, so the coefficient that is subtracted is positive."""
    assert sgd([2.0], lr=0.5) == [1.0]


def test_sgd_of_one_probe_is_mezo():
    assert sgd([3.0], lr=1e-6) == [3.0 * 1e-6]


@given(
    rates=st.lists(st.tuples(st.floats(0, 1e-2), st.floats(0, 0.5)), max_size=200),
)
def test_no_decay_is_lost_or_applied_twice(rates: list[tuple[float, float]]):
    applied, owed, exact = 1.0, 1.0, 1.0
    for lr, weight_decay in rates:
        factor, owed = gather_decay(owed, lr, weight_decay)
        applied *= factor
        exact *= 1.0 - lr * weight_decay
        assert math.isclose(applied * owed, exact, rel_tol=1e-12)
        assert 1.0 - owed < DECAY_GRAIN


@given(lr=st.floats(0, 1e-2), weight_decay=st.floats(0, 0.5))
def test_a_factor_is_either_nothing_or_large_enough(lr: float, weight_decay: float):
    factor, owed = gather_decay(1.0, lr, weight_decay)
    assert factor == 1.0 or 1.0 - factor >= DECAY_GRAIN
    assert factor == 1.0 or owed == 1.0


def test_the_grain_is_wide_against_fp32():
    assert DECAY_GRAIN >= 100 * 2.0**-24


@pytest.mark.parametrize(("lr", "weight_decay"), [(0.0, 0.1), (1e-6, 0.0)])
def test_no_rate_no_decay(lr: float, weight_decay: float):
    assert gather_decay(1.0, lr, weight_decay) == (1.0, 1.0)


def test_a_tiny_rate_is_gathered():
    factors, owed = [], 1.0
    for _ in range(1000):
        factor, owed = gather_decay(owed, lr=1e-6, weight_decay=0.1)
        factors.append(factor)
    # 2^-16 is reached every 153 steps of 1e-7.
    assert [i for i, factor in enumerate(factors) if factor != 1.0] == [
        152,
        305,
        458,
        611,
        764,
        917,
    ]


def windows(*decays: float) -> list[StepUpdate]:
    """Steps from 4 on, each along its own direction and the one before."""
    return [
        StepUpdate(decay, tuple(Draw(9, s, 0, 1.0 + t - s) for s in (t - 1, t)), 9, t)
        for t, decay in enumerate(decays, start=4)
    ]


def shown(steps: list[StepUpdate]) -> list[tuple[float, int, list[tuple[int, float]]]]:
    return [(e.decay, e.step, [(d.step, d.coefficient) for d in e.draws]) for e in steps]


def test_steps_are_joined_from_one_point_of_the_grid_to_the_next():
    assert shown(joined(windows(1.0, 1.0, 1.0), grain=3)) == [
        (1.0, 5, [(3, 2.0), (4, 3.0), (5, 1.0)]),
        (1.0, 6, [(5, 2.0), (6, 1.0)]),
    ]
    assert joined(windows(1.0, 1.0), grain=1) == windows(1.0, 1.0)


def test_where_weights_decay_a_sum_begins_anew():
    """Directions of the steps before decay with the weights, those after do not."""
    assert shown(joined(windows(0.5, 1.0, 0.25, 1.0), grain=4)) == [
        (0.5, 5, [(3, 2.0), (4, 3.0), (5, 1.0)]),
        (0.25, 7, [(5, 2.0), (6, 3.0), (7, 1.0)]),
    ]
