"""Where a step's seconds go: parts add up, and what is overlapped costs nothing."""

import pytest

from zo_offload.clock import BUS, DISK, EXCHANGE, KERNEL, WAITING, Clock


class Time:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock(time: Time) -> Clock:
    return Clock(time)


def spent(clock: Clock) -> dict[str, float]:
    return {part: seconds for part, seconds in clock.read()[0].items() if seconds}


def test_what_nobody_waits_for_costs_a_step_nothing(clock, time):
    with clock.fetching.part(BUS):
        time.now = 3.0
    with clock.wait():
        time.now = 3.5
    assert spent(clock) == {WAITING: 0.5}
    assert clock.read()[1] == {BUS: 3.0, DISK: 0.0, KERNEL: 0.0}


def test_a_wait_is_what_the_worker_does_meanwhile(clock, time):
    with clock.fetching.part(KERNEL):
        time.now = 1.0
        with clock.fetching.part(DISK):
            time.now = 5.0
        time.now = 6.0
    clock.book_wait(4.0, 6.5)
    assert spent(clock) == {DISK: 1.0, KERNEL: 1.0, WAITING: 0.5}
    assert clock.read()[1] == {BUS: 0.0, DISK: 4.0, KERNEL: 2.0}


def test_a_wait_that_ends_while_the_worker_goes_on(clock, time):
    with clock.fetching.part(BUS):
        time.now = 1.0
        with clock.wait():
            time.now = 3.0
        time.now = 10.0
    assert spent(clock) == {BUS: 2.0}
    with clock.wait():
        time.now = 11.0
    assert spent(clock) == {BUS: 2.0, WAITING: 1.0}  # nothing is booked twice


def test_parts_inside_one_another_are_counted_once(clock, time):
    with clock.stepping.part(EXCHANGE):
        time.now = 1.0
        with clock.stepping.part(KERNEL):
            time.now = 3.0
        time.now = 6.0
    time.now = 9.0
    assert spent(clock) == {EXCHANGE: 4.0, KERNEL: 2.0}


def test_a_part_that_fails_ends(clock, time):
    def fail() -> None:
        time.now = 2.0
        raise ValueError("in vain")

    with pytest.raises(ValueError, match="in vain"), clock.stepping.part(EXCHANGE):
        fail()
    time.now = 7.0
    with clock.stepping.part(KERNEL):
        time.now = 8.0
    assert spent(clock) == {EXCHANGE: 2.0, KERNEL: 1.0}
