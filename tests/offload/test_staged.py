"""Staging buffers: what is lent is what was kept last, whatever was announced before."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_offload.errors import StoreError
from zo_offload.offload.staged import LEAST_BUFFERS, Buffer, Staged
from zo_offload.ops import Segment, Span
from zo_offload.units import Unit

UNITS = 5


def unit(index: int) -> Unit:
    size = 128 * (1 + index % 2)
    span = Span(torch.bfloat16, (Segment(f"w{index}", index, (size,), 0),), 0, 0)
    return Unit(index, f"blocks.{index}", (span,), span.wire_bytes, span.rest_bytes)


class Files:
    """Keeps units in memory; transfers run on threads, and wait while they are told to."""

    def __init__(self) -> None:
        self.content = {
            i: (bytes(unit(i).wire_bytes), bytes(unit(i).rest_bytes), 0) for i in range(UNITS)
        }
        self.threads = ThreadPoolExecutor(3)
        self.go = Event()
        self.go.set()
        self.broken = False
        self.steps = dict.fromkeys(range(UNITS), 0)
        self.reads: list[tuple[int, bool]] = []

    def holds(self, unit: int) -> bool:
        return True

    def carries(self, unit: int) -> int:
        return self.steps[unit]

    def close(self) -> None:
        self.threads.shutdown()

    def read(self, unit: int, wire: torch.Tensor, rest: torch.Tensor | None) -> "Future[int]":
        self.reads.append((unit, rest is not None))
        return self.threads.submit(self._read, unit, wire, rest)

    def write(self, unit: int, wire: torch.Tensor, rest: torch.Tensor, step: int) -> "Future[None]":
        self.steps[unit] = step
        return self.threads.submit(self._write, unit, wire, rest, step)

    def _read(self, unit: int, wire: torch.Tensor, rest: torch.Tensor | None) -> int:
        self.go.wait()
        held_wire, held_rest, step = self.content[unit]
        wire[: len(held_wire)] = torch.tensor(list(held_wire), dtype=torch.uint8)
        if rest is not None:
            rest[: len(held_rest)] = torch.tensor(list(held_rest), dtype=torch.uint8)
        return step

    def _write(self, unit: int, wire: torch.Tensor, rest: torch.Tensor, step: int) -> None:
        self.go.wait()
        if self.broken:
            raise StoreError("the disk is full")
        sizes = [len(part) for part in self.content[unit][:2]]
        wire, rest = (part[:size] for part, size in zip((wire, rest), sizes, strict=True))
        self.content[unit] = bytes(wire.numpy()), bytes(rest.numpy()), step


@pytest.fixture
def files() -> Iterator[Files]:
    found = Files()
    yield found
    found.go.set()
    found.threads.shutdown()


def buffers(count: int) -> list[Buffer]:
    def room() -> torch.Tensor:
        return torch.full((4096,), 255, dtype=torch.uint8)

    return [Buffer(room(), room()) for _ in range(count)]


def staged(files: Files, num_buffers: int = LEAST_BUFFERS) -> Staged:
    return Staged(files, buffers(num_buffers))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["expect", "look", "change", "copy", "fresh"]),
        st.integers(0, UNITS - 1),
        st.booleans(),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(ACTIONS, st.integers(LEAST_BUFFERS, 6))
def test_what_is_lent_is_what_was_kept(actions: list[tuple[str, int, bool]], num_buffers: int):
    files, value = Files(), 0
    store, expected = staged(files, num_buffers), dict.fromkeys(range(UNITS), 0)
    for action, index, whole in actions:
        if action == "expect":
            store.expect(unit(index), whole)
            continue
        lease = store.fresh(unit(index)) if action == "fresh" else store.lend(unit(index), whole)
        if action != "fresh":
            assert set(lease.wire.tolist()) == {expected[index]}
            assert not whole or set(lease.rest.tolist()) == {expected[index]}
        if action == "copy" and whole:
            lease.spare_wire().fill_(77)
            lease.spare_rest().fill_(78)
            assert set(lease.wire.tolist()) == set(lease.rest.tolist()) == {expected[index]}
        if action == "fresh" or (action == "change" and whole):
            value = (value + 1) % 256
            lease.wire.fill_(value)
            lease.rest.fill_(value)
            lease.keep(value)
            expected[index] = value
        lease.end()
    store.drain()
    files.threads.shutdown()
    for index, (wire, rest, _) in files.content.items():
        assert set(wire) == set(rest) == {expected[index]}


def test_what_was_announced_is_not_read_again(files: Files):
    store = staged(files, 4)
    for index in (0, 1):
        store.expect(unit(index), whole=True)
    for index in (0, 1, 1):
        store.lend(unit(index)).end()
    assert files.reads == [(0, True), (1, True)]
    store.expect(unit(2), whole=False)
    store.lend(unit(2)).end()  # more than was announced
    assert files.reads[2:] == [(2, False), (2, True)]


def test_announcing_never_waits(files: Files):
    store = staged(files, 3)
    lease = store.lend(unit(0))
    lease.keep(1)
    files.go.clear()
    lease.end()  # a write is under way
    for index in range(1, UNITS):
        store.expect(unit(index), whole=True)
    assert files.reads == [(0, True), (1, True)]  # one buffer is kept for whoever cannot wait
    files.go.set()


def test_a_write_that_fails_is_told_and_the_old_content_stays(files: Files):
    store = staged(files)
    lease = store.lend(unit(0))
    lease.wire.fill_(9)
    lease.keep(1)
    files.broken = True
    lease.end()
    with pytest.raises(StoreError, match="the disk is full"):
        store.drain()
    files.broken = False
    with pytest.raises(StoreError, match="the disk has it after 0 steps, 1 were to be written"):
        store.lend(unit(0))
