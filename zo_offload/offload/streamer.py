"""The pipeline that keeps units in flight between host and device.

A unit is asked for when lanes stand before it. While they pass through it, a worker brings the next
ones: it lets the owner of the masters prepare the unit (apply what is due), then copies it into a
free slot. Which unit comes next is learned: the successor seen last time, at first the order of
definition. A wrong guess costs a wait, never a wrong weight.

On CUDA the copy runs on a stream of its own and is ordered by events; the host does not wait for
it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from zo_offload.offload.arena import Arena
from zo_offload.units import Unit

Prepare = Callable[
    [Unit], torch.Tensor
]  # brings a unit to the current step, returns its wire bytes


@dataclass
class _Slot:
    buffer: torch.Tensor
    unit: int | None = None
    arrival: "Future[torch.Event | None] | None" = None
    last_use: "torch.Event | None" = None


class Resident:
    """The pipeline of units that rest on the device: nothing moves."""

    bytes_moved = 0

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare

    def begin(self) -> None:
        """Start a visit."""

    def acquire(self, unit: Unit) -> torch.Tensor:
        """The unit's wire bytes, where they rest."""
        return self._prepare(unit)

    def finish(self) -> None:
        """End a visit."""

    def close(self) -> None:
        """Release what the pipeline holds."""


class Streamer:
    """Brings units from a host store into ``num_slots`` device slots, ahead of their use.

    Args:
        units: In the order they are expected at first.
        prepare: See ``Prepare``; called on the worker, one unit at a time.
        arena: Where slots are taken from.
        num_slots: Two overlap copy and compute; more absorb jitter.
    """

    def __init__(
        self, units: Sequence[Unit], prepare: Prepare, arena: Arena, num_slots: int
    ) -> None:
        self._units = {unit.index: unit for unit in units}
        self._prepare = prepare
        self._device = arena.device
        slot_bytes = max(unit.wire_bytes for unit in units)
        self._slots = [_Slot(arena.take("slots", slot_bytes)) for _ in range(num_slots)]
        self._successor: dict[int | None, int] = dict(
            zip([None, *self._units], self._units, strict=False)
        )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="zo-streamer")
        self._copy_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._current: int | None = None
        self.bytes_moved = 0

    def begin(self) -> None:
        """Start a visit: what the slots hold may be of an earlier step, so it is dropped."""
        self._current = None
        for slot in self._slots:
            slot.unit = slot.arrival = None
        self._prefetch(len(self._slots))

    def acquire(self, unit: Unit) -> torch.Tensor:
        """The unit's wire bytes on the device, valid until the next ``acquire``."""
        self._mark_used()
        self._successor[self._current] = unit.index
        self._current = unit.index
        slot = self._slot_of(unit.index) or self._load(unit.index, {unit.index})
        assert slot.arrival is not None
        arrived = slot.arrival.result()
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        self._prefetch(len(self._slots) - 1)
        return slot.buffer[: unit.wire_bytes]

    def finish(self) -> None:
        """End a visit: wait for copies in flight, so that the host store is at rest."""
        self._mark_used()
        for slot in self._slots:
            if slot.arrival is not None:
                slot.arrival.result()

    def close(self) -> None:
        """End the worker."""
        self._worker.shutdown()

    def _prefetch(self, ahead: int) -> None:
        wanted: list[int] = []
        following = self._current
        for _ in range(ahead):
            following = self._successor.get(following)
            if following is None or following in wanted or following == self._current:
                break
            wanted.append(following)
        keep = {*wanted, self._current}
        for index in wanted:
            if self._slot_of(index) is None:
                self._load(index, keep)

    def _load(self, index: int, keep: set) -> _Slot:
        slot = next(slot for slot in self._slots if slot.unit is None or slot.unit not in keep)
        if slot.arrival is not None:
            slot.arrival.exception()  # an abandoned copy must be over before its slot is reused
        slot.unit = index
        slot.arrival = self._worker.submit(self._fetch, slot, self._units[index])
        return slot

    def _fetch(self, slot: _Slot, unit: Unit) -> "torch.Event | None":
        source = self._prepare(unit)
        target = slot.buffer[: unit.wire_bytes]
        self.bytes_moved += unit.wire_bytes
        if self._copy_stream is None:
            target.copy_(source)
            return None
        if slot.last_use is not None:
            self._copy_stream.wait_event(slot.last_use)
        with torch.cuda.stream(self._copy_stream):
            target.copy_(source, non_blocking=True)
            return self._copy_stream.record_event()

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.unit == index), None)

    def _mark_used(self) -> None:
        slot = None if self._current is None else self._slot_of(self._current)
        if slot is not None and self._copy_stream is not None:
            slot.last_use = torch.cuda.current_stream(self._device).record_event()
