"""Memory that ranks map together: one content, locks that die with a rank, copies of one's own."""

import errno
import gc
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue

import pytest

from zo_offload.errors import ReplicaError, StoreError
from zo_offload.offload.region import PAGE, Region


def regions(num_bytes: int, ranks: tuple[int, ...] = (4, 5)) -> list[Region]:
    """Of ranks that are threads of this process; their locks are apart all the same."""
    said: SimpleQueue[str] = SimpleQueue()

    def lead(text: str) -> str:
        for _ in ranks[1:]:
            said.put(text)
        return text

    first = Region(num_bytes, ranks, 0, lead)
    rest = [Region(num_bytes, ranks, i, lambda _: said.get()) for i in range(1, len(ranks))]
    return [first, *rest]


def test_all_see_one_memory_and_nothing_has_a_name():
    first, second = regions(3 * PAGE + 5)
    assert not second.memory(0, 3 * PAGE + 5).any()
    first.memory(PAGE, 10).fill_(7)
    assert second.memory(0, 3 * PAGE + 5).sum() == 70
    first.array(8, 2)[1] = -3
    assert second.array(16, 1)[0] == -3
    assert first.memory(3 * PAGE + 5, 0).numel() == 0
    assert not any("zo_offload" in name for name in os.listdir("/dev/shm"))


def test_what_is_one_s_own_is_seen_by_nobody_and_unchanged_pages_stay_shared():
    first, second = regions(2 * PAGE)
    first.memory(0, 2 * PAGE).fill_(1)
    own = second.private(0, 2 * PAGE)
    own[0] = 9
    assert first.memory(0, 2 * PAGE).sum() == 2 * PAGE
    first.memory(0, 1)[0] = 5
    first.memory(PAGE, 1)[0] = 5
    assert own[0] == 9
    assert own[PAGE] == 5


def test_one_changes_or_all_read():
    first, second = regions(1)
    first.change(3)
    assert not second.try_to_change(3)
    assert second.try_to_change(4)
    first.leave(3)
    second.leave(4)
    first.read(3, 2)
    second.read(3)
    assert not second.try_to_change(4)
    first.leave(3, 2)
    assert second.try_to_change(4)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.change, 3, 2)
        second.leave(4)
        second.leave(3)
        waiting.result(timeout=30)
    assert not second.try_to_change(3)


def test_they_meet():
    ranks = regions(1, (0, 1, 2))
    came: SimpleQueue[int] = SimpleQueue()

    def go(index: int) -> None:
        for turn in range(20):
            came.put(turn)
            ranks[index].meet()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(go, range(3), timeout=60))
    turns = [came.get() for _ in range(60)]
    assert [turns[3 * i : 3 * i + 3] for i in range(20)] == [[i] * 3 for i in range(20)]


def test_a_dead_rank_is_named_and_its_locks_are_given_back():
    """Also where it had forked: a data worker that outlives it holds nothing."""
    with ExitStack() as stack:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        said: list[str] = []
        first = Region(1, (4, 5), 0, lambda text: said.append(text) or text)
        rank = os.fork()
        if rank == 0:  # the second rank, with a child of its own
            second = Region(1, (4, 5), 1, lambda _: said[0])
            second.change(7)
            child = os.fork()
            if child:
                os.write(writing, child.to_bytes(4, "little"))
            signal.pause()
        child = int.from_bytes(os.read(reading, 4), "little")
        stack.callback(os.kill, child, signal.SIGKILL)
        stack.callback(os.close, writing)
        assert not first.try_to_change(7)
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
        first.change(7)
        with pytest.raises(ReplicaError, match="rank 4 lost rank 5, which shares its machine's"):
            first.meet()


def test_what_may_not_be_opened_is_named():
    with pytest.raises(StoreError, match=r"rank 5 may not open the memory of rank 4 .* one user"):
        Region(1, (4, 5), 1, lambda _: "/proc/1/fd/99999")


def test_memory_that_the_system_refuses_is_named_on_every_rank(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    said: list[str] = []
    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(StoreError, match=r"no 4,096 bytes that ranks of a .* \(Too many open"):
        Region(5, (4, 5), 0, lambda text: said.append(text) or text)
    with pytest.raises(StoreError, match="rank 5 may not open the memory of rank 4"):
        Region(5, (4, 5), 1, lambda _: said[0])


def test_nothing_stays_open_of_a_region_that_nobody_uses():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        regions(PAGE)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
