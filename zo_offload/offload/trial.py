"""Which of two ways of a visit is the faster one, tried in turn on a run's first visits."""

import logging
import time
from collections.abc import Callable
from statistics import median

WARM_UP = 2  # periods that do not count: allocations, first touches
ROUNDS = 3  # periods of either way that do
logger = logging.getLogger(__name__)


class Trial:
    """Asked at the start of every visit which way to go.

    Args:
        names: Of the two ways, for the log; the first is kept where they are equal.
        period: Visits in a row that go one way, where work is due in one of so many only.
        clock: Seconds.

    Example:
        >>> now = iter(range(100))
        >>> trial = Trial(("slow", "fast"), clock=lambda: float(next(now)))
        >>> [trial.choose() for _ in range(9)]
        [0, 0, 0, 1, 0, 1, 0, 1, 0]
    """

    def __init__(
        self,
        names: tuple[str, str],
        period: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._names = names
        self._period = period
        self._clock = clock
        self._visits = 0
        self._began: float | None = None
        self._seconds: tuple[list[float], list[float]] = [], []
        self._chosen: int | None = None

    def choose(self) -> int:
        """0 or 1, for the visit that begins."""
        if self._chosen is not None:
            return self._chosen
        number, within = divmod(self._visits, self._period)
        if within == 0:
            self._end_period(number - 1)
            if number == WARM_UP + 2 * ROUNDS:
                return self._decide()
        self._visits += 1
        return self._way(number)

    def disturb(self) -> None:
        """Something else takes time now: the period under way does not count."""
        self._began = None

    def _way(self, period: int) -> int:
        return (period - WARM_UP) % 2 if period >= WARM_UP else 0

    def _end_period(self, number: int) -> None:
        now = self._clock()
        if number >= WARM_UP and self._began is not None:
            self._seconds[self._way(number)].append(now - self._began)
        self._began = now

    def _decide(self) -> int:
        first, second = (median(each) if each else 0.0 for each in self._seconds)
        self._chosen = int(bool(self._seconds[1]) and second < first)
        logger.info(
            "%s: %.3g s, %s: %.3g s; %s is kept",
            *(self._names[0], first, self._names[1], second, self._names[self._chosen]),
        )
        return self._chosen
