"""The desk of the rank that asks a disk: its answers are those to what was asked, or an error."""

import errno
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from offload.test_staged import Files, buffers, unit
from zo_offload.errors import ReplicaError, StoreError
from zo_offload.offload.desk import Desk, Guest
from zo_offload.offload.staged import Buffer, Staged
from zo_offload.units import Unit

UNITS = {index: unit(index) for index in range(3)}


class Failing(Staged):
    """A store that reads nothing ahead."""

    def expect(self, unit: Unit, whole: bool) -> None:
        raise StoreError("an earlier write failed")


@pytest.fixture
def room() -> list[Buffer]:
    return buffers(4)


@pytest.fixture
def desk(room: list[Buffer]) -> Iterator[Desk]:
    desk = Desk(Failing(Files(), room, for_several=True), room, UNITS)
    yield desk
    desk.close()


def test_what_could_not_be_read_ahead_is_said_once_and_later_answers_are_right(
    desk: Desk, room: list[Buffer]
):
    guest = Guest(desk.address, room, (0, 1), read_ahead=2)
    for _ in range(2):
        guest.expect(UNITS[2], whole=True)
    with pytest.raises(StoreError, match="an earlier write failed"):
        guest.lend(UNITS[0])
    for index in (1, 2):
        lease = guest.lend(UNITS[index])
        (held,) = [each for each in room if each.unit == index]
        assert lease.wire.data_ptr() == held.wire.data_ptr()
        assert held.lent == 1
        lease.end()
        assert held.lent == 0
    guest.close()


def test_a_desk_that_can_take_no_more_connections_leaves_nobody_waiting(
    room: list[Buffer], monkeypatch: pytest.MonkeyPatch
):
    def accept(listener: socket.socket) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket.socket, "accept", accept)
    desk = Desk(Failing(Files(), room, for_several=True), room, UNITS)
    with (
        pytest.raises(ReplicaError, match="rank 1 lost rank 0, which asks the disks"),
        closing(Guest(desk.address, room, (0, 1), read_ahead=2)) as guest,
    ):
        guest.lend(UNITS[0])
    desk.close()
