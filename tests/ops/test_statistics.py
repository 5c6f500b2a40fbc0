"""Noise looks random: moments, cells, and no trace of one draw in another.

Everything is a pure function of the seeds below, so a test that passes once passes always. Limits
are five standard deviations.
"""

import dataclasses

import numpy as np
import pytest
import torch

from ops.spans import DIRECTIONS, span_of
from zo_offload import ops
from zo_offload.ops import Draw, reference

NUM = 1 << 18
DRAW = Draw(seed=0x0123456789ABCDEF, step=17, probe=0, coefficient=1.0)
KURTOSIS = {"rademacher": 1.0, "gaussian": 2.997}

pytestmark = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """These are about no kernel: once is enough."""


def z(direction: str, draw: Draw = DRAW, parameter: int = 3, num: int = NUM) -> torch.Tensor:
    return ops.noise(span_of([(num,)], [parameter]), direction, draw).double()


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    assert abs(float((a * b).mean())) < 5 / len(a) ** 0.5


def test_moments(direction: str):
    values = z(direction)
    assert abs(float(values.mean())) < 5 / NUM**0.5
    assert abs(float((values**2).mean()) - 1) < 5 * (2 / NUM) ** 0.5
    assert abs(float((values**3).mean())) < 5 * (15 / NUM) ** 0.5
    assert abs(float((values**4).mean()) - KURTOSIS[direction]) < 5 * (96 / NUM) ** 0.5


@pytest.mark.parametrize("distance", [1, 2, 7, 8, 31, 32, 64, 127, 128, 1024])
def test_neighbours_are_uncorrelated(direction: str, distance: int):
    values = z(direction)
    assert_uncorrelated(values[:-distance], values[distance:])


@pytest.mark.parametrize(
    "change",
    [
        {"step": 18},
        {"step": 17 + (1 << 31)},
        {"probe": 1},
        {"probe": 1 << 14},
        {"seed": DRAW.seed + 1},
        {"seed": DRAW.seed ^ 1 << 32},
        {"seed": DRAW.seed ^ 1 << 63},
    ],
    ids=str,
)
def test_draws_are_uncorrelated(direction: str, change: dict[str, int]):
    other = dataclasses.replace(DRAW, **change)
    assert_uncorrelated(z(direction), z(direction, other))


@pytest.mark.parametrize("parameter", [2, 4, 1 << 16])
def test_parameters_are_uncorrelated(direction: str, parameter: int):
    assert_uncorrelated(z(direction), z(direction, parameter=parameter))


def test_low_seeds_steps_and_probes_are_uncorrelated(direction: str):
    """The first draws of a run with seed 0, where counters are nearly all zero bits."""
    near_zero = [
        z(direction, Draw(seed, step, probe, 1.0), parameter, 1 << 14)
        for seed in (0, 1)
        for step in (0, 1)
        for probe in (0, 1)
        for parameter in (0, 1)
    ]
    correlation = torch.corrcoef(torch.stack(near_zero)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / (1 << 14) ** 0.5


def test_every_value_is_equally_frequent(direction: str):
    if direction == "rademacher":  # the 256 patterns of eight neighbours
        negative = (z(direction) < 0).reshape(-1, 8).numpy()
        counts = np.bincount(np.packbits(negative, axis=1).ravel(), minlength=256)
    else:
        cells = np.searchsorted(reference.gaussian_cells().astype(np.float32), z(direction).numpy())
        counts = np.bincount(cells, minlength=4096)
    mean = counts.mean()
    chi_square, freedom = float(((counts - mean) ** 2 / mean).sum()), len(counts) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
