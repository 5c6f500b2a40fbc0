"""Where a step's seconds go: what its thread does, and what it waits for.

Two threads matter. The one that takes steps runs the lanes; the pipeline's worker brings units
ahead of them. What the worker does meanwhile costs a step nothing, until the step has to stand and
wait: then the wait is the worker's doing, and is booked to whatever the worker does at that time.
So parts add up to the step, and what is overlapped is in :attr:`Clock.busy` alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUS, DISK, KERNEL = "bus", "disk", "host kernel"
EXCHANGE, JOURNAL, WAITING = "exchange", "journal", "waiting"
PARTS: tuple[str, ...] = (BUS, DISK, KERNEL, EXCHANGE, JOURNAL, WAITING)
MOST_SPANS = 4096  # of the worker that a wait may overlap

Span = tuple[str, float, float]  # part, begin, end


class Track:
    """What one thread does, part after part; of parts inside one another the inner one counts.

    Args:
        add: Told of each span when it is over.
        now: Gives the time, in seconds.
    """

    def __init__(
        self, add: Callable[[Span], None], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._add, self._now = add, now
        self._current: tuple[str, float] | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The thread does this meanwhile."""
        outer = self._current[0] if self._current is not None else None
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(outer)

    @property
    def under_way(self) -> Span | None:
        """The span that has not ended, up to now."""
        current = self._current
        return (*current, self._now()) if current is not None else None

    def _turn_to(self, name: str | None) -> None:
        before, now = self._current, self._now()
        self._current = (name, now) if name is not None else None
        if before is not None:
            self._add((*before, now))


class Clock:
    """Seconds by part since it was made.

    Attributes:
        seconds: That the thread which takes steps has spent, or waited for; what is in no part is
            computing.
        busy: That the pipeline's worker has spent, whether or not anybody waited.
        stepping: That thread's track.
        fetching: The worker's.
        stalls: On CUDA, events around each wait of the device itself for a copy, with times.

    Example:
        >>> times = iter([0.0, 1.0, 4.0, 6.0, 9.0, 9.0])
        >>> clock = Clock(now=lambda: next(times))
        >>> with clock.fetching.part(BUS):  # from 0 to 4
        ...     begun = 1.0 if next(times) else None
        >>> clock.book_wait(begun, 6.0)
        >>> clock.seconds["bus"], clock.seconds["waiting"]
        (3.0, 2.0)
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.busy: dict[str, float] = {BUS: 0.0, DISK: 0.0, KERNEL: 0.0}
        self._now = now
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=MOST_SPANS)
        self.stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MOST_SPANS)
        self.stepping = Track(self._add_step, now)
        self.fetching = Track(self._add_fetch, now)

    @contextmanager
    def wait(self) -> Iterator[None]:
        """The step's thread stands until the worker has done something."""
        begun = self._now()
        try:
            yield
        finally:
            self.book_wait(begun, self._now())

    def book_wait(self, begun: float, ended: float) -> None:
        """Give each second of a wait to what the worker did then; to nothing else, the rest."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        current = self.fetching.under_way
        left = ended - begun
        for part, first, last in [*spans, *([current] if current is not None else [])]:
            overlap = max(0.0, min(last, ended) - max(first, begun))
            self.seconds[part] += overlap
            left -= overlap
        self.seconds[WAITING] += max(0.0, left)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """``seconds`` and ``busy``, with the stalls of the device that are over: between steps."""
        while self.stalls and self.stalls[0][1].query():  # untested: needs CUDA
            before, after = self.stalls.popleft()
            self.seconds[BUS] += before.elapsed_time(after) / 1e3
        return dict(self.seconds), dict(self.busy)

    def _add_step(self, span: Span) -> None:
        part, begun, ended = span
        self.seconds[part] += ended - begun

    def _add_fetch(self, span: Span) -> None:
        part, begun, ended = span
        with self._lock:
            self.busy[part] = self.busy.get(part, 0.0) + ended - begun
            self._spans.append(span)
