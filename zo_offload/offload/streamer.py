"""The pipeline that keeps units in flight between host and device.

A unit is asked for, at some step, when lanes stand before it. While they pass through it, a worker
brings the next ones: it lets the owner of the masters prepare the unit (apply what is due), then
copies it into a free slot. Which unit comes next is learned: the successor seen last time, at first
the order of definition. Beyond the last unit of a visit come the first ones of the next, where it
is known already which step they will be wanted at; what is frozen is the same at every step. A
wrong guess costs a wait, never a wrong weight: a slot knows what it holds.

Where the device updates, whole masters travel up, and back when they have moved.

On CUDA copies run on streams of their own, one a direction, since the bus carries both at once, and
are ordered by events; the host does not wait for them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from zo_offload.clock import BUS, KERNEL, Clock
from zo_offload.offload.arena import Arena
from zo_offload.offload.packing import Piece
from zo_offload.units import Unit


@dataclass(frozen=True)
class Sent:
    """What goes to the device for a unit that is wanted at some step; valid until it is released.

    Attributes:
        pieces: First byte in the slot, and what belongs there: the unit's wire, or what codecs made
            of it.
        rest: What stays home otherwise, where the device is to bring it to that step; else None.
        carries: Number of steps that these carry.
        release: Called when nobody reads them any more, or with the event after which nobody will.
        packed: Whether codecs have been at work.
    """

    pieces: Sequence[Piece]
    rest: torch.Tensor | None
    carries: int
    release: Callable[["torch.Event | None"], None]
    packed: bool = False


Prepare = Callable[[Unit, int], Sent]
Holding = tuple[int, int]  # index of a unit, step that it is wanted at (0 where it is frozen)


@dataclass
class Slot:
    """A place for one unit on the device.

    Attributes:
        wire: Bytes of the largest unit.
        rest: The same for what stays home, where updates are made on the device.
        carries: Number of steps that they carry.
        packed: Whether the wire is packed.
        holds: Which unit, wanted at which step.
        arrival: The copy that fills it; the event after which it is there.
        last_use: Event after which nobody computes with what it held.
        sent_back: Event after which what it held is back where it rests.
    """

    wire: torch.Tensor
    rest: torch.Tensor
    carries: int = 0
    packed: bool = False
    holds: Holding | None = None
    arrival: "Future[torch.Event | None] | None" = None
    last_use: "torch.Event | None" = None
    sent_back: "torch.Event | None" = None


def slot_size(unit: Unit, with_rest: bool) -> int:
    """Bytes of a slot for the unit's wire: packed, unless the device packs what it has updated.

    (What is frozen has one size.)
    """
    return max(unit.packed_bytes, unit.wire_bytes) if with_rest else unit.packed_bytes


class Streamer:
    """Brings units from a host store into ``num_slots`` device slots, ahead of their use.

    Args:
        units: In the order they are expected at first.
        prepare: See ``Prepare``; called on the worker, one unit at a time.
        arena: Where slots are taken from.
        num_slots: Two overlap copy and compute; more absorb jitter. More than units are not made.
        with_rest: Whether slots hold whole masters, which the device updates and sends back.
        announce: Told of the units that will be prepared soon, and at which step.
        read_ahead: How many are announced beyond those that are prepared.
        clock: Is told what the worker does, and when somebody waits for it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        prepare: Prepare,
        arena: Arena,
        num_slots: int,
        with_rest: bool = False,
        announce: Callable[[Unit, int], None] | None = None,
        read_ahead: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self._units = {unit.index: unit for unit in units}
        self.prepare = prepare
        self._announce = announce
        self._read_ahead = read_ahead
        self._clock = clock or Clock()
        self._moves = not all(unit.is_frozen for unit in units)
        self._device = arena.device
        slot_bytes = max(slot_size(unit, with_rest) for unit in units)
        rest_bytes = max(unit.rest_bytes for unit in units) if with_rest else 0
        self._slots = [
            Slot(arena.take("slots", slot_bytes), arena.take("slots", rest_bytes))
            for _ in range(min(num_slots, len(self._units)))
        ]
        self._successor: dict[int | None, int] = dict(
            zip([None, *self._units], self._units, strict=False)
        )
        self._last: int | None = next(reversed(self._units))  # of a visit, as the one before went
        self._step = 0
        self._following: int | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="zo-streamer")
        self._up: torch.cuda.Stream | None = None
        self._back: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._up, self._back = self._copy_stream(), self._copy_stream()
        self._home: dict[int, torch.Event] = {}  # by unit: until when it is written where it rests
        self._current: int | None = None
        self._in_use: Slot | None = None
        self._returns: list[Future[torch.Event | None]] = []
        self.bytes_moved = 0

    def begin(self, step: int, following: int | None = None) -> None:
        """Start a visit.

        Args:
            step: Steps that its units will be asked to carry.
            following: The same of the next visit, if that is known already.
        """
        self._current, self._step = None, step
        self._following = following if self._moves else step  # whatever comes next is known
        for slot in self._slots:
            if slot.holds is not None and slot.holds != self._wanted(slot.holds[0], step):
                slot.holds = None
        self._prefetch(len(self._slots))

    def acquire(self, unit: Unit, step: int) -> Slot:
        """Where the unit is on the device until the next ``acquire``, wanted at ``step``."""
        self._mark_used()
        self._successor[self._current] = unit.index
        self._current = unit.index
        wanted = self._wanted(unit.index, step)
        slot = self._in_use = self._slot_of(wanted) or self._load(wanted, {wanted})
        assert slot.arrival is not None
        try:
            with self._clock.wait():
                arrived = slot.arrival.result()
        except BaseException:
            slot.holds = None
            raise
        if arrived is not None:
            self._stall(arrived)
        self._prefetch(len(self._slots) - 1)
        return slot

    def _stall(self, arrived: "torch.Event") -> None:
        """Let the device wait for a copy, between two events that say how long it does."""
        stream = torch.cuda.current_stream(self._device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(arrived)
        after.record(stream)
        self._clock.stalls.append((before, after))

    def give_back(self, unit: Unit, take: Callable[[], Sent]) -> None:
        """Copy the acquired unit's masters, updated on the device, to where they rest.

        Args:
            unit: Which.
            take: Called on the worker: notes what is now carried, and returns where to write.
        """
        slot = self._in_use
        assert slot is not None
        ready = None
        if self._back is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        latest = self._worker.submit(self._return, slot, unit, take, ready)
        for earlier in [each for each in self._returns if each.done()]:
            earlier.result()  # in vain, it is said now; otherwise the latest one ends after it
            self._returns.remove(earlier)
        self._returns.append(latest)

    def wait(self) -> None:
        """Until nothing is in flight, in either direction."""
        for slot in self._slots:
            if slot.arrival is not None:
                _synchronize(slot.arrival)
        for returned in self._returns:
            _synchronize(returned)
            returned.result()
        self._returns.clear()

    def finish(self) -> None:
        """End a visit; the next one's first units are fetched meanwhile, if their step is known."""
        self._mark_used()
        if self._current is not None:
            self._last = self._current
            if self._following is not None:
                self._prefetch(len(self._slots))

    def forget(self) -> None:
        """Wait for all copies in flight, so that the host store is at rest, and use none."""
        self.wait()
        for slot in self._slots:
            slot.holds = None

    def close(self) -> None:
        """End the worker, and what it has begun: nobody else may have the memory before."""
        self._worker.shutdown()
        for copy in [*(slot.arrival for slot in self._slots), *self._returns]:
            if copy is not None:
                _synchronize(copy)

    def _copy_stream(self) -> torch.cuda.Stream:
        """One that begins when the slots are there, which it keeps from others while it copies."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # that has zeroed them
        for slot in self._slots:
            slot.wire.record_stream(stream)
            slot.rest.record_stream(stream)
        return stream

    def _prefetch(self, ahead: int) -> None:
        current = self._in_use.holds if self._in_use is not None else None
        coming = self._coming(ahead + self._read_ahead)
        wanted, later = coming[:ahead], coming[ahead:]
        keep = {*wanted, current}
        for each in wanted:
            if self._slot_of(each) is None:
                self._load(each, keep)
        for index, step in later:
            if self._announce is not None:
                self._announce(self._units[index], step)

    def _coming(self, number: int) -> list[Holding]:
        """The units that are next, as far as that is known, the one at hand not among them."""
        coming: list[Holding] = []
        unit, step = self._current, self._step
        seen = {self._wanted(unit, step)} if unit is not None else set()
        for _ in range(number):
            if unit == self._last and self._following is not None and step == self._step:
                unit, step = None, self._following  # the next visit begins
            unit = self._successor.get(unit)
            wanted = self._wanted(unit, step) if unit is not None else None
            if wanted is None or wanted in seen:
                break
            coming.append(wanted)
            seen.add(wanted)
        return coming

    def _wanted(self, unit: int, step: int) -> Holding:
        """What a slot should hold: of what is frozen, the same at every step."""
        return unit, 0 if self._units[unit].is_frozen else step

    def _load(self, wanted: Holding, keep: set) -> Slot:
        slot = next(slot for slot in self._slots if slot.holds is None or slot.holds not in keep)
        if slot.arrival is not None:
            with self._clock.wait():
                slot.arrival.exception()  # an abandoned copy must be over before its slot is reused
        index, step = slot.holds = wanted
        if self._announce is not None:
            self._announce(self._units[index], step)
        slot.arrival = self._worker.submit(self._fetch, slot, self._units[index], step)
        return slot

    def _fetch(self, slot: Slot, unit: Unit, step: int) -> "torch.Event | None":
        with self._clock.fetching.part(KERNEL):
            sent = self.prepare(unit, step)
        slot.carries, slot.packed = sent.carries, sent.packed
        pairs = [(slot.wire[first : first + p.nbytes], p) for first, p in sent.pieces]
        if sent.rest is not None:
            pairs.append((slot.rest[: unit.rest_bytes], sent.rest))
        after = [slot.last_use, slot.sent_back, self._home.get(unit.index)]
        return self._copy(pairs, self._up, after, sent)

    def _return(
        self, slot: Slot, unit: Unit, take: Callable[[], Sent], ready: "torch.Event | None"
    ) -> "torch.Event | None":
        with self._clock.fetching.part(KERNEL):
            home = take()
        assert home.rest is not None
        ((_, wire),) = home.pieces
        pairs = [
            (wire, slot.wire[: unit.wire_bytes]),
            (home.rest, slot.rest[: unit.rest_bytes]),
        ]
        over = self._copy(pairs, self._back, [ready], home)
        if over is not None:
            slot.sent_back = self._home[unit.index] = over
        return over

    def _copy(
        self,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        stream: torch.cuda.Stream | None,
        after: "Sequence[torch.Event | None]",
        sent: Sent,
    ) -> "torch.Event | None":
        self.bytes_moved += sum(target.nbytes for target, _ in pairs)
        over = None
        try:
            with self._clock.fetching.part(BUS):
                if stream is None:
                    for target, source in pairs:
                        target.copy_(source)
                else:
                    over = self._copy_aside(stream, pairs, after)
        finally:
            sent.release(over)
        return over

    def _copy_aside(
        self,
        stream: torch.cuda.Stream,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        after: "Sequence[torch.Event | None]",
    ) -> "torch.Event":
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _slot_of(self, wanted: Holding) -> Slot | None:
        return next((slot for slot in self._slots if slot.holds == wanted), None)

    def _mark_used(self) -> None:
        if self._in_use is not None and self._up is not None:
            self._in_use.last_use = torch.cuda.current_stream(self._device).record_event()
        self._in_use = None


def _synchronize(copy: "Future[torch.Event | None]") -> None:
    """Until a copy is over, or has failed."""
    event = copy.result() if copy.exception() is None else None
    if event is not None:
        event.synchronize()
