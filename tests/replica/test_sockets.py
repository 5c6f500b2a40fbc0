"""The exchange on real sockets: failures that all raise, ranks that leave."""

import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from replica.world import HOST, Board, Run, connected, on_ranks
from zo_offload.errors import ConfigError, DivergedError, LostRankError, ReplicaError
from zo_offload.replica import Booked, Replica, patience, sockets
from zo_offload.replica.booked import HEADER, SHAPE, SHAPED, SHORT
from zo_offload.replica.sockets import GREETING, INVITATION, TOKEN_BYTES, connect
from zo_offload.replica.sums import Sums, sums_of

__all__ = ["on_ranks"]


def rows_of(rank: int, world_size: int) -> list:
    table = [[(0.1 * i + 1 / 3, 1.0 + i), (0.7 * i - 1 / 7, 1.0)] for i in range(4)]
    return table[rank::world_size]


def test_a_first_rank_that_nothing_reaches_is_named():
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]  # where nobody listens any more
    invitation = INVITATION.pack(port, bytes(TOKEN_BYTES))
    words = rf"rank 1 cannot reach rank 0 at {HOST}:{port}: .*refused; is a firewall between\?"
    with pytest.raises(ReplicaError, match=words):
        connect(1, 2, HOST, lambda _: invitation)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_gets_the_bits_of_one(on_ranks: Run, world_size: int):
    alone = Replica().mean(Booked.of(["a", "b"], rows_of(0, 1)), 0)

    def mean(replica: Replica) -> list[float]:
        booked = Booked.of(["a", "b"], rows_of(replica.rank, world_size))
        return [replica.mean(booked, step) for step in range(3)][-1]

    assert on_ranks(world_size, mean) == [alone] * world_size


@pytest.mark.parametrize(
    ("losses", "weight", "up", "down"),
    [
        ((6.75, 7.125), 1.0, 10, 6),
        ((6.900000095367432, 7.099999904632568), 1.0, 10, 10),  # as of a model: fp32
        ((6.900000095367432, 7.099999904632568), 77.0, 18, 14),
        ((1 / 3, 0.4), 1.0, 18, 16),
    ],
)
def test_bytes_a_step(
    on_ranks: Run, losses: tuple[float, float], weight: float, up: int, down: int
):
    """Two lanes, one micro-batch a rank; the shape goes before the first."""

    def sent(replica: Replica) -> tuple[int, int]:
        booked = Booked.of(["+", "-"], [[(loss, weight) for loss in losses]])
        for step in range(10):
            replica.mean(booked, step)
        return replica.bytes_sent, replica.step_bytes

    ups, downs = 10 * up + 4, 10 * down
    assert on_ranks(4, sent) == [(3 * downs, 3 * (ups + downs)), *3 * [(ups, ups + downs)]]


def test_ranks_may_change_the_shape_together(on_ranks: Run):
    """Evaluations lie between steps."""

    def means(replica: Replica) -> list[list[float]]:
        step = Booked.of(["+", "-"], [[(1.0, 1.0), (2.0, 1.0)]])
        looked = Booked.of(["loss"], [[(float(row), 1.0)] for row in range(3)])
        found = [replica.mean(booked, 4) for booked in (step, step, looked, step, looked)]
        assert replica.rank == 0 or replica.bytes_sent == 3 * 10 + 2 * 14 + 4 * 4
        return found

    assert on_ranks(3, means) == [[[1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0], [1.0]]] * 3


@pytest.mark.parametrize("alike", [1, 2])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_ranks_with_parts_of_the_columns_or_the_same(on_ranks: Run, alike: int, weight: float):
    """Two pairs: each rank of a pair a column, or both the same."""
    table = [[(0.1, 1.0), (0.7, weight)], [(1.3, weight), (1 / 3, 1.0)]]
    names = ["a", "b"] if alike == 1 else ["a"]
    rows = [[row[: len(names)]] for row in table]
    expected = sums_of([Booked.of(names, row) for row in rows], "step 0").means

    def mean(replica: Replica) -> list[float]:
        group, place = divmod(replica.rank, 2)
        column = place if alike == 1 else 0
        booked = Booked.of([names[column]], [[table[group][column]]])
        return replica.mean(booked, 0, names=names, alike=alike)

    assert on_ranks(4, mean) == [expected] * 4


