"""Units that rest on a disk, lent in staging buffers of host memory.

A buffer holds one unit, or its wire alone. Units that are announced (:meth:`Staged.expect`) are
read ahead into buffers that nobody needs; a unit that was changed is written from its buffer once
it is given back, while others are lent. What a buffer holds may be lent again without reading it.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from zo_offload.offload.store import Lease
from zo_offload.units import Unit

LEAST_BUFFERS = 3  # one is lent, one holds a copy made of it, one is read or written meanwhile


class UnitFiles(Protocol):
    """Where units rest between leases; see :class:`zo_offload.offload.nvme.NvmeStore`."""

    def read(self, unit: int, wire: torch.Tensor, rest: torch.Tensor | None) -> "Future[int]":
        """Fill the buffers; the future holds the number of steps that they carry."""
        ...

    def write(self, unit: int, wire: torch.Tensor, rest: torch.Tensor, step: int) -> "Future[None]":
        """Keep the buffers' content; they must stay as they are until the future is done."""
        ...


@dataclass(eq=False)
class Buffer:
    """Room for one unit.

    Attributes:
        wire: Of the largest unit, page-aligned.
        rest: The same.
        unit: Index of the unit that it holds, or is about to.
        whole: Whether it holds the rest, too.
        arrival: The read that fills it.
        departure: The write that empties it.
        lent: Whether somebody works on it.
        after: Event until which a device may be reading it.
        used: When it was last asked for, in a count of its own.
    """

    wire: torch.Tensor
    rest: torch.Tensor
    unit: int | None = None
    whole: bool = False
    arrival: "Future[int] | None" = None
    departure: "Future[None] | None" = None
    lent: bool = False
    after: "torch.Event | None" = None
    used: int = 0

    @property
    def busy(self) -> bool:
        """Whether a write has not ended."""
        return self.departure is not None and not self.departure.done()

    def settle(self) -> None:
        """Until nothing reads or writes it any more.

        Raises:
            StoreError: A read or a write has failed.
        """
        arrival, departure, after = self.arrival, self.departure, self.after
        self.arrival = self.departure = self.after = None
        try:
            if arrival is not None:
                arrival.result()
            if departure is not None:
                departure.result()
        except BaseException:
            self.unit = None
            raise
        if after is not None:
            after.synchronize()


class StagedLease:
    """A unit in a staging buffer."""

    def __init__(self, staged: "Staged", unit: Unit, buffer: Buffer) -> None:
        self.wire, self.rest = _parts(unit, buffer)
        self._staged, self._unit, self._buffer = staged, unit, buffer
        self._copy: Buffer | None = None
        self._step: int | None = None

    def spare_wire(self) -> torch.Tensor:
        """See :class:`Lease`."""
        return _parts(self._unit, self._spare())[0]

    def spare_rest(self) -> torch.Tensor:
        """See :class:`Lease`."""
        return _parts(self._unit, self._spare())[1]

    def keep(self, step: int) -> None:
        """See :class:`Lease`."""
        self._step = step

    def end(self, after: "torch.Event | None" = None) -> None:
        """See :class:`Lease`; what was changed is written from now on."""
        if self._copy is not None:
            self._staged.release(self._copy, after)
            self._copy = None
        self._staged.take_back(self._unit, self._buffer, self._step, after)

    def _spare(self) -> Buffer:
        if self._copy is None:
            self._copy = self._staged.take_room()
        return self._copy


