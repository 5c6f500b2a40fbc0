"""One rank of a machine asks its disks, for all of them: a desk with a counter a rank.

The staging buffers lie in memory that the ranks share, so that what crosses the desk is small:
which unit is wanted, and the number of the buffer that holds it. A rank that has changed what was
lent says so when it gives it back, and the desk writes it.

Where the desk listens has no name in any file system; it serves processes of its own user alone.
"""

import os
import secrets
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock

import torch

from zo_offload.errors import ReplicaError, StoreError, ZOError
from zo_offload.offload.staged import Buffer, FirstValues, Staged, StagedLease, parts_of
from zo_offload.offload.store import Lease, Unlocked
from zo_offload.units import Unit

LEND, FRESH, EXPECT, SETTLE, END = range(5)
REQUEST = struct.Struct("<Biqq")  # what; unit; whether the whole, or steps; number of the lease
ANSWER = struct.Struct("<?qqq")  # done; lease, buffer, whether it was made; or length of a text
NOT_CHANGED = -1
CREDENTIALS = struct.Struct("3i")  # process, user, group


class Desk:
    """Lends units of a disk to other ranks.

    Args:
        staged: The store; its buffers are shared.
        buffers: They, by number.
        units: By index.
    """

    def __init__(
        self, staged: Staged, buffers: Sequence[Buffer], units: Mapping[int, Unit]
    ) -> None:
        self._staged, self._buffers, self._units = staged, list(buffers), units
        self._listener = socket.socket(socket.AF_UNIX)
        self.address = f"zo_offload-{secrets.token_hex(16)}"
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        self._guests: list[socket.socket] = []
        threading.Thread(target=self._receive, name="zo-desk", daemon=True).start()

    def close(self) -> None:
        """Serve nobody any more."""
        for each in (self._listener, *self._guests):
            with suppress(OSError):  # it has left
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _receive(self) -> None:
        while True:
            try:
                guest, _ = self._listener.accept()
            except OSError:
                self._listener.close()  # it was, or no more can be had: nobody waits for an answer
                return
            raw = guest.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            if CREDENTIALS.unpack(raw)[1] != os.getuid():
                guest.close()
                continue
            self._guests.append(guest)
            name = f"zo-counter-{len(self._guests)}"
            threading.Thread(target=self._serve, args=(guest,), name=name, daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        """Until the rank leaves; what it had is given back unchanged, and nothing lent any more."""
        leases: dict[int, StagedLease] = {}
        owed = b""  # a failure to read ahead, which the rank does not wait for
        try:
            while (request := _receive(guest, REQUEST.size)) is not None:
                what, *rest = REQUEST.unpack(request)
                try:
                    answer = (owed if what != END else b"") or self._answer(leases, what, *rest)
                except (ZOError, OSError) as error:
                    text = str(error).encode()
                    answer = ANSWER.pack(False, len(text), 0, 0) + text
                if what == EXPECT:
                    owed = answer
                    continue
                owed = owed if what == END else b""
                guest.sendall(answer)
        except OSError:
            pass  # it has left
        finally:
            guest.close()  # whatever has happened here, nobody waits for an answer
            if leases:  # steps that it took are counted, and may be on no disk
                self._staged.refuse(
                    ReplicaError(
                        "a rank of this machine left with a unit of its disk; look at the ranks' "
                        "output, and start the same command again"
                    )
                )
            for lease in leases.values():
                lease.end()

    def _answer(
        self, leases: dict[int, StagedLease], what: int, index: int, value: int, number: int
    ) -> bytes:
        if what == EXPECT:
            self._staged.expect(self._units[index], bool(value))
            return b""
        if what == SETTLE:
            leases[number].settle()
            return ANSWER.pack(True, 0, 0, 0)
        if what == END:
            lease = leases.pop(number)
            if value != NOT_CHANGED:
                lease.keep(value)
            lease.end()
            return ANSWER.pack(True, 0, 0, 0)
        unit = self._units[index]
        lent = self._staged.fresh(unit) if what == FRESH else self._staged.lend(unit, bool(value))
        assert isinstance(lent, StagedLease)
        leases[number] = lent
        return ANSWER.pack(True, number, self._buffers.index(lent.buffer), lent.is_made)


class Guest:
    """A store of units on a disk that another rank's desk asks.

    Args:
        address: Of the desk.
        buffers: Its staging memory, by number.
        ranks: Whose desk it is, and this one.
        read_ahead: As the desk's store.
    """

    def __init__(
        self, address: str, buffers: Sequence[Buffer], ranks: tuple[int, int], read_ahead: int
    ) -> None:
        self._buffers, self._ranks = list(buffers), ranks
        self.read_ahead = read_ahead
        self._bases: dict[int, FirstValues] = {}
        self._asking, self._sending = Lock(), Lock()
        self._next = 0
        self._desk = socket.socket(socket.AF_UNIX)
        try:
            self._desk.connect(f"\0{address}")
        except OSError as error:
            self._desk.close()
            raise self._lost(error) from error

    def add(self, unit: Unit, base: FirstValues) -> None:
        """Keep what a unit came with, until the desk has the unit on the disk."""
        self._bases[unit.index] = base

    def base_of(self, unit: Unit) -> FirstValues | None:
        """What a unit came with, while that is kept."""
        return self._bases.get(unit.index)

    def let_base_go(self, unit: Unit) -> None:
        """The unit is on the disk."""
        self._bases.pop(unit.index, None)

    def forget(self) -> None:
        """Nothing is kept here."""

    def expect(self, unit: Unit, whole: bool) -> None:
        """See :class:`Store`."""
        self._send(EXPECT, unit.index, whole, 0)

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """See :class:`Store`.

        Raises:
            StoreError: As on the rank that asks the disk.
            ReplicaError: That rank has left.
        """
        return self._borrow(LEND, unit, whole)

    def fresh(self, unit: Unit) -> Lease:
        """See :class:`Store`."""
        return self._borrow(FRESH, unit, True)

    def settle(self, number: int) -> None:
        """Wait for what is on its way to the disk of a lease."""
        self._ask(SETTLE, 0, 0, number)

    def give_back(self, number: int, unit: Unit, step: int | None) -> None:
        """End a lease; ``step`` where it was changed."""
        if step is not None:
            self.let_base_go(unit)
        self._ask(END, unit.index, NOT_CHANGED if step is None else step, number)

    def close(self) -> None:
        """Leave the desk."""
        self._desk.close()

    def _borrow(self, what: int, unit: Unit, whole: bool) -> "GuestLease":
        with self._sending:
            self._next += 1
            number = self._next
        number, buffer, is_made = self._ask(what, unit.index, whole, number)
        if not is_made:
            self.let_base_go(unit)
        return GuestLease(self, unit, number, self._buffers[buffer], bool(is_made))

    def _ask(self, *request: int) -> tuple[int, int, int]:
        with self._asking:
            self._send(*request)
            try:
                answer = _receive(self._desk, ANSWER.size)
                if answer is None:
                    raise ConnectionResetError("its connection is closed")
                done, *rest = ANSWER.unpack(answer)
                text = b"" if done else _receive(self._desk, rest[0])
            except OSError as error:
                raise self._lost(error) from error
        if not done:
            raise StoreError((text or b"").decode())
        return rest[0], rest[1], rest[2]

    def _send(self, *request: int) -> None:
        try:
            with self._sending:
                self._desk.sendall(REQUEST.pack(*request))
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> ReplicaError:
        leader, rank = self._ranks
        return ReplicaError(
            f"rank {rank} lost rank {leader}, which asks the disks of this machine ({error}); look "
            "at its output"
        )


class GuestLease(Unlocked):
    """A unit in a buffer of the desk's."""

    def __init__(
        self, guest: Guest, unit: Unit, number: int, buffer: Buffer, is_made: bool
    ) -> None:
        self.is_made = is_made
        self.wire, self.rest = parts_of(unit, buffer)
        self._guest, self._unit, self._number = guest, unit, number
        self._step: int | None = None

    def spare_wire(self) -> torch.Tensor:
        """Never asked for: a rank has room of its own."""
        raise AssertionError("the desk's buffers are for what rests on the disk")

    def spare_rest(self) -> torch.Tensor:
        """Likewise."""
        return self.spare_wire()

    def settle(self) -> None:
        """See :class:`Lease`."""
        self._guest.settle(self._number)

    def keep(self, step: int) -> None:
        """See :class:`Lease`."""
        self._step = step

    def end(self, after: "torch.Event | None" = None) -> None:
        """See :class:`Lease`; an event means nothing in the other process, so it is waited for."""
        if after is not None:
            after.synchronize()
        self._guest.give_back(self._number, self._unit, self._step)


def _receive(connection: socket.socket, size: int) -> bytes | None:
    """Exactly so many bytes; None where the other side has left."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