def test_a_loss_that_is_not_finite_is_raised_alike_and_training_goes_on(on_ranks: Run):
    def diverge(replica: Replica) -> tuple[str, list[float]]:
        bad = float("nan") if replica.rank == 2 else 1.0
        with pytest.raises(DivergedError) as caught:
            replica.mean(Booked.of(["probe 0, +eps"], [[(bad, 1.0)]]), 5)
        return str(caught.value), replica.mean(Booked.of(["x"], [[(1.0, 1.0)]]), 5)

    found = on_ranks(3, diverge)
    assert len({message for message, _ in found}) == 1
    assert found[0][0].startswith("step 5: the loss is nan (probe 0, +eps, micro-batch 2)")
    assert [mean for _, mean in found] == [[1.0]] * 3


@pytest.mark.parametrize(
    ("rank", "rows", "step", "words"),
    [
        (1, 2, 7, r"rank 1 brought .* \(7, 2, 1\) where rank 0 has \(7, 1, 1\)"),
        (2, 1, 8, r"rank 2 brought .* \(8, 1, 1\) where rank 0 has \(7, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_ranks_out_of_step_are_named_on_every_rank(
    on_ranks: Run, rank: int, rows: int, step: int, words: str, later: bool
):
    def mean(replica: Replica) -> None:
        mine = replica.rank == rank
        usual = Booked.of(["x"], [[(1.0, 1.0)]])
        if later:
            replica.mean(usual, 6)
        booked = Booked.of(["x"], [[(1.0, 1.0)]] * (rows if mine else 1))
        replica.mean(booked, step if mine else 7)

    found = on_ranks(3, mean)
    assert all(isinstance(error, ReplicaError) for error in found)
    assert {str(error) for error in found} == {str(found[0])}
    with pytest.raises(ReplicaError, match=words):
        raise found[0]


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        (HEADER.pack(7 | SHORT), r"\(7, 0, 0\) where rank 0 has \(7, 1, 1\)"),
        (HEADER.pack(7 | SHAPED) + SHAPE.pack(65535, 65535), r"\(7, 65535, 65535\) where"),
    ],
)
def test_a_shape_that_was_never_sent_or_is_no_step_s_is_named(
    on_ranks: Run, begun: bytes, words: str
):
    """At once: nothing is waited for that such a message would have."""

    def mean(replica: Replica) -> None:
        if replica.rank:
            replica.link.send(0, begun)
            Sums.receive(partial(replica.link.receive, 0), 1, 1)
        replica.mean(Booked.of(["x"], [[(1.0, 1.0)]]), 7)

    for error in on_ranks(2, mean):
        with pytest.raises(ReplicaError, match=words):
            raise error


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_rank_that_leaves_is_noticed_by_all(on_ranks: Run, leaver: int):
    def mean(replica: Replica) -> Any:
        if replica.rank == leaver:
            replica.close()
            return None
        return replica.mean(Booked.of(["x"], [[(1.0, 1.0)]]), 0)

    found = on_ranks(3, mean)
    others = [error for rank, error in enumerate(found) if rank != leaver]
    assert all(isinstance(error, ReplicaError) for error in others)
    assert f"rank {leaver}" in str(others[0])


def test_differences_are_named_on_every_rank(on_ranks: Run):
    def compare(replica: Replica) -> str:
        value = "ab" if replica.rank in (1, 3) else "cd"
        with pytest.raises(ReplicaError) as caught:
            replica.refuse_differences(
                "the base weights", {"digest": value}, "load the same checkpoint"
            )
        return str(caught.value)

    (message,) = set(on_ranks(4, compare))
    assert message == (
        "the base weights of ranks 1, 3 differ from rank 0's (digest: ab, rank 0 has cd); "
        "load the same checkpoint"
    )


