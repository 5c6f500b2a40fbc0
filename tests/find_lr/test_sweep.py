"""Which rates are tried, and what is made of what they come to."""

import math
from collections import Counter

import pytest

from zo_offload.find_lr.sweep import MOST, ROUNDS, Rate, excess, for_run, judge, place_of, search


def bowl(best: float):
    """Least at a rate; diverging a hundred times above it."""

    def attempt(lr: float, number: int) -> float:
        away = math.log10(lr / best)
        return math.inf if away > 2 else away**2 + 0.001 * number

    return attempt


@pytest.mark.parametrize("guess", [1e-6, 1e-4, 1e-2, 1.0, 100.0])
def test_the_best_rate_is_found_from_a_guess_far_off(guess: float):
    found = search(bowl(1e-3), guess, before=30.0)
    assert found.best is not None
    assert found.best.lr == 1e-3
    assert found.tied == [found.best]
    assert len(found.rates) <= MOST


def test_only_the_best_and_its_neighbours_are_tried_in_further_rounds():
    tried = Counter()

    def attempt(lr: float, number: int) -> float:
        tried[lr] += 1
        return bowl(1e-3)(lr, number)

    found = search(attempt, 1e-3, before=30.0)
    assert tried == {1e-4: 1, 3e-4: ROUNDS, 1e-3: ROUNDS, 3e-3: ROUNDS, 1e-2: 1}
    assert [len(rate.losses) for rate in found.rates] == [1, ROUNDS, ROUNDS, ROUNDS, 1]


def test_rates_that_differ_by_less_than_the_rounds_do_are_tied():
    near = [Rate(1.0, [0.50, 0.60, 0.52]), Rate(3.0, [0.49, 0.54, 0.58]), Rate(10.0, [2.0, 2.1, 2])]
    found = judge(near, before=1.0)
    assert found.best is near[1]
    assert found.tied == near[:2]


def test_a_difference_that_every_round_shows_is_told_however_far_rounds_are_apart():
    paired = [Rate(1.0, [0.20, 0.60, 0.90]), Rate(3.0, [0.25, 0.66, 0.94])]
    found = judge(paired, before=1.0)
    assert found.tied == [paired[0]]
    mean, error = excess(paired[1], paired[0])
    assert mean == pytest.approx(0.05)
    assert error < 0.01


def test_nothing_is_proposed_where_no_try_lowered_the_loss():
    for attempt in (lambda lr, number: 1.0 + lr, lambda lr, number: math.inf):
        found = search(attempt, 1.0, before=1.0)
        assert found.best is None
        assert len(found.rates) == MOST  # down, in search of one


def score(changes_at: float):
    """Of few values: as it was below a rate, better from there on, worse far above."""
    return lambda lr, number: 0.5 if lr < changes_at else 0.2 if lr < 20 * changes_at else 0.7


@pytest.mark.parametrize("guess", [1e-5, 1e-3, 1e-1, 1.0])
def test_rates_that_leave_a_score_as_it_was_are_left_upwards(guess: float):
    found = search(score(0.05), guess, before=0.5)
    assert found.best is not None
    assert found.best.lr == 0.1
    assert len(found.rates) <= MOST


def test_no_rate_below_one_that_left_the_score_as_it_was_is_tried():
    found = search(lambda lr, number: 0.5 if lr < 0.05 else 0.7, 1e-2, before=0.5)
    assert found.best is None
    assert [rate.lr for rate in found.rates] == [1e-3, 3e-3, 1e-2, 3e-2, 0.1]


def test_a_score_that_no_rate_changes_is_tried_upwards_and_once():
    tried = Counter()

    def attempt(lr: float, number: int) -> float:
        tried[lr] += 1
        return 0.5

    found = search(attempt, 1e-3, before=0.5)
    assert found.is_flat
    assert set(tried.values()) == {1}
    assert (found.rates[0].lr, found.rates[-1].lr, len(tried)) == (1e-4, 100.0, MOST)


def test_a_try_without_any_slope_says_all_that_others_would():
    found = search(lambda lr, number: 0.5, 1e-3, before=0.5, moves=lambda: False)
    assert found.is_flat
    assert len(found.rates) == 1


def test_a_rate_that_diverges_in_a_later_round_is_not_the_best():
    rates = [Rate(1.0, [0.5, 0.5, 0.5]), Rate(3.0, [0.1, 0.1, math.inf])]
    assert judge(rates, before=1.0).best is rates[0]


def test_longer_runs_get_smaller_rates_and_shorter_ones_the_same():
    assert for_run(0.1, tried=25, steps=100) == 0.05
    assert for_run(0.1, tried=100, steps=100) == for_run(0.1, tried=100, steps=20) == 0.1


@pytest.mark.parametrize("rate", [1e-7, 3e-5, 0.1, 30.0])
def test_the_grid_holds_ones_and_threes(rate: float):
    assert search(lambda lr, number: abs(math.log(lr / rate)), rate, 1e9).best.lr == rate  # pyright: ignore[reportOptionalMemberAccess]
    assert place_of(rate) == place_of(1.2 * rate)
