"""The faster of two ways is kept."""

import pytest

from zo_offload.offload.trial import ROUNDS, WARM_UP, Trial


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize(("seconds", "kept"), [((1.0, 2.0), 0), ((2.0, 1.0), 1), ((1.0, 1.0), 0)])
def test_the_faster_is_kept(period: int, seconds: tuple[float, float], kept: int):
    clock = Clock()
    trial = Trial(("one", "other"), period, clock)
    ways = []
    for _ in range(period * (WARM_UP + 2 * ROUNDS)):
        ways.append(trial.choose())
        clock.now += seconds[ways[-1]]
    assert {ways.count(way) for way in (0, 1)} == {period * ROUNDS, period * (ROUNDS + WARM_UP)}
    assert [trial.choose() for _ in range(5)] == [kept] * 5


def test_what_is_slow_once_does_not_decide():
    clock = Clock()
    trial = Trial(("one", "other"), clock=clock)
    for visit in range(WARM_UP + 2 * ROUNDS):
        clock.now += [2.0, 1.0][trial.choose()] + (100.0 if visit == WARM_UP + 1 else 0.0)
    assert trial.choose() == 1


def test_a_disturbed_visit_does_not_count():
    clock = Clock()
    trial = Trial(("one", "other"), clock=clock)
    for _ in range(WARM_UP + 2 * ROUNDS):
        way = trial.choose()
        clock.now += [2.0, 1.0][way]
        if way == 1:
            trial.disturb()
    assert trial.choose() == 0  # nothing is known of the other
