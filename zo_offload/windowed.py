"""The updates of a run with momentum: each made of the records of a window of steps.

A pure function of the records: a step's rate needs those from the beginning (they are read once, in
order, and two numbers a step are kept), its directions those of its window.
"""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import overload

from zo_offload import momentum as rules
from zo_offload.history import History
from zo_offload.journal import Flags, Record, Records
from zo_offload.momentum import Moments, Momentum
from zo_offload.ops import Draw, StepUpdate

READ_AT_ONCE = 4096  # records, unpacked
MOST_KEPT = 8  # slices that were asked for last: each unit asks for the same
LONGEST_KEPT = 256  # steps of them; a replay's are not asked for again


class Windowed(History):
    """As :class:`History`, with momentum.

    Args:
        records: A journal's, which grow behind this view.
        seed: Key of all directions.
        momentum: How steps make an update.
    """

    def __init__(self, records: Records, seed: int, momentum: Momentum) -> None:
        super().__init__(records, seed)
        self._momentum = momentum
        self._lock = RLock()  # units are asked for by the pipeline's thread, too
        self._forget()

    @overload
    def __getitem__(self, index: int) -> StepUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepUpdate]: ...
    def __getitem__(self, index: int | slice) -> StepUpdate | list[StepUpdate]:
        steps = range(len(self))[index]
        if isinstance(steps, range):
            assert steps.step == 1, "steps follow one another"
            return list(self._between(steps.start, max(steps.start, steps.stop)))
        return self._between(steps, steps + 1)[0]

    def coefficients(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """See :class:`History`; what older steps add is beside them."""
        with self._lock:
            self._read(len(self))
            moments = rules.after(self._momentum, self._moments, projected_grads)
        rate = rules.rate(self._momentum, moments, lr)
        number = len(projected_grads)
        return [rules.coefficient(rate, g, number) for g in projected_grads]

    def _between(self, start: int, stop: int) -> tuple[StepUpdate, ...]:
        """Of steps start to stop, less one; kept while they are asked for again."""
        with self._lock:
            self._read(stop)
            found = self._kept.get((start, stop))
            if found is not None:
                return found
            found = tuple(self._made(start, stop))
            if stop - start <= LONGEST_KEPT:
                if len(self._kept) >= MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[start, stop] = found
            return found

    def _made(self, start: int, stop: int) -> Iterator[StepUpdate]:
        number = bisect_left(self._applied, start)  # steps before it that were applied
        earlier = self._applied[max(0, number - self._momentum.window + 1) : number]
        first = earlier[0] if earlier else start
        window: deque[Record] = deque(maxlen=self._momentum.window)
        for record in self._records[first:stop]:
            applied = not record.flags & Flags.SKIPPED
            if applied:
                window.append(record)
            if record.step < start:
                continue
            draws: tuple[Draw, ...] = ()
            if applied:
                draws = tuple(self._draws(window, self._rates[number]))
                number += 1
            yield StepUpdate(record.decay, draws, self._seed, record.step)

    def _draws(self, window: Sequence[Record], rate: float) -> Iterator[Draw]:
        """In order of steps and probes: the oldest first."""
        powers = self._momentum.powers[: len(window)]
        for record, power in zip(window, reversed(powers), strict=True):
            probes, weight = record.probes, rate * power
            for probe in probes:
                found = rules.coefficient(weight, probe.projected_grad, len(probes))
                yield Draw(self._seed, record.step, probe.number, found)

    def _read(self, stop: int) -> None:
        """Know the rates of the steps before ``stop``."""
        if self._branch != self._records.branch:
            self._forget()
        while self._num_read < stop:
            last = min(stop, self._num_read + READ_AT_ONCE)
            for record in self._records[self._num_read : last]:
                if record.flags & Flags.SKIPPED:
                    continue
                grads = [probe.projected_grad for probe in record.probes]
                self._moments = rules.after(self._momentum, self._moments, grads)
                self._applied.append(record.step)
                self._rates.append(rules.rate(self._momentum, self._moments, record.lr))
            self._num_read = last

    def _forget(self) -> None:
        """Steps that were read may be others: a branch has begun."""
        self._branch = self._records.branch
        self._num_read = 0
        self._moments = Moments()
        self._applied = array("Q")  # steps that were not skipped
        self._rates = array("d")  # of them
        self._kept: dict[tuple[int, int], tuple[StepUpdate, ...]] = {}


def history_of(records: Records, seed: int, momentum: Momentum | None) -> History:
    """The updates of a run, by what its steps make of the records."""
    return Windowed(records, seed, momentum) if momentum is not None else History(records, seed)
