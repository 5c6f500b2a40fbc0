"""Units that rest on a disk, lent in staging buffers of host memory.

A buffer holds one unit, or its wire alone. Units that are announced (:meth:`Staged.expect`) are
read ahead into buffers that nobody needs; a unit that was changed is written from its buffer once
it is given back, while others are lent. What a buffer holds may be lent again without reading it.

A unit that has never been written is made from its base: the values that the model came with, which
are let go once the unit is on the disk.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import Protocol

import torch

from zo_offload.errors import ReplicaError, StoreError
from zo_offload.offload.disk import aligned, padded
from zo_offload.offload.slot import StoredUnit
from zo_offload.offload.store import Lease, Unlocked
from zo_offload.units import Unit

LEAST_BUFFERS = 3  # one is lent, one holds a copy made of it, one is read or written meanwhile


class UnitFiles(Protocol):
    """Where units rest between leases; see :class:`zo_offload.offload.run_files.RunFiles`."""

    def holds(self, unit: int) -> bool:
        """Whether the unit has been written."""
        ...

    def carries(self, unit: int) -> int:
        """Steps that it carries there, or will when it is written."""
        ...

    def close(self) -> None:
        """Nothing is asked for any more."""
        ...

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
        expects: Steps that what is read should carry.
        arrival: The read that fills it.
        departure: The write that empties it.
        lent: How many work on it: of ranks that share it, each may.
        after: Event until which a device may be reading it.
        used: When it was last asked for, in a count of its own.
    """

    wire: torch.Tensor
    rest: torch.Tensor
    unit: int | None = None
    whole: bool = False
    expects: int = 0
    arrival: "Future[int] | None" = None
    departure: "Future[None] | None" = None
    lent: int = 0
    after: "torch.Event | None" = None
    used: int = 0
    settling: Lock = field(default_factory=Lock)

    @property
    def busy(self) -> bool:
        """Whether a write has not ended."""
        return self.departure is not None and not self.departure.done()

    def settle(self) -> None:
        """Until nothing reads or writes it any more.

        Raises:
            StoreError: A read or a write has failed.
        """
        with self.settling:
            self._settle()

    def _settle(self) -> None:
        arrival, departure, after = self.arrival, self.departure, self.after
        self.arrival = self.departure = self.after = None
        try:
            if arrival is not None and (found := arrival.result()) != self.expects:
                raise StoreError(
                    f"unit {self.unit}: the disk has it after {found:,} steps, {self.expects:,} "
                    "were to be written: an earlier write failed; start the same command again"
                )
            if departure is not None:
                departure.result()
        except BaseException:
            self.unit = None
            raise
        if after is not None:
            after.synchronize()


class StagedLease(Unlocked):
    """A unit in a staging buffer."""

    def __init__(self, staged: "Staged", unit: Unit, buffer: Buffer, is_made: bool = False) -> None:
        self.is_made = is_made
        self.wire, self.rest = parts_of(unit, buffer)
        self._staged, self._unit, self.buffer = staged, unit, buffer
        self._copy: Buffer | None = None
        self._step: int | None = None

    def spare_wire(self) -> torch.Tensor:
        """See :class:`Lease`."""
        return parts_of(self._unit, self._spare())[0]

    def spare_rest(self) -> torch.Tensor:
        """See :class:`Lease`."""
        return parts_of(self._unit, self._spare())[1]

    def settle(self) -> None:
        """See :class:`Lease`."""
        self.buffer.settle()

    def keep(self, step: int) -> None:
        """See :class:`Lease`."""
        self._step = step

    def end(self, after: "torch.Event | None" = None) -> None:
        """See :class:`Lease`; what was changed is written from now on."""
        if self._copy is not None:
            self._staged.release(self._copy, after)
            self._copy = None
        self._staged.take_back(self._unit, self.buffer, self._step, after)

    def _spare(self) -> Buffer:
        if self._copy is None:
            self._copy = self._staged.take_room()
        return self._copy


# Writes what a unit came with to its zeroed wire and rest.
FirstValues = Callable[[torch.Tensor, torch.Tensor], None]


