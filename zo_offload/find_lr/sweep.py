"""Which rates are tried, and what the tries say: pure functions, so that every rank decides alike.

Zeroth-order runs differ more by their directions than by a rate that is half as large. So all rates
are tried along the same directions and on the same batches: differences between them are paired.
How far such a difference is chance, further rounds along other directions say, of the best rate and
its neighbours alone.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

FIRST = 5  # rates, evenly around the guess
MOST = 13  # rates, with those that are added where an end of the grid is best
ROUNDS = 3  # of the best rate and its neighbours, the first included
T_95 = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13}  # Student's, one-sided, by degrees of freedom


@dataclass
class Rate:
    """What one learning rate came to.

    Attributes:
        lr: Of the tries' first step.
        losses: On the held-out examples, after a try; infinite where it diverged. One a round.
    """

    lr: float
    losses: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """In any round."""
        return not all(map(math.isfinite, self.losses))

    def equals(self, loss: float) -> bool:
        """In every round."""
        return not self.diverged and all(found == loss for found in self.losses)


@dataclass(frozen=True)
class Verdict:
    """What the tries say.

    Attributes:
        best: The rate of the lowest mean loss; None where no try lowered the loss.
        tied: Rates that cannot be told from the best, itself among them, in order.
        rates: All that were tried, in order.
        before: The loss that all began with.
    """

    best: Rate | None
    tied: Sequence[Rate]
    rates: Sequence[Rate]
    before: float

    @property
    def is_flat(self) -> bool:
        """Whether no try changed anything."""
        return all(rate.equals(self.before) for rate in self.rates)


def search(
    attempt: Callable[[float, int], float],
    guess: float,
    before: float,
    moves: Callable[[], bool] = lambda: True,
) -> Verdict:
    """Try rates around a guess, further out while an end is best, then the best ones again.

    A score (accuracy, F1) stays what it was where steps are too short to change an answer. So the
    way leads up, not down, while no try is better than `before` and the best ones equal it.

    Args:
        attempt: From rate and round to the loss that it ends with.
        guess: Where to begin.
        before: Loss without a step.
        moves: Whether a try has moved anything yet; if none has, no other rate can.

    Example:
        >>> found = search(lambda lr, number: (math.log10(lr) + 4) ** 2, guess=0.1, before=5.0)
        >>> found.best.lr, [rate.lr for rate in found.rates][:2]
        (0.0001, [3e-05, 0.0001])
    """
    rates: dict[int, Rate] = {}

    def attempt_at(place: int) -> None:
        lr = rate_at(place)
        rates[place] = Rate(lr, [attempt(lr, 0)])

    middle = place_of(guess)
    for place in range(middle - FIRST // 2, middle + FIRST // 2 + 1):
        attempt_at(place)
        if not moves():
            break
    while moves() and len(rates) < MOST and (place := _beyond(rates, before)) is not None:
        attempt_at(place)
    best = _best(rates, before)
    is_flat = all(rate.equals(before) for rate in rates.values())
    for number in range(1, 1 if is_flat else ROUNDS):
        for place in (best - 1, best, best + 1):
            rate = rates.get(place)
            if rate is not None and not rate.diverged:
                rate.losses.append(attempt(rate.lr, number))
    return judge([rates[place] for place in sorted(rates)], before)


def judge(rates: Sequence[Rate], before: float) -> Verdict:
    """Compare what was tried, rounds with their like."""
    rounds = max(len(rate.losses) for rate in rates)
    fit = [rate for rate in rates if not rate.diverged]
    often = [rate for rate in fit if len(rate.losses) == rounds]
    best = min(often, key=lambda rate: statistics.fmean(rate.losses), default=None)
    if best is None or not statistics.fmean(best.losses) < before:
        return Verdict(None, (), rates, before)
    return Verdict(best, [rate for rate in often if _is_tied(rate, best)], rates, before)


def excess(rate: Rate, best: Rate) -> tuple[float, float]:
    """How much higher a rate ends than the best one, mean and standard error, over equal rounds."""
    pairs = [a - b for a, b in zip(rate.losses, best.losses, strict=False)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
    return statistics.fmean(pairs), error


def for_run(lr: float, tried: int, steps: int) -> float:
    """The rate of a run, from the best one of tries that were shorter: by the root of the ratio.

    Noise adds up over a run. Where it decides, the best constant rate of N steps goes with ``1 /
    sqrt(N)``; where curvature decides, it does not depend on N, and this errs on the safe side.

    Args:
        lr: Best of the tries.
        tried: Their steps.
        steps: Of the run.

    Example:
        >>> for_run(0.03, tried=50, steps=5000)
        0.003

    Reference:
        Ghadimi and Lan (2013), "Stochastic first- and zeroth-order methods for nonconvex stochastic
        programming", SIAM J. Optim. 23(4), corollary 3.3 (step size).
    """
    return float(f"{lr * math.sqrt(min(1.0, tried / steps)):.2g}")


def place_of(rate: float) -> int:
    """The nearest place on the grid, by ratio."""
    return round(2 * math.log10(rate))


def rate_at(place: int) -> float:
    """1 or 3 times a power of ten, by turns.

    Example:
        >>> [rate_at(place) for place in (-4, -3, -2)]
        [0.01, 0.03, 0.1]
    """
    power, odd = divmod(place, 2)
    return float(f"{3 if odd else 1}e{power}")


def _best(rates: Mapping[int, Rate], before: float) -> int:
    """The best place; of equal ones the lowest rate, or the highest if it left all as it was."""
    lowest = min(rate.losses[0] for rate in rates.values())
    places = [place for place in sorted(rates) if rates[place].losses[0] == lowest]
    return places[-1 if rates[places[0]].equals(before) else 0]


def _beyond(rates: Mapping[int, Rate], before: float) -> int | None:
    """The next place at an end of the grid that is best, or where all diverged: the lower one."""
    best, low, high = _best(rates, before), min(rates), max(rates)
    if best == high:
        return high + 1
    return low - 1 if best == low and not rates[best].equals(before) else None


def _is_tied(rate: Rate, best: Rate) -> bool:
    mean, error = excess(rate, best)
    degrees = len(best.losses) - 1
    return rate is best or mean <= T_95.get(degrees, math.inf) * error
