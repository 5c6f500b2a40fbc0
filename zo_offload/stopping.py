"""SIGTERM and Ctrl-C end a run after the step that is under way, on every rank the same one.

Whatever a run is doing it may be killed, and the same command continues; this is the polite way:
the step is finished, the journal synced, and the command succeeds. Among ranks the wish travels in
the exchange of a step, so that one rank that was asked is enough and nobody waits for another.
Asked once more by the same signal, it ends at once (a launcher hands one Ctrl-C on as both).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from zo_offload.reporter import Reporter

if TYPE_CHECKING:
    from zo_offload.replica import Replica

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The run ends here because it was asked to, and can be continued.

    No error, so that nobody who handles those takes it for one.

    Args:
        steps: That were taken; None before the first one was reached.
    """

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        self.steps = steps


class Stopping:
    """Hears signals while it is entered, on the main thread of a process.

    Args:
        reporter: Says that the wish was heard.
        alone: Whether there is no other rank, so that what is no step need not be finished.

    Attributes:
        steps: That were taken; None before the first one was reached.
    """

    def __init__(self, reporter: Reporter, alone: bool) -> None:
        self.steps: int | None = None
        self._reporter = reporter
        self._alone = alone
        self._asked: set[int] = set()  # by which signals
        self._replica: Replica | None = None  # of the step under way
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as a job in the background
                    self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def step(self, replica: "Replica", number: int) -> Iterator[None]:
        """Around a step, which is finished.

        Args:
            replica: Tells the others.
            number: Of the step.

        Raises:
            Stopped: Behind it, on every rank.
        """
        replica.stop_asked |= bool(self._asked)
        self._replica = replica
        try:
            yield
        finally:
            self._replica = None
        late = self._alone and replica.stop_asked  # heard when the exchange was over
        if replica.is_stopping or late:
            replica.is_stopping = replica.stop_asked = False  # for whoever runs with it next
            raise Stopped(number + 1)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number in self._asked:
            raise KeyboardInterrupt
        self._asked.add(number)
        if len(self._asked) > 1:
            return
        if self._replica is not None:
            self._replica.stop_asked = True
        elif self._alone:
            raise Stopped(self.steps)
        self._reporter.say("stopping after this step; once more: at once")