class Staged:
    """A store of units that rest on a disk.

    Args:
        files: Where they rest.
        buffers: The staging memory, at least ``LEAST_BUFFERS``.
        for_several: Whether ranks of a machine share it; they may have to wait for each other.
    """

    def __init__(
        self, files: UnitFiles, buffers: Sequence[Buffer], for_several: bool = False
    ) -> None:
        assert len(buffers) >= LEAST_BUFFERS
        self._files = files
        self._buffers = list(buffers)
        self._for_several = for_several
        self._bases: dict[int, FirstValues] = {}
        self._choosing = Condition()  # of buffers: the trainer announces while the pipeline works
        self._refusal: ReplicaError | None = None
        self._count = 0
        self.reads = self.hits = 0

    @property
    def read_ahead(self) -> int:
        """Units that can be read while one is worked on and one is written."""
        return len(self._buffers) - 2

    def add(self, unit: Unit, base: FirstValues) -> None:
        """Take a unit over, with what it came with."""
        self._bases[unit.index] = base

    def base_of(self, unit: Unit) -> FirstValues | None:
        """What a unit came with, while it is not on the disk."""
        return self._bases.get(unit.index)

    def let_base_go(self, unit: Unit) -> None:
        """The unit is on the disk."""
        self._bases.pop(unit.index, None)

    def expect(self, unit: Unit, whole: bool) -> None:
        """Start to read a unit, where a buffer is free."""
        with self._choosing:
            if self._holding(unit.index, whole) or not self._files.holds(unit.index):
                return
            free = [b for b in self._buffers if not (b.lent or b.busy or _unclaimed(b))]
            if len(free) > 1:  # the last one is for whoever cannot wait
                self._fetch(min(free, key=_age), unit, whole)

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """See :class:`Store`.

        Raises:
            StoreError: It cannot be read, or an earlier write has failed.
        """
        while True:
            buffer = self._claimed(unit, whole)
            try:
                buffer.settle()
            except BaseException:
                self.release(buffer, None)
                raise
            if buffer.unit == unit.index:
                return StagedLease(self, unit, buffer, is_made=not self._files.holds(unit.index))
            self.release(buffer, None)  # the read has failed, and was another rank's to tell

    def _claimed(self, unit: Unit, whole: bool) -> Buffer:
        """A buffer that holds the unit, or is about to."""
        with self._choosing:
            self._check()
            buffer = self._holding(unit.index, whole)
            while buffer is None and self._is_full():
                self._choosing.wait()
                self._check()
                buffer = self._holding(unit.index, whole)
            if buffer is None:
                buffer = self._room()
                self._fetch(buffer, unit, whole)
            else:
                self.hits += 1
            self._claim(buffer)
            return buffer

    def fresh(self, unit: Unit) -> Lease:
        """A buffer to fill anew; its padding is zero."""
        buffer = self.take_room()
        with self._choosing:
            self._let_go(unit, buffer)
            buffer.unit, buffer.whole = unit.index, True
        buffer.wire.zero_()
        buffer.rest.zero_()
        return StagedLease(self, unit, buffer)

    def take_room(self) -> Buffer:
        """A buffer that holds nothing."""
        with self._choosing:
            self._check()
            while self._is_full():
                self._choosing.wait()
                self._check()
            buffer = self._room()
            buffer.settle()
            buffer.unit = None
            self._claim(buffer)
        return buffer

    def release(self, buffer: Buffer, after: "torch.Event | None") -> None:
        """Nobody works on the buffer any more, but for a device until an event."""
        with self._choosing:
            buffer.after = after or buffer.after
            buffer.lent -= 1
            self._choosing.notify_all()

    def take_back(
        self, unit: Unit, buffer: Buffer, step: int | None, after: "torch.Event | None"
    ) -> None:
        """Write what was changed, which carries ``step`` steps now."""
        try:
            if step is not None:
                with self._choosing:  # files are asked by one at a time
                    self.let_base_go(unit)
                    buffer.departure = self._files.write(unit.index, *parts_of(unit, buffer), step)
        finally:
            self.release(buffer, after)

    def refuse(self, error: ReplicaError) -> None:
        """Lend nothing any more: what units carry is no longer what the files hold."""
        with self._choosing:
            self._refusal = self._refusal or error
            self._choosing.notify_all()

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

    def close(self) -> None:
        """Write what is to be written, and close the files."""
        try:
            self.drain()
        finally:
            self._files.close()

    def _check(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _holding(self, unit: int, whole: bool) -> Buffer | None:
        found = [b for b in self._buffers if b.unit == unit and (b.whole or not whole)]
        return found[0] if found else None

    def _is_full(self) -> bool:
        """Whether every buffer is lent, so that one must wait for other ranks."""
        full = all(buffer.lent for buffer in self._buffers)
        assert self._for_several or not full, "more buffers are lent than a pipeline needs"
        return full

    def _room(self) -> Buffer:
        """The buffer that is missed least; somebody may have to wait for it."""
        free = [b for b in self._buffers if not b.lent]
        ready = [b for b in free if not b.busy]
        settled = [b for b in ready if not _unclaimed(b)]
        return min(settled or ready or free, key=_age)

    def _claim(self, buffer: Buffer) -> None:
        self._count += 1
        buffer.lent += 1
        buffer.used = self._count

    def _fetch(self, buffer: Buffer, unit: Unit, whole: bool) -> None:
        """Begin to read a unit, or make it of its base."""
        buffer.settle()
        self._let_go(unit, buffer)
        self._count += 1
        buffer.used, buffer.unit = self._count, None
        if not self._files.holds(unit.index):
            buffer.wire.zero_()
            buffer.rest.zero_()
            self._bases[unit.index](*parts_of(unit, buffer))
            buffer.unit, buffer.whole = unit.index, True
            return
        self.reads += 1
        buffer.unit, buffer.whole = unit.index, whole
        buffer.expects = self._files.carries(unit.index)
        wire, rest = parts_of(unit, buffer)
        buffer.arrival = self._files.read(unit.index, wire, rest if whole else None)

    def _let_go(self, unit: Unit, buffer: Buffer) -> None:
        """Of a unit there is one buffer, and what it held before is in its place by now."""
        for each in self._buffers:
            if each.unit == unit.index and each is not buffer:
                each.settle()
                each.unit = None


def parts_of(unit: Unit, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
    """Wire and rest of a unit in a buffer."""
    return buffer.wire[: unit.wire_bytes], buffer.rest[: unit.rest_bytes]


def _unclaimed(buffer: Buffer) -> bool:
    """Whether it was read ahead and not yet asked for."""
    return buffer.arrival is not None


def _age(buffer: Buffer) -> int:
    return buffer.used


def num_staged(num_slots: int) -> int:
    """Staging buffers for a pipeline of so many slots."""
    return max(LEAST_BUFFERS, num_slots + 2)


def make_buffers(units: Collection[Unit], num_slots: int, pin_memory: bool) -> list[Buffer]:
    """Staging memory for these units."""
    wire, rest = largest(units)
    return [
        Buffer(aligned(wire, pin_memory), aligned(rest, pin_memory))
        for _ in range(num_staged(num_slots))
    ]


def staged_bytes(units: Collection[Unit]) -> int:
    """Host memory of one buffer."""
    return sum(padded(size) for size in largest(units)) if units else 0


def stored(unit: Unit) -> StoredUnit:
    """A unit, as files know it."""
    parts = [
        (s.name, s.shape, s.start, str(span.dtype), span.format, span.trainable)
        + ((s.offset,) if s.offset else ())
        + ((span.codec,) if span.rests_packed else ())
        for span, s in unit.segments
    ]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return StoredUnit(unit.index, unit.name, unit.wire_bytes, unit.rest_bytes, digest)


def largest(units: Collection[Unit]) -> tuple[int, int]:
    """Bytes of the largest wire, and of the largest rest."""
    return max(unit.wire_bytes for unit in units), max(unit.rest_bytes for unit in units)