def test_bytes_of_any_size_are_gathered_and_shared(on_ranks: Run):
    data = bytes(range(256)) * 8000

    def both(replica: Replica) -> tuple[list[int], bool]:
        sizes = [len(each) for each in replica.gather(data * replica.rank)]
        replica.wait_for_all()
        return sizes, replica.share(lambda: data) == data

    found = on_ranks(3, both)
    assert found == [([0, len(data), 2 * len(data)], True), ([], True), ([], True)]


def test_what_rank_0_cannot_make_every_rank_is_told(on_ranks: Run):
    def make() -> bytes:
        raise ConfigError("no such file")

    found = on_ranks(3, lambda replica: replica.share(make))
    assert [(type(error), str(error)) for error in found] == [(ConfigError, "no such file")] * 3


def test_who_does_not_know_the_token_is_turned_away():
    board = Board(2)
    intruded = threading.Event()

    def share(data: bytes) -> bytes:
        port, token = INVITATION.unpack(data)
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", GREETING.pack(token[::-1], 1), b""):
            with socket.create_connection((HOST, port), timeout=10) as intruder:
                intruder.sendall(greeting)
                intruder.shutdown(socket.SHUT_WR)
        intruded.set()
        return board.first(data)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect, 0, 2, HOST, share)
        second = pool.submit(connect, 1, 2, HOST, board.other)
        links = [first.result(), second.result()]
    assert intruded.is_set()
    links[1].send(0, b"hello")
    assert links[0].receive(1, 5) == b"hello"
    for link in links:
        link.close()


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "CONNECT_SECONDS", 0.1)
    with pytest.raises(ReplicaError, match="ranks 1, 2 did not connect within 0 s"):
        connect(0, 3, HOST, lambda data: data)


def test_more_ranks_than_a_shell_allows_files(few_files: int, monkeypatch: pytest.MonkeyPatch):
    """All ranks are in this process, so a connection is two of its files."""
    monkeypatch.setattr(sockets, "SPARE_FILES", few_files + 2 * 20)
    for link in connected(20):
        link.close()


def test_a_limit_that_may_not_be_raised_is_named(few_files: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "_allow_files", lambda count: None)
    words = r"can take no more \(Too many open files; this process may have \d+ files open\); raise"
    with socket.socket() as other, pytest.raises(ReplicaError, match=words):
        connect(0, 3, HOST, lambda data: _connect_and_fill(other, data))


