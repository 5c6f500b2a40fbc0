"""Projected gradients against what calculus says they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.spans import DIRECTIONS, span_of

from zo_offload import ops
from zo_offload.estimator import spsa
from zo_offload.ops import Draw

losses = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8)


@given(plus=losses, eps=st.sampled_from([1e-4, 1e-3, 0.25]))
def test_each_probe_by_itself(plus: list[float], eps: float):
    minus = [value * 0.5 - 1.0 for value in plus]
    together = spsa(plus, minus, eps)
    assert together == [spsa([a], [b], eps)[0] for a, b in zip(plus, minus, strict=True)]


@given(plus=losses, eps=st.sampled_from([1e-4, 1e-3, 0.25]))
def test_opposite_directions_have_opposite_gradients(plus: list[float], eps: float):
    minus = plus[::-1]
    assert spsa(plus, minus, eps) == [-g for g in spsa(minus, plus, eps)]


def test_a_loss_that_rises_along_z_has_a_positive_gradient():
    assert spsa([1.5], [1.0], eps=0.25) == [1.0]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="argument"):
        spsa([1.0, 2.0], [1.0], eps=0.1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_exact_on_a_quadratic(direction: str):
    """Odd terms of the Taylor series remain, and a quadratic has only one."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    matrix, point = factor @ factor.T, torch.randn(64, generator=generator, dtype=torch.float64)
    z = ops.noise(span_of([(64,)]), direction, Draw(0, 0, 0, 1.0))[:64].double()

    def loss(w: torch.Tensor) -> float:
        return float(0.5 * w @ matrix @ w)

    for eps in (1e-3, 1.0):
        (found,) = spsa([loss(point + eps * z)], [loss(point - eps * z)], eps)
        assert found == pytest.approx(float((matrix @ point) @ z), rel=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_bias_falls_with_the_square_of_eps(direction: str):
    point = torch.linspace(-1, 1, 64, dtype=torch.float64)
    z = ops.noise(span_of([(64,)]), direction, Draw(0, 0, 0, 1.0))[:64].double()

    def loss(w: torch.Tensor) -> float:
        return float(w.exp().sum())

    def bias(eps: float) -> float:
        (found,) = spsa([loss(point + eps * z)], [loss(point - eps * z)], eps)
        return found - float(point.exp() @ z)

    assert bias(2e-2) / bias(1e-2) == pytest.approx(4.0, rel=1e-2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_steps_average_to_the_gradient(direction: str):
    """E[<g, z> z] = g: the mean over draws points along the gradient, with its length."""
    num, num_draws = 32, 4000
    gradient = torch.linspace(-1, 1, num, dtype=torch.float64)
    total = torch.zeros(num, dtype=torch.float64)
    span = span_of([(num,)])
    for step in range(num_draws):
        z = ops.noise(span, direction, Draw(0, step, 0, 1.0))[:num].double()
        total += (gradient @ z) * z
    error = (total / num_draws - gradient).abs().max()
    # An entry's variance is at most |g|^2 + 2 g_i^2 < 14.
    assert float(error) < 5 * (14 / num_draws) ** 0.5
