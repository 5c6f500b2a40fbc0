"""The table of gaussian values: what it is, and that every machine makes the same one."""

import hashlib
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

from zo_offload.ops.reference import gaussian_cells

SHA256 = "ad8a94f4a3e38fa6fa4707b99da43622cc0f46bfba089bb9db19ef3a009fe9b9"
GRID = 2**20
COUNT = 4096


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """These are about no kernel: once is enough."""


def upper_half_exactly() -> list[Any]:
    """Cell means above zero in units of the grid, unrounded, to thirty digits."""

    def edge(i: int) -> Any:  # one Newton step from sixteen digits
        start = mpf(NormalDist().inv_cdf(i / COUNT))
        return start - (mp.ncdf(start) - mpf(i) / COUNT) / mp.npdf(start)

    with mp.workdps(30):
        inner = [mp.npdf(edge(i)) for i in range(COUNT // 2 + 1, COUNT)]
        density = [mp.npdf(0), *inner, mpf(0)]
        means = [COUNT * (a - b) for a, b in pairwise(density)]
        spread = mp.sqrt(sum(mean * mean for mean in means) / len(means))
        return [mean / spread * GRID for mean in means]


def test_table_is_pinned():
    assert hashlib.sha256(gaussian_cells().astype("<f8").tobytes()).hexdigest() == SHA256


def test_table_is_symmetric_sorted_and_without_zero():
    cells = gaussian_cells()
    assert len(cells) == COUNT
    np.testing.assert_array_equal(cells, -cells[::-1])
    assert (np.diff(cells) > 0).all()


def test_values_lie_on_the_grid():
    scaled = gaussian_cells() * GRID
    np.testing.assert_array_equal(scaled, np.round(scaled))


def test_moments():
    cells = gaussian_cells()
    assert abs((cells**2).mean() - 1) < 1e-7
    assert round((cells**4).mean(), 3) == 2.997


def test_table_cannot_be_changed_by_a_caller():
    assert not gaussian_cells().flags.writeable


def test_no_value_is_near_a_rounding_tie():
    """Double precision errs by 1e-6 of a grid step here: no libm errs by 300 times that."""
    exact = upper_half_exactly()
    cells = gaussian_cells()[COUNT // 2 :] * GRID
    np.testing.assert_array_equal(cells, [int(mp.nint(value)) for value in exact])
    margin = min(abs(value - mp.floor(value) - 0.5) for value in exact)
    assert margin > 3e-4
