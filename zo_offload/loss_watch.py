"""Whether a run's losses go wrong, and since when.

A pure function of the losses that the journal holds, so that every rank, and a process that goes on
where another was killed, judge alike.

*Explosion*: one step's loss is far above those before it: a bad batch, or an update that went too
far. Seen before the step is applied. *Divergence*: the losses of many steps lie above those of
earlier ones: the learning rate is too high. Both are measured by medians and median deviations of a
window of steps, which a few outliers do not move. Until a first window is full, part of one takes
its place; of the first steps, too few to tell their spread, it is taken to be as large as losses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Literal, NamedTuple

from zo_offload.config_guard import GuardConfig
from zo_offload.estimator import mean_loss
from zo_offload.journal import Flags, Record

NORMAL = 1.4826  # median deviations to standard deviations, of a normal distribution
LEAST_SPREAD = 0.05  # of the first full window's median: losses that hardly vary alarm nobody
STRIDES = 5  # windows are compared so many times in their own length; the first is a fifth of one

Kind = Literal["nonfinite", "explosion", "divergence"]


class Level(NamedTuple):
    """Where the losses of a window lie.

    Attributes:
        middle: Their median.
        spread: Their standard deviation, by the median deviation.
        last: The window's last step.
        taken: Losses in it.
    """

    middle: float
    spread: float
    last: int
    taken: int

    def is_below(self, loss: float, spreads: float) -> bool:
        """Whether a loss lies above by more than so many spreads."""
        return self.spread > 0 and loss > self.middle + spreads * self.spread


@dataclass(frozen=True)
class Finding:
    """What is wrong.

    Attributes:
        kind: Which of the three.
        text: What was found, with the numbers; no mend.
        good: The newest step whose loss was all right, and with it the weights before that step;
            None where there is none.
    """

    kind: Kind
    text: str
    good: int | None


class LossWatch:
    """Looks at the mean losses of a run's steps, in order.

    Args:
        config: How long a window is, and what counts as far.
        records: The run's, which grow behind this view; each is read once in a branch.

    Example:
        >>> from zo_offload.journal import Probe
        >>> records = [
        ...     Record(t, (Probe(0, 1.0, 1e-3),), (1 + t % 2 / 10,), 1e-3, 1e-3) for t in range(20)
        ... ]
        >>> watch = LossWatch(GuardConfig(window=20), records)
        >>> watch.explosion(1.2), watch.explosion(9.0).good
        (None, 19)
    """

    def __init__(self, config: GuardConfig, records: Sequence[Record]) -> None:
        self._config = config
        self._records = records
        self._forget()

    def explosion(self, loss: float) -> Finding | None:
        """Whether the next step's loss is far above those of the window before it."""
        self._read()
        level = self._level()
        if level is None or not level.is_below(loss, self._config.explosion_spreads):
            return None
        text = (
            f"the loss is {loss:.4g}, and those of the steps before it are {level.middle:.4g} ± "
            f"{level.spread:.2g}"
        )
        return Finding("explosion", text, self.good())

    def divergence(self) -> Finding | None:
        """Whether the newest window lies far above the lowest one."""
        self._read()
        best, latest, config = self._best, self._latest, self._config
        if best is None or latest is None:
            return None
        if not best.is_below(latest.middle, config.divergence_spreads):
            return None
        text = (
            f"losses are around {latest.middle:.4g}, and were {best.middle:.4g} ± "
            f"{best.spread:.2g} up to step {best.last}"
        )
        return Finding("divergence", text, self._good(best, best.last))

    @property
    def skipped_in_a_row(self) -> int:
        """Steps, up to the newest, that were not applied."""
        self._read()
        applied = (n for n, loss in enumerate(reversed(self._losses)) if math.isfinite(loss))
        return next(applied, len(self._losses))

    def good(self) -> int | None:
        """The newest step whose loss was no higher than is usual."""
        self._read()
        return self._good(self._level(), len(self._losses) - 1)

    def _good(self, level: Level | None, last: int) -> int | None:
        for step in range(last, -1, -1):
            usual = level is None or self._losses[step] <= level.middle + level.spread
            if math.isfinite(self._losses[step]) and usual:
                return step
        return None

    @property
    def _stride(self) -> int:
        return self._config.window // STRIDES

    def _forget(self) -> None:
        self._branch = _branch_of(self._records)
        self._losses: list[float] = []  # NaN where a step was skipped
        self._first: Level | None = None
        self._best: Level | None = None
        self._latest: Level | None = None

    def _read(self) -> None:
        if self._branch != _branch_of(self._records):  # steps that were read may be others
            self._forget()
        for record in self._records[len(self._losses) :]:
            self._add(loss_of(record))

    def _add(self, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) % self._stride:
            return
        level = self._latest = self._level()
        if level is None:
            return
        if self._first is None and level.taken == self._config.window:
            self._first = self._best = level  # parts of windows are forgotten
        elif self._best is None or level.middle < self._best.middle:
            self._best = level

    def _level(self) -> Level | None:
        """Of the newest window, or of what there is of it."""
        finite = (loss for loss in reversed(self._losses) if math.isfinite(loss))
        newest = list(islice(finite, self._config.window))
        if not newest:
            return None
        middle = median(newest)
        spread = NORMAL * median(abs(loss - middle) for loss in newest)
        least = 1.0 if len(newest) < self._stride else LEAST_SPREAD
        size = abs(self._first.middle if self._first else middle)
        return Level(middle, max(spread, least * size), len(self._losses) - 1, len(newest))


def loss_of(record: Record) -> float:
    """Mean loss of a step; NaN where it was skipped."""
    return math.nan if record.flags & Flags.SKIPPED else mean_loss(record.losses)


def _branch_of(records: Sequence[Record]) -> int:
    return getattr(records, "branch", 0)
