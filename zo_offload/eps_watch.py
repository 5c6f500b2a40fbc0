"""Whether eps is too small to be seen: steps whose losses do not, or hardly, differ.

A loss is a number of fp32, mostly, so that ``L+ - L-`` comes in steps of its spacing, some 1e-7 of
the loss. Where eps (or, in half precision, its effect on rounded weights) is too small, losses are
equal, projected gradients are 0 and nothing moves: eps is dead. Where differences are a step or two
of fp32, they are mostly rounding: eps is coarse. Where they are less than the rounding that was
measured (``loss_noise.py``), the same in half precision.

An objective may be coarse by nature: an accuracy is a multiple of 1 / n, and often the same for
both signs. That is no fault of eps. Such losses are told by being quotients of small integers.
Where nearly all are the same from the start, the objective is flat: there is nothing to learn from.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import median
from typing import Literal

WINDOW = 20  # steps that are looked at together; as many without any slope are dead
COARSE = 2.0  # steps of fp32: of the middle difference, at most
COARSE_MOST = 16.0  # of the largest; beyond, the objective is one of few values
MOST_NOISE = 0.5  # over signal
LARGEST_DENOMINATOR = 512
FLAT = 0.9  # of the first pairs of losses are equal

Kind = Literal["dead", "coarse", "noisy", "flat"]


@dataclass(frozen=True)
class Finding:
    """What is wrong with eps, or with the objective.

    Attributes:
        kind: ``dead``: nothing moves. ``coarse``: losses differ by a step or two of fp32.
            ``noisy``: by less than their rounding. ``flat``: the objective does not change.
        step: After which it was found.
        text: One line, with the numbers and the mend.
    """

    kind: Kind
    step: int
    text: str


@dataclass
class EpsWatch:
    """Looks at the losses of steps as they come.

    Args:
        eps: Distance along z.
        num_signs: Lanes of a probe; with one, probes are compared with each other.
        noise: Standard deviation of rounding in ``L+ - L-``, where it was measured.
        significand: Bits of a loss's number format: 24 of fp32, 53 of float64.

    Attributes:
        finding: The first that was made; nothing is looked for after it.

    Example:
        >>> watch = EpsWatch(eps=1e-9)
        >>> for step in range(20):
        ...     found = watch.observe(step, [0.6931472 + step] * 2, [0.0])
        >>> found.kind, watch.finding is found
        ('dead', True)
    """

    eps: float
    num_signs: int = 2
    noise: float | None = None
    significand: int = 24
    finding: Finding | None = None
    _seen: deque[tuple[Sequence[float], bool]] = field(
        default_factory=lambda: deque(maxlen=WINDOW), init=False
    )
    _is_first: bool = field(default=True, init=False)

    def observe(
        self, step: int, losses: Sequence[float], projected_grads: Sequence[float]
    ) -> Finding | None:
        """Take a step's losses in; what they show together with those before, the first time.

        Args:
            step: Its number.
            losses: Of its lanes, in (probe, sign) order.
            projected_grads: As measured.
        """
        if self.finding is not None or not all(map(math.isfinite, losses)):
            return None
        self._seen.append((losses, any(projected_grads)))
        if len(self._seen) == WINDOW:
            self.finding, self._is_first = self._look(step), False
        return self.finding

    def _look(self, step: int) -> Finding | None:
        everything = [loss for losses, _ in self._seen for loss in losses]
        if is_stepwise(everything):
            return self._flat(step) if self._is_first and any(everything) else None
        if not any(moves for _, moves in self._seen):
            return Finding(
                "dead",
                step,
                f"eps {self.eps:g} is dead: for {WINDOW} steps all losses of a step were equal to "
                f"the last digit (the last {everything[-1]:.7g}), so nothing moves; raise eps",
            )
        spreads = self._spreads()
        size = spacing(median(map(abs, everything)), self.significand)
        middle, largest = median(spreads), max(spreads)
        equal = sum(spread == 0 for spread in spreads)
        if middle <= COARSE * size and largest <= COARSE_MOST * size:
            return Finding(
                "coarse",
                step,
                f"losses are too coarse for eps {self.eps:g}: L+ - L- is {middle:.2g} in the "
                f"middle of {WINDOW} steps ({equal} of {len(spreads)} are 0), and numbers of its "
                f"format are {size:.2g} apart there; raise eps",
            )
        return self._against_noise(step, spreads)

    def _flat(self, step: int) -> Finding | None:
        """At the start: later on, an accuracy may have nothing more to learn."""
        spreads = self._spreads()
        equal = sum(spread == 0 for spread in spreads)
        if equal < FLAT * len(spreads):
            return None
        return Finding(
            "flat",
            step,
            f"the objective hardly changes at eps {self.eps:g}: in the first {WINDOW} steps "
            f"{equal} of {len(spreads)} pairs of losses were equal, and teach nothing; take larger "
            "batches or a larger eps, or begin with a loss",
        )

    def _against_noise(self, step: int, spreads: Sequence[float]) -> Finding | None:
        if not self.noise or not math.isfinite(self.noise) or self.num_signs == 1:
            return None
        square = math.fsum(spread * spread for spread in spreads) / len(spreads)
        signal = math.sqrt(max(square - self.noise**2, 0.0))
        if self.noise <= MOST_NOISE * signal:
            return None
        return Finding(
            "noisy",
            step,
            f"rounding drowns the signal: L+ - L- is {math.sqrt(square):.2g} over {WINDOW} steps, "
            f"of which rounding makes {self.noise:.2g}, at eps {self.eps:g}; raise eps, or compute "
            "in fp16 or fp32",
        )

    def _spreads(self) -> list[float]:
        """How far a probe's two losses are from each other, or all probes' from one another."""
        steps = [losses for losses, _ in self._seen]
        if self.num_signs == 1:
            return [max(losses) - min(losses) for losses in steps]
        pairs = (zip(losses[0::2], losses[1::2], strict=True) for losses in steps)
        return [abs(a - b) for of_step in pairs for a, b in of_step]


def spacing(loss: float, significand: int = 24) -> float:
    """From a loss to the next number of its format.

    Example:
        >>> spacing(1.0) == 2.0**-23, spacing(0.75) == 2.0**-24
        (True, True)
    """
    _, exponent = math.frexp(abs(loss))
    return math.ldexp(1.0, max(exponent - significand, -149))


def is_stepwise(losses: Sequence[float]) -> bool:
    """Whether losses are of an objective that takes few values: quotients of small integers.

    Example:
        >>> is_stepwise([0.25, 1 / 3, 0.0]), is_stepwise([0.25, 0.6931472])
        (True, False)
    """
    return all(_is_quotient(loss) for loss in set(losses))


def _is_quotient(loss: float) -> bool:
    """Within the rounding of fp32; one number in a hundred is by chance."""
    if not math.isfinite(loss):
        return False
    near = Fraction(loss).limit_denominator(LARGEST_DENOMINATOR)
    return abs(float(near) - loss) <= spacing(loss) / 2
