"""Alternating measurements: every contestant once a round, medians and ratios of the rounds."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The middle half's width over the median."""
        ordered = sorted(self.seconds)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / self.median

    def over(self, other: "Times") -> float:
        """The median ratio of this one's times to another's, round by round."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def alternating(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    most_seconds: float = math.inf,
) -> dict[str, Times]:
    """Time every contestant once a round, after rounds that do not count.

    Args:
        contestants: By name.
        rounds: That count.
        warm_up: That do not.
        most_seconds: After so many no further round begins, but the first that counts.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    first = time.perf_counter()
    for number in range(warm_up + rounds):
        if number > warm_up and time.perf_counter() - first > most_seconds:
            break
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number >= warm_up:
                found[name].append(time.perf_counter() - began)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}
