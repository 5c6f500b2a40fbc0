"""Ranks as threads of one process, on real sockets."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest

from zo_offload.replica import Replica
from zo_offload.replica.sockets import SocketLink, connect

HOST = "127.0.0.1"
Run = Callable[[int, Callable[[Replica], Any]], list[Any]]


class Board:
    """Stands in for the process group: rank 0's bytes on every rank."""

    def __init__(self, world_size: int) -> None:
        self.copies: SimpleQueue[bytes] = SimpleQueue()
        self.world_size = world_size

    def first(self, data: bytes) -> bytes:
        for _ in range(self.world_size - 1):
            self.copies.put(data)
        return data

    def other(self, _: bytes) -> bytes:
        return self.copies.get(timeout=30)


def connected(world_size: int) -> list[SocketLink]:
    board = Board(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        shares = [board.first, *[board.other] * (world_size - 1)]
        links = [pool.submit(connect, r, world_size, HOST, shares[r]) for r in range(world_size)]
        return [link.result() for link in links]


@pytest.fixture
def on_ranks() -> Iterator[Run]:
    """Run a function on every rank of a new world; returns results, or what was raised."""
    worlds: list[list[SocketLink]] = []

    def run(world_size: int, function: Callable[[Replica], Any]) -> list[Any]:
        links = connected(world_size)
        worlds.append(links)

        def one(link: SocketLink) -> Any:
            try:
                return function(Replica(link))
            except Exception as error:
                link.close()
                return error

        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(one, links))

    yield run
    for links in worlds:
        for link in links:
            link.close()