def _connect_and_fill(other: socket.socket, invitation: bytes) -> bytes:
    """Another connects, and then every file that this process may open is open."""
    other.connect((HOST, INVITATION.unpack(invitation)[0]))
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (other.fileno(), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    return invitation


@pytest.fixture
def few_files() -> Iterator[int]:
    """A limit that leaves room for twenty more; which is given."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    most = [number for number in range(len(taken) + 20) if number not in taken][19] + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_announced_size_is_bounded(on_ranks: Run):
    def lie(replica: Replica) -> Any:
        if replica.rank:
            replica.link.send(0, struct.pack("<Q", 1 << 60))
            return None
        return replica.gather(b"")

    error = on_ranks(2, lie)[0]
    assert isinstance(error, ReplicaError)
    assert "rank 1 announced" in str(error)


@pytest.mark.parametrize("leaver", [1, 2, 3])
@pytest.mark.parametrize("call", ["mean", "share", "gather"])
def test_every_rank_names_the_one_that_was_lost(on_ranks: Run, leaver: int, call: str):
    """And not rank 0, which leaves because of it."""

    def work(replica: Replica) -> None:
        if replica.rank == leaver:
            replica.close()
        elif call == "mean":
            replica.mean(Booked.of(["a", "b"], [[(1.0, 1.0), (1.0, 1.0)]]), 0)
        else:
            replica.gather(b"mine")
            replica.share(lambda: b"ours")

    found = on_ranks(4, work)
    del found[leaver]
    assert [type(error) for error in found] == [LostRankError] * 3
    assert {str(error) for error in found} == {str(found[0])}
    assert str(found[0]).startswith(f"rank 0 lost rank {leaver} ({HOST}: ")
    assert not any(error.is_told for error in found)  # each says it


def test_a_rank_that_was_busy_learns_what_rank_0_said_before_it_left(on_ranks: Run):
    """Rank 0 closes on what rank 1 has sent unread, and rank 1 is about to send more."""
    sent, has_left = threading.Event(), threading.Event()

    def work(replica: Replica) -> None:
        if replica.rank == 2:
            replica.close()
        elif replica.rank == 1:
            replica.link.send(0, b"unread")
            sent.set()
            assert has_left.wait(30)
            replica.gather(bytes(10_000_000))
        else:
            assert sent.wait(30)
            try:
                replica.link.receive(2, 1)
            finally:
                has_left.set()

    first, second, _ = on_ranks(3, work)
    assert isinstance(second, LostRankError)
    assert str(second) == str(first)
    assert str(first).startswith("rank 0 lost rank 2 (127.0.0.1: ")


def test_what_was_sent_to_a_host_that_vanished_is_given_up_in_half_a_minute():
    links = connected(2)
    for link in links:
        for peer in link._peers.values():
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        link.close()


def test_a_forked_process_does_not_keep_a_dead_rank_s_connection_open():
    first, second = connected(2)
    child = os.fork()
    if not child:  # lives on when the rank has gone
        time.sleep(30)
        os._exit(0)
    try:
        for peer in second._peers.values():
            peer.close()  # as the system does for a process that is killed
        began = time.monotonic()
        with pytest.raises(LostRankError, match="its connection is closed"):
            first.receive(1, 1)
        assert time.monotonic() - began < 10
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        first.close()


@pytest.mark.parametrize("busy", [0, 1])
def test_what_is_large_waits_for_a_rank_that_is_busy(
    on_ranks: Run, busy: int, monkeypatch: pytest.MonkeyPatch
):
    """A kernel gives up on one that takes nothing; here after one second."""
    monkeypatch.setattr(sockets, "KEEPALIVE", (*sockets.KEEPALIVE, (socket.TCP_USER_TIMEOUT, 1000)))
    data = bytes(30_000_000)

    def work(replica: Replica) -> int:
        if replica.rank == busy:
            time.sleep(4)
        gathered = replica.gather(data)
        if replica.rank == busy:
            time.sleep(4)
        return len(replica.share(lambda: gathered[1]))

    assert on_ranks(2, work) == [len(data)] * 2


def test_who_is_waited_for_is_told_and_given_up_at_last(
    on_ranks: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sockets, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(patience, "FIRST_NOTICE_SECONDS", 0.2)
    given_up = threading.Event()

    def work(replica: Replica) -> None:
        replica.link.timeout = 1.0
        if replica.rank:
            assert given_up.wait(30)
            return
        try:
            replica.gather(b"")
        finally:
            given_up.set()

    error, _ = on_ranks(2, work)
    assert isinstance(error, LostRankError)
    assert str(error) == "rank 0 lost rank 1 (127.0.0.1: silent for 1 s); look at its output"
    assert {record.getMessage() for record in caplog.records} == {
        "waiting for rank 1 at 127.0.0.1 since 0 minutes"
    }
    assert 1 <= len(caplog.records) <= 3  # at 0.2, 0.4 and 0.8 s


@pytest.mark.parametrize(
    ("host", "at", "elsewhere"),
    [("127.0.0.1", "127.0.0.1", False), ("127.0.1.1", "127.0.1.1", True), ("::1", "::1", False)],
)
def test_a_name_that_means_loopback_here_is_listened_for_at_every_address(
    host: str, at: str, elsewhere: bool
):
    """As hosts call themselves 127.0.1.1; others reach such a host at another address."""
    with sockets._listen(host) as listener:
        port = listener.getsockname()[1]
        socket.create_connection((at, port), timeout=10).close()
        reached = True
        try:
            socket.create_connection(("127.0.0.3", port), timeout=10).close()
        except OSError:
            reached = False
        assert reached is elsewhere
