"""The solve against NumPy's, what is left out, and what it is good for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload import estimator
from zo_offload.natural import MOST_PROBES, mean_products, pairs, preconditioned

SIDES = {"spsa": 2, "one_sided": 1}


def lanes_of(name: str, probes: int, examples: int, seed: int) -> np.ndarray:
    """Losses [lanes, examples] in whose differences one direction dominates."""
    rng = np.random.default_rng(seed)
    shape = SIDES[name] * probes, examples
    common = rng.normal(size=(shape[0], 1)) * rng.normal(1.0, 0.1, size=(1, examples))
    return 0.7 + 1e-3 * (5.0 * common + rng.normal(size=shape))


def slopes(lanes: np.ndarray, name: str, eps: float) -> np.ndarray:
    """g [examples, probes], as written in books."""
    if name == "spsa":
        return (lanes[0::2] - lanes[1::2]).T / (2 * eps)
    count = len(lanes)
    return count / (count - 1) * (lanes - lanes.mean(0)).T / eps


def expected(lanes: np.ndarray, name: str, damping: float, eps: float = 1e-2) -> np.ndarray:
    g = slopes(lanes, name, eps)
    fisher = g.T @ g / len(g)
    phi = damping * fisher.diagonal().mean()
    return np.linalg.solve(fisher / phi + np.eye(len(fisher)), g.mean(0))


def found(lanes: np.ndarray, name: str, damping: float, eps: float = 1e-2) -> list[float]:
    means = lanes.mean(1).tolist()
    grads = estimator.projected_grads(means, eps, name)
    usable = estimator.usable(means, name)
    return preconditioned(grads, mean_products(lanes.tolist(), name), damping, usable, name)


@pytest.mark.parametrize("name", list(SIDES))
@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize(("probes", "examples"), [(2, 1), (4, 16), (MOST_PROBES, 7)])
def test_it_solves_what_numpy_does(name: str, probes: int, examples: int, damping: float):
    lanes = lanes_of(name, probes, examples, seed=probes)
    wanted = expected(lanes, name, damping)
    size = np.abs(slopes(lanes, name, 1e-2).mean(0)).max()
    assert found(lanes, name, damping) == pytest.approx(wanted, rel=1e-6, abs=1e-8 * size)


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 5), st.sampled_from(list(SIDES)))
def test_much_damping_leaves_the_estimates_and_less_only_shortens(
    seed: int, probes: int, examples: int, name: str
):
    lanes = lanes_of(name, probes, examples, seed)
    plain = estimator.projected_grads(lanes.mean(1).tolist(), 1e-2, name)
    assert found(lanes, name, 1e300) == plain
    lengths = [math.hypot(*found(lanes, name, damping)) for damping in (1e-3, 0.1, 10.0)]
    assert lengths == sorted(lengths)
    assert lengths[-1] <= math.hypot(*plain)


@pytest.mark.parametrize("name", list(SIDES))
def test_a_factor_on_the_loss_or_eps_changes_the_length_alone(name: str):
    lanes = lanes_of(name, 4, 16, seed=1)
    base = found(lanes, name, 0.1)
    assert found(4.0 * lanes, name, 0.1) == [4.0 * g for g in base]
    assert found(lanes, name, 0.1, eps=2e-2) == [0.5 * g for g in base]


def test_without_curvature_the_estimates_are_as_they_were():
    assert preconditioned([1.0, -2.0], [0.0] * 3, 0.1, range(2)) == [1.0, -2.0]
    flat = np.full((4, 3), 0.5)
    assert found(flat, "one_sided", 0.1) == [0.0] * 4


@pytest.mark.parametrize("name", list(SIDES))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_probe_whose_loss_is_no_number_leaves_the_others_as_without_it(name: str, bad: float):
    """Of one example alone, in the last lane of probe 1."""
    sides, lanes = SIDES[name], lanes_of(name, 4, 6, seed=2)
    rest = np.delete(lanes, range(sides, 2 * sides), axis=0)
    lanes[2 * sides - 1, 3] = bad
    without = found(rest, name, 0.1)
    assert found(lanes, name, 0.1) == pytest.approx([without[0], 0.0, *without[1:]], rel=1e-9)


def test_what_overflows_is_said_and_kept_from_the_others():
    grads, products = [1.0, 2.0, 3.0], [4.0, math.inf, 0.0, math.inf, math.inf, 1.0]
    first, second, third = preconditioned(grads, products, 0.5, range(3))
    assert math.isnan(second)
    assert [first, third] == preconditioned([1.0, 3.0], [4.0, 0.0, 1.0], 0.5, range(2))
    assert preconditioned(grads, products, 0.5, [0, 2]) == [first, 0.0, third]


def test_products_stand_in_the_order_of_pairs():
    lanes = lanes_of("one_sided", 3, 5, seed=3)
    centred = lanes - lanes.mean(0)
    wanted = [(centred[k] * centred[j]).mean() for k, j in pairs(3)]
    assert mean_products(lanes.tolist(), "one_sided") == pytest.approx(wanted, rel=1e-9)
    assert all(map(math.isnan, mean_products([[]] * 4)))


def logistic(seed: int, lr: float, damping: float | None, steps: int = 100) -> float:
    """Loss after descent on a logistic regression whose first input is 16 for every example."""
    rng = np.random.default_rng(seed)
    inputs, probes, eps = rng.normal(size=(512, 24)), 4, 1e-3
    inputs[:, 0] = 16.0
    teacher = rng.normal(size=24)
    teacher[0] = 0.0
    signs, weights = np.sign(inputs @ teacher), np.zeros(24)

    def losses(at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.logaddexp(0.0, -signs[rows] * (inputs[rows] @ at))

    for step in range(steps):
        rows = rng.integers(512, size=16)
        z = rng.choice([-1.0, 1.0], size=(probes, 24))
        lanes = [losses(weights + sign * eps * each, rows) for each in z for sign in (1, -1)]
        grads = estimator.projected_grads([float(lane.mean()) for lane in lanes], eps)
        if damping is not None:
            products = mean_products([lane.tolist() for lane in lanes])
            grads = preconditioned(grads, products, damping, range(probes))
        weights -= lr * (1 - step / steps) * (np.array(grads) @ z) / probes
    return float(losses(weights, np.arange(512)).mean())


def test_where_all_examples_share_a_steep_direction_it_learns_more():
    def best(damping: float | None, lrs: tuple[float, ...]) -> float:
        return min(sum(logistic(seed, lr, damping) for seed in range(3)) for lr in lrs)

    plain = best(None, (3e-3, 1e-2, 3e-2, 1e-1))
    assert best(0.1, (0.3, 1.0, 3.0)) < 0.6 * plain