class Staged:
    """A store of units that rest on a disk.

    Args:
        files: Where they rest.
        units: Which, by index.
        buffers: The staging memory, at least ``LEAST_BUFFERS``.
    """

    def __init__(
        self, files: UnitFiles, units: Mapping[int, Unit], buffers: Sequence[Buffer]
    ) -> None:
        assert len(buffers) >= LEAST_BUFFERS
        self._files = files
        self._units = units
        self._buffers = list(buffers)
        self._choosing = Lock()  # of buffers: the trainer announces while the pipeline works
        self._count = 0
        self.reads = self.hits = 0

    @property
    def read_ahead(self) -> int:
        """Units that can be read while one is worked on and one is written."""
        return len(self._buffers) - 2

    def add(self, unit: Unit) -> None:
        """Room is made in the files."""

    def expect(self, unit: Unit, whole: bool) -> None:
        """Start to read a unit, where a buffer is free."""
        with self._choosing:
            if self._holding(unit.index, whole) is not None:
                return
            free = [b for b in self._buffers if not (b.lent or b.busy or _unclaimed(b))]
            if len(free) > 1:  # the last one is for whoever cannot wait
                self._fetch(min(free, key=_age), unit, whole)

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """See :class:`Store`.

        Raises:
            StoreError: It cannot be read, or an earlier write has failed.
        """
        with self._choosing:
            buffer = self._holding(unit.index, whole)
            if buffer is None:
                buffer = self._room()
                self._fetch(buffer, unit, whole)
            else:
                self.hits += 1
            self._claim(buffer)
        try:
            buffer.settle()
        except BaseException:
            buffer.lent = False
            raise
        return StagedLease(self, unit, buffer)

    def fresh(self, unit: Unit) -> Lease:
        """A buffer to fill anew; its padding is zero."""
        buffer = self.take_room()
        with self._choosing:
            self._let_go(unit, buffer)
            buffer.unit, buffer.whole = unit.index, True
        lease = StagedLease(self, unit, buffer)
        lease.wire.zero_()
        lease.rest.zero_()
        return lease

    def take_room(self) -> Buffer:
        """A buffer that holds nothing."""
        with self._choosing:
            buffer = self._room()
            buffer.settle()
            buffer.unit = None
            self._claim(buffer)
        return buffer

    def release(self, buffer: Buffer, after: "torch.Event | None") -> None:
        """Nobody works on the buffer any more, but for a device until an event."""
        buffer.after = after
        buffer.lent = False

    def take_back(
        self, unit: Unit, buffer: Buffer, step: int | None, after: "torch.Event | None"
    ) -> None:
        """Write what was changed, which carries ``step`` steps now."""
        if step is not None:
            buffer.departure = self._files.write(unit.index, *_parts(unit, buffer), step)
        self.release(buffer, after)

    def forget(self) -> None:
        """The files hold something else now."""
        self.drain()
        for buffer in self._buffers:
            buffer.unit = None

    def drain(self) -> None:
        """Until all that was changed is written.

        Raises:
            StoreError: A write has failed.
        """
        for buffer in self._buffers:
            buffer.settle()

    def _holding(self, unit: int, whole: bool) -> Buffer | None:
        found = [b for b in self._buffers if b.unit == unit and (b.whole or not whole)]
        return found[0] if found else None

    def _room(self) -> Buffer:
        """The buffer that is missed least; somebody may have to wait for it."""
        free = [b for b in self._buffers if not b.lent]
        assert free, "more buffers are lent than a pipeline needs"
        ready = [b for b in free if not b.busy]
        settled = [b for b in ready if not _unclaimed(b)]
        return min(settled or ready or free, key=_age)

    def _claim(self, buffer: Buffer) -> None:
        self._count += 1
        buffer.lent, buffer.used = True, self._count

    def _fetch(self, buffer: Buffer, unit: Unit, whole: bool) -> None:
        buffer.settle()
        self._let_go(unit, buffer)
        self._count += 1
        self.reads += 1
        buffer.unit, buffer.whole, buffer.used = unit.index, whole, self._count
        wire, rest = _parts(unit, buffer)
        buffer.arrival = self._files.read(unit.index, wire, rest if whole else None)

    def _let_go(self, unit: Unit, buffer: Buffer) -> None:
        """Of a unit there is one buffer, and what it held before is in its place by now."""
        for each in self._buffers:
            if each.unit == unit.index and each is not buffer:
                each.settle()
                each.unit = None


def _parts(unit: Unit, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
    return buffer.wire[: unit.wire_bytes], buffer.rest[: unit.rest_bytes]


def _unclaimed(buffer: Buffer) -> bool:
    """Whether it was read ahead and not yet asked for."""
    return buffer.arrival is not None


def _age(buffer: Buffer) -> int:
    return buffer.used
