"""CUDA's streams and events without a device: what is launched is done later, as late as it may.

Each stream is a queue. What is first in any of them may be done next, in any order that events
allow; the host goes on meanwhile, and makes things happen only when it waits for an event, or by
chance. So a wait that is missing shows as bytes that are not there yet, or not any more.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, local
from typing import Any

import pytest
import torch


class Machine:
    """All streams of a device.

    Args:
        seed: Of the order in which they come to their turns.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = RLock()
        self.streams: list[Stream] = []
        self.default = Stream(self)
        self._thread = local()

    @property
    def current(self) -> "Stream":
        """The stream of the calling thread."""
        return getattr(self._thread, "stream", self.default)

    @contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        """Launch on a stream meanwhile."""
        before, self._thread.stream = self.current, stream
        try:
            yield
        finally:
            self._thread.stream = before

    def until(self, done: Callable[[], bool]) -> None:
        """Do what is launched as long as it takes, one stream before another, in any order."""
        with self.lock:
            self.random.shuffle(self.streams)
        while not done():
            assert self.turn(), "the host waits for what never comes"

    def turn(self) -> bool:
        """Let a stream do what is next; False where none can."""
        with self.lock:
            ready = next((each for each in self.streams if each.is_ready), None)
            if ready is not None:
                ready.do_next()
            return ready is not None

    def by_chance(self) -> None:
        """Some things happen while the host is at work."""
        for _ in range(self.random.choice((0, 0, 1, 3))):
            self.turn()


class Stream:
    """A queue of work; see ``torch.cuda.Stream``."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._queue: deque[Event | Callable[[], Any]] = deque()  # an event is waited for
        with machine.lock:
            machine.streams.append(self)

    @property
    def is_ready(self) -> bool:
        first = self._queue[0] if self._queue else None
        return first is not None and not (isinstance(first, Event) and not first.has_come)

    def do_next(self) -> None:
        first = self._queue.popleft()
        if not isinstance(first, Event):
            first()

    def launch(self, work: Callable[[], Any]) -> None:
        with self._machine.lock:
            self._queue.append(work)

    def wait_event(self, event: "Event") -> None:
        with self._machine.lock:
            self._queue.append(event)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> "Event":
        event = Event(self._machine)
        event.record(self)
        return event


class Event:
    """Comes when all that was launched on its stream before is done; see ``torch.cuda.Event``."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.has_come = False

    def record(self, stream: Stream) -> None:
        stream.launch(self._come)

    def synchronize(self) -> None:
        self._machine.until(lambda: self.has_come)

    def query(self) -> bool:
        return self.has_come

    def _come(self) -> None:
        self.has_come = True


@contextmanager
def simulated(seed: int) -> Iterator[Machine]:
    """Meanwhile CUDA's streams are a machine's, and copies that need not block are launched."""
    machine = Machine(seed)
    copy = torch.Tensor.copy_

    def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        if not non_blocking:
            return copy(target, source)
        machine.current.launch(lambda: copy(target, source))
        return target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(machine))
        patch.setattr(torch.cuda, "Event", lambda enable_timing: Event(machine))
        patch.setattr(torch.cuda, "current_stream", lambda device: machine.current)
        patch.setattr(torch.cuda, "stream", machine.on)
        patch.setattr(torch.Tensor, "copy_", copied)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        yield machine
