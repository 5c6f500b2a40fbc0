"""Projected gradients against what calculus says they are."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.spans import DIRECTIONS, span_of

from zo_offload import ops
from zo_offload.estimator import (
    FITNESS,
    SIGNS,
    one_sided,
    projected_grads,
    ranks,
    spsa,
    standardized,
)
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


# -- what the estimates are worth: against autograd, and against their theory --

EPS, NUM_PROBES, NUM_STEPS = 1e-3, 4, 3000


class Curved:
    """A loss of third order in 24 weights, its gradient by autograd."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.factor = torch.randn(24, 24, generator=generator, dtype=torch.float64) / 5
        self.point = torch.randn(24, generator=generator, dtype=torch.float64).requires_grad_()
        self(self.point).backward()
        assert self.point.grad is not None
        self.gradient = self.point.grad

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """Of weights ``[..., 24]``."""
        inner = w @ self.factor
        return (inner**2).sum(-1) / 2 + inner.sin().sum(-1)

    @torch.no_grad()
    def estimates(self, direction: str, estimator: str) -> torch.Tensor:
        """Of the gradient, a row a step: ``sum_k g_k z_k / K``."""
        count = NUM_STEPS * NUM_PROBES * 24
        z = ops.noise(span_of([(count,)]), direction, Draw(0, 0, 0, 1.0))[:count]
        zs = z.double().view(-1, 24)
        lanes = torch.stack([self(self.point + s * EPS * zs) for s in SIGNS[estimator]], dim=-1)
        rows = lanes.view(NUM_STEPS, -1).tolist()  # a step's losses in (probe, sign) order
        found = [projected_grads(row, EPS, estimator) for row in rows]
        grads = torch.tensor(found, dtype=torch.float64)
        return (grads[..., None] * zs.view(NUM_STEPS, NUM_PROBES, 24)).mean(dim=1)


@pytest.fixture(scope="module", params=list(SIGNS))
def estimator(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=DIRECTIONS)
def estimated(request: pytest.FixtureRequest, estimator: str) -> tuple[Curved, torch.Tensor, str]:
    loss = Curved()
    return loss, loss.estimates(request.param, estimator), request.param


def test_the_mean_of_estimates_is_autograds_gradient(estimated: tuple):
    loss, estimates, _ = estimated
    error = estimates.mean(dim=0) - loss.gradient
    deviation = estimates.std(dim=0) / NUM_STEPS**0.5
    assert float((error / deviation).abs().max()) < 4.5  # of 24 entries, each one a normal's
    assert float(error.norm() / loss.gradient.norm()) < 0.1


def test_the_variance_of_estimates_is_theirs(estimated: tuple, estimator: str):
    """``tr Cov <g, z> z = |g|^2 (n + E z^4 - 2)``, over K, times K / (K - 1) for one-sided ones.

    One-sided losses carry, besides, what of ``eps z^T H z / 2`` differs between directions.
    """
    loss, estimates, direction = estimated
    fourth = 1.0 if direction == "rademacher" else 3.0
    expected = float(loss.gradient.square().sum()) * (24 + fourth - 2) / NUM_PROBES
    if estimator == "one_sided":
        expected *= NUM_PROBES / (NUM_PROBES - 1)
    found = float(estimates.var(dim=0).sum())
    assert found == pytest.approx(expected, rel=0.12)


def test_one_sided_losses_need_no_forward_at_the_weights():
    """What all losses share, of any size, falls out."""
    losses = [0.25, 1.5, -0.75, 4.0]
    assert one_sided([x + 64.0 for x in losses], 0.5) == one_sided(losses, 0.5)


@given(losses=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), eps=st.floats(1e-3, 1.0))
def test_one_sided_estimates_compare_with_the_others(losses: list[float], eps: float):
    for k, found in enumerate(one_sided(losses, eps)):
        others = [loss for j, loss in enumerate(losses) if j != k]
        expected = (losses[k] - sum(others) / len(others)) / eps
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 / eps)


@given(
    losses=st.lists(st.integers(-100, 100), min_size=2, max_size=12, unique=True),
    scale=st.sampled_from([1e-3, 7.0, 1e4]),
)
def test_ranks_forget_everything_but_the_order(losses: list[int], scale: float):
    found = ranks([float(x) for x in losses])
    assert found == ranks([scale * x**3 for x in losses])
    assert sorted(found) == [i / (len(losses) - 1) - 0.5 for i in range(len(losses))]
    assert sorted(range(len(losses)), key=found.__getitem__) == sorted(
        range(len(losses)), key=losses.__getitem__
    )


@given(losses=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), scale=st.floats(0.1, 10))
def test_standardized_losses_have_no_unit(losses: list[float], scale: float):
    found, scaled = standardized(losses), standardized([scale * x + 3.0 for x in losses])
    if max(losses) - min(losses) > 1e-3:
        assert found == pytest.approx(scaled, abs=1e-6)
        assert sum(x * x for x in found) == pytest.approx(len(losses) - 1)


@pytest.mark.parametrize("shape", [ranks, standardized])
def test_equal_losses_say_nothing(shape: Callable):
    assert shape([2.0, 2.0, 2.0]) == [0.0, 0.0, 0.0]
    assert shape([2.0]) == [0.0]


@pytest.mark.parametrize("fitness", list(FITNESS))
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_number_takes_its_probe_out(bad: float, fitness: str):
    losses = [3.0, 1.0, bad, 2.0, 0.5, 0.25]
    whole = projected_grads([3.0, 1.0, 0.5, 0.25], 0.5, "spsa", fitness)
    assert projected_grads(losses, 0.5, "spsa", fitness) == [whole[0], 0.0, whole[1]]
    sides = projected_grads([3.0, bad, 1.0], 0.5, "one_sided", fitness)
    assert sides == [*projected_grads([3.0, 1.0], 0.5, "one_sided", fitness)[:1], 0.0, -sides[0]]
    assert projected_grads([3.0, bad], 0.5, "one_sided", fitness) == [0.0, 0.0]
