"""The four numbers of a quadratic with known slopes."""

import math

import numpy as np
import pytest

from zo_offload.find_lr.slopes import Mean, Slopes, by_curvature, by_loss, slopes_of

EPS = 1e-2


def test_slope_noise_and_curvature_are_told_apart():
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(4000):
        slope, curvature = 3.0 * generator.standard_normal(), 50.0

        def losses(own: float, slope: float = slope, bend: float = curvature):
            return tuple(1.0 + (slope + own) * e + bend * e * e / 2 for e in (0.0, EPS, -EPS))

        rows.append((losses(generator.standard_normal()), losses(generator.standard_normal())))
    found = slopes_of(rows, EPS)
    assert found.agreed.value == pytest.approx(9.0, rel=0.1)
    assert found.squared.value == pytest.approx(10.0, rel=0.1)
    assert found.curvature.value == pytest.approx(50.0)
    assert abs(found.agreed.value - 9.0) < 4 * found.agreed.error
    rate = found.agreed.value / (found.squared.value * found.curvature.value)
    assert by_curvature(found, probes=1) == rate
    assert by_curvature(found, probes=4) == 4 * rate


def test_what_lies_within_its_error_makes_no_guess():
    sure, unsure = Mean(4.0, 1.0), Mean(4.0, 3.0)
    assert by_curvature(Slopes(sure, sure, unsure, 1.0), 1) is None
    assert by_curvature(Slopes(unsure, sure, sure, 1.0), 1) is None
    assert by_loss(Slopes(Mean(1.0, 2.0), Mean(2.0, 0.1), unsure, 1.0)) == pytest.approx(0.015)


def test_a_flat_loss_makes_no_guess():
    flat = slopes_of([((1.0, 1.0, 1.0), (2.0, 2.0, 2.0))] * 3, EPS)
    assert by_loss(flat) is None
    assert by_curvature(flat, 1) is None
    assert by_loss(Slopes(Mean(1, 0), Mean(1, 0), Mean(1, 0), math.nan)) is None
