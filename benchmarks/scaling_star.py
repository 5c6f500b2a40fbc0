"""Rank 0 with its exchange and nothing else, or all other ranks of a run in one cheap process.

Asked by ``scaling.py``. What rank 0 does is the real thing, over real connections; the others, on
the far side, send what a rank sends and wait for as much as it gets.
"""

import resource
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
from programs import serve

from zo_offload.replica import Booked, Replica
from zo_offload.replica.booked import Shape
from zo_offload.replica.sockets import SocketLink, connect
from zo_offload.replica.sums import sums_of

LOSSES = [[(float(np.float32(loss)), 1.0) for loss in (6.9, 7.1)]]
BOOKED = Booked.of(["+", "-"], LOSSES)


class Timed:
    """A link that knows how long it was at work."""

    def __init__(self, link: SocketLink) -> None:
        self._link = link
        self.rank, self.world_size = link.rank, link.world_size
        self.bytes_sent = 0
        self.timeout = link.timeout
        self.sending = self.receiving = 0.0

    def send(self, peer: int, data: bytes) -> None:
        began = time.perf_counter()
        self._link.send(peer, data)
        self.bytes_sent += len(data)
        self.sending += time.perf_counter() - began

    def receive(self, peer: int, size: int) -> bytes:
        began = time.perf_counter()
        data = self._link.receive(peer, size)
        self.receiving += time.perf_counter() - began
        return data

    def close(self) -> None:
        self._link.close()


class Near:
    """Rank 0."""

    def __init__(self) -> None:
        self._link: SocketLink | None = None
        self._replica = Replica()
        self._thread = threading.Thread()

    def listen(self, world_size: int, host: str) -> str:
        """What the others need to connect; goes on in a thread while they do."""
        self.leave()
        said: SimpleQueue[bytes] = SimpleQueue()

        def share(data: bytes) -> bytes:
            said.put(data)
            return data

        def accept() -> None:
            self._link = connect(0, world_size, host, share)
            self._replica = Replica(self._link)

        self._began = time.perf_counter()
        self._thread = threading.Thread(target=accept)
        self._thread.start()
        return said.get(timeout=30).hex()

    def accepted(self) -> float:
        """Seconds until all had connected."""
        self._thread.join()
        return time.perf_counter() - self._began

    def mean(self, step: int) -> dict[str, float]:
        """Seconds of one exchange to which all others have sent already, by what takes them.

        ``processor`` is free of what other programs on this machine take.
        """
        self._replica.link = link = Timed(self.link)
        began, used = time.perf_counter(), time.process_time()
        self._replica.mean(BOOKED, step)
        total, used = time.perf_counter() - began, time.process_time() - used
        self._replica.link = self.link
        began = time.perf_counter()
        sums_of([BOOKED] * link.world_size, "step 0").pack(link.world_size)
        adding = time.perf_counter() - began
        rest = total - link.receiving - link.sending - adding
        return {
            "processor": used, "total": total, "receiving": link.receiving, "adding": adding,
            "sending": link.sending, "reading": rest,
        }  # fmt: skip

    def loop(self, count: int) -> float:
        """Seconds of one exchange, back to back, after a first that does not count."""
        self._replica.mean(BOOKED, 0)
        began = time.perf_counter()
        for step in range(1, 1 + count):
            self._replica.mean(BOOKED, step)
        return (time.perf_counter() - began) / count

    def round_trip(self, count: int) -> float:
        """Seconds of one byte to rank 1 and back, with nothing around."""
        began = time.perf_counter()
        for _ in range(count):
            self.link.send(1, b"x")
            self.link.receive(1, 1)
        return (time.perf_counter() - began) / count

    def leave(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    @property
    def link(self) -> SocketLink:
        assert self._link is not None
        return self._link


class Far:
    """All other ranks."""

    def __init__(self) -> None:
        self._links: list[SocketLink] = []
        self._before: Shape | None = None  # of the step before
        self._answer_bytes = 0

    def join(self, world_size: int, host: str, invitation: str) -> None:
        """Connect every one."""
        self.leave()
        share = bytes.fromhex(invitation)
        self._links = [
            connect(rank, world_size, host, lambda _: share) for rank in range(1, world_size)
        ]
        self._before = None
        self._answer_bytes = len(sums_of([BOOKED] * world_size, "step 0").pack(world_size))

    def send(self, step: int) -> None:
        """What each brings to a step."""
        packed = BOOKED.pack(step, self._before)
        self._before = BOOKED.shape
        for link in self._links:
            link.send(0, packed)

    def receive(self) -> None:
        """What each gets."""
        for link in self._links:
            link.receive(0, self._answer_bytes)

    def loop(self, count: int) -> None:
        """So many steps and one, one behind the other."""
        for step in range(1 + count):
            self.send(step)
            self.receive()

    def echo(self, count: int) -> None:
        """Rank 1 gives back so many bytes."""
        for _ in range(count):
            self._links[0].send(0, self._links[0].receive(0, 1))

    def leave(self) -> None:
        for link in self._links:
            link.close()
        self._links = []


def traffic() -> dict[str, int]:
    """Bytes and packets of all devices of this network but the loopback, by the kernel's count."""
    found = {"received": 0, "packets in": 0, "sent": 0, "packets out": 0}
    with open("/proc/self/net/dev") as file:
        for line in file.readlines()[2:]:
            name, counts = line.split(":")
            if name.strip() != "lo":
                numbers = [int(each) for each in counts.split()]
                for key, place in zip(found, (0, 1, 8, 9), strict=True):
                    found[key] += numbers[place]
    return found


def requests(side: str) -> dict[str, Callable[..., Any]]:
    if side == "near":
        near = Near()
        asked = (near.listen, near.accepted, near.mean, near.loop, near.round_trip, near.leave)
    else:
        far = Far()
        asked = (far.join, far.send, far.receive, far.loop, far.echo, far.leave)
    return {each.__name__: each for each in (*asked, traffic)}


def raise_file_limit() -> None:
    """A connection is an open file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    raise_file_limit()
    serve(sys.argv[-1], requests(sys.argv[1]))
