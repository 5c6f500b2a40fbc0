"""Host memory of units that all ranks of a machine share: one copy, each step taken once.

The elements of a unit are divided evenly; a rank that needs the unit takes the pieces that nobody
works on, its own first, and then waits for the others'. While it reads, nobody changes them. Which
steps a piece carries stands beside it in the shared memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from zo_offload.errors import ReplicaError
from zo_offload.offload.carried import Carried, Move, Pieces
from zo_offload.offload.memory import host_buffer, page_lock, page_unlock
from zo_offload.offload.region import PAGE, Region
from zo_offload.offload.store import Lease, MemoryLease
from zo_offload.ops import Span
from zo_offload.units import Unit

GRAIN = 1024  # elements; pieces begin on multiples
MakeRegion = Callable[[int], Region]  # of so many bytes
IsWhole = Callable[[Span], bool]  # whether a span is moved as one


@dataclass(frozen=True)
class Held:
    """A unit in shared memory.

    Attributes:
        number: Of the unit, among those that are shared.
        first: Its first byte.
        unit: Which.
        pieces: What of it is moved together, by the rank that begins with it.
    """

    number: int
    first: int
    unit: Unit
    pieces: Sequence[Pieces]


class Shared:
    """A region with units in it, all zero at first.

    Args:
        units: Those that rest there.
        num_ranks: Of the machine.
        make: Makes the memory, together with its other ranks.
        is_whole: Which spans are not divided.
    """

    def __init__(
        self, units: Sequence[Unit], num_ranks: int, make: MakeRegion, is_whole: IsWhole
    ) -> None:
        self._held: dict[int, Held] = {}
        first = -(-8 * len(units) * num_ranks // PAGE) * PAGE  # behind what is carried
        for number, unit in enumerate(units):
            pieces = pieces_of(unit, num_ranks, is_whole)
            self._held[unit.index] = Held(number, first, unit, pieces)
            first += sum(_paged(size) for size in (unit.wire_bytes, unit.rest_bytes))
        self.num_bytes, self.num_ranks = first, num_ranks
        self.region = make(first)
        table = self.region.array(0, len(units) * num_ranks)
        self.steps = table.reshape(len(units), num_ranks)  # ~s while a piece that carries s changes

    def __contains__(self, unit: int) -> bool:
        return unit in self._held

    def __getitem__(self, unit: int) -> Held:
        return self._held[unit]

    def memory(self, unit: Unit, private: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """A unit's wire and rest."""
        first = self._held[unit.index].first
        view = self.region.private if private else self.region.memory
        behind = first + _paged(unit.wire_bytes)
        return view(first, unit.wire_bytes), view(behind, unit.rest_bytes)

    def locks(self, unit: int) -> int:
        """Number of the lock of a unit's first piece."""
        return self._held[unit].number * self.num_ranks


class SharedLease(MemoryLease):
    """A shared unit's memory."""

    def __init__(self, shared: Shared, unit: Unit, *memory: torch.Tensor, spare: "Spare") -> None:
        wire, rest = memory
        super().__init__(wire, rest, lambda: spare.wire(unit), lambda: spare.rest(unit))
        self._region, self._count = shared.region, shared.num_ranks
        self._first, self._is_held, self._waits = shared.locks(unit.index), False, False

    def hold(self, until_read: bool = False) -> None:
        """See :class:`Lease`."""
        self._region.read(self._first, self._count)
        self._is_held, self._waits = True, until_read

    def hold_alone(self) -> None:
        """See :class:`Lease`."""
        self._region.change(self._first, self._count)
        self._is_held = self._waits = True

    def end(self, after: "torch.Event | None" = None) -> None:
        """See :class:`Lease`."""
        if not self._is_held:
            return
        if self._waits and after is not None:
            after.synchronize()
        self._is_held = False
        self._region.leave(self._first, self._count)


class Spare:
    """Room of this rank's own for a copy of one unit, taken when it is first needed."""

    def __init__(self, units: Sequence[Unit], pin_memory: bool) -> None:
        self._sizes = [max((u.wire_bytes for u in units), default=0),
                       max((u.rest_bytes for u in units), default=0)]  # fmt: skip
        self._pin_memory = pin_memory
        self._room: list[torch.Tensor] = []
        self.held_bytes = 0

    def wire(self, unit: Unit) -> torch.Tensor:
        """See :class:`Lease`."""
        if self._pin_memory:  # an earlier one may still be on its way: torch knows when it is free
            return host_buffer(unit.wire_bytes, pin_memory=True)
        return self._taken()[0][: unit.wire_bytes]

    def rest(self, unit: Unit) -> torch.Tensor:
        """See :class:`Lease`."""
        return self._taken()[1][: unit.rest_bytes]

    def _taken(self) -> list[torch.Tensor]:
        if not self._room:
            self._room = [host_buffer(size, self._pin_memory) for size in self._sizes]
            self.held_bytes = sum(self._sizes)
        return self._room


class SharedStore:
    """See :class:`Store`.

    Attributes:
        held_bytes: Of the machine's memory, and of this rank's own.
    """

    def __init__(self, shared: Shared, units: Sequence[Unit], pin_memory: bool) -> None:
        self._shared = shared
        self._spare = Spare(units, pin_memory)
        self._memory = {unit.index: shared.memory(unit) for unit in units}
        self._pins, self._is_own = pin_memory, False
        if pin_memory:
            page_lock(self._buffers())

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory: of the machine's, and a copy of a unit beside."""
        return self._shared.num_bytes + self._spare.held_bytes

    def add(self, unit: Unit) -> None:
        """Nothing is to be done."""

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """See :class:`Store`."""
        wire, rest = self._memory[unit.index]
        spare = self._spare
        if self._is_own:
            return MemoryLease(wire, rest, lambda: spare.wire(unit), lambda: spare.rest(unit))
        return SharedLease(self._shared, unit, wire, rest, spare=spare)

    def fresh(self, unit: Unit) -> Lease:
        """See :class:`Store`."""
        return self.lend(unit)

    def expect(self, unit: Unit, whole: bool) -> None:
        """Nothing is to be done."""

    def drop(self, unit: Unit) -> None:
        """Nobody here asks for the unit any more."""
        del self._memory[unit.index]

    def take_own(self) -> None:
        """From now on this rank's changes are its own; a page is copied when it writes there."""
        if self._pins:
            page_unlock(self._buffers())
        self._memory = {
            index: self._shared.memory(self._shared[index].unit, private=True)
            for index in self._memory
        }
        self._is_own = True

    def _buffers(self) -> list[torch.Tensor]:
        return [part for pair in self._memory.values() for part in pair]


class SharedCarried(Carried):
    """Steps of units some of which ranks share."""

    def __init__(self, units: Sequence[int], shared: Shared) -> None:
        super().__init__(units)
        self._shared = shared

    def __getitem__(self, unit: int) -> int:
        if unit not in self._shared:
            return super().__getitem__(unit)
        steps = self._shared.steps[self._shared[unit].number]
        return int(np.where(steps < 0, ~steps, steps).min())

    def __setitem__(self, unit: int, step: int) -> None:
        if unit not in self._shared:
            super().__setitem__(unit, step)
        else:
            self._shared.steps[self._shared[unit].number] = step

    def bring(self, unit: Unit, goal: int, move: Move) -> bool:
        """Bring a unit to its goal, together with whoever else needs it."""
        if unit.index not in self._shared:
            return super().bring(unit, goal, move)
        changed = False
        later = []
        for piece in self._mine_first():
            if not self._lacks(unit, piece, goal):
                continue
            if self._shared.region.try_to_change(self._lock(unit, piece)):
                changed |= self._move(unit, piece, goal, move)
            else:
                later.append(piece)
        for piece in later:
            self._shared.region.change(self._lock(unit, piece))
            changed |= self._move(unit, piece, goal, move)
        return changed

    def own(self) -> Carried:
        """The same, where this rank goes on by itself."""
        own = Carried(self._steps)
        for unit in self._steps:
            own[unit] = self[unit]
        return own

    def is_mine(self, unit: Unit) -> bool:
        """See :meth:`Carried.is_mine`."""
        shared = unit.index in self._shared
        region = self._shared.region
        return not shared or self._shared[unit.index].number % len(region.ranks) == region.index

    def is_first(self, unit: Unit) -> bool:
        """See :meth:`Carried.is_first`."""
        return unit.index not in self._shared or self._shared.region.index == 0

    def meet(self) -> None:
        """See :meth:`Carried.meet`."""
        self._shared.region.meet()

    def _mine_first(self) -> Iterator[int]:
        count, mine = self._shared.num_ranks, self._shared.region.index
        return ((mine + i) % count for i in range(count))

    def _lock(self, unit: Unit, piece: int) -> int:
        return self._shared.locks(unit.index) + piece

    def _lacks(self, unit: Unit, piece: int, goal: int) -> bool:
        return self._shared.steps[self._shared[unit.index].number, piece] < goal

    def _move(self, unit: Unit, piece: int, goal: int, move: Move) -> bool:
        """With the piece's lock, which is given back: take its steps, unless somebody has."""
        held = self._shared[unit.index]
        steps, changed = self._shared.steps[held.number], False
        try:
            carried = int(steps[piece])
            if carried < 0:
                raise ReplicaError(
                    f"unit {unit.name or 'ambient'}: a rank that shares this machine's weights "
                    "died while it changed them; look at the ranks' output, and start the same "
                    "command again"
                )
            if carried < goal:
                steps[piece] = ~carried
                changed = move(held.pieces[piece], carried)
                steps[piece] = goal
        finally:
            self._shared.region.leave(self._lock(unit, piece))
        return changed


def pieces_of(unit: Unit, count: int, is_whole: IsWhole) -> list[Pieces]:
    """What moves of a unit, in so many pieces; some may be empty."""
    pieces: list[list[tuple[Span, Span]]] = [[] for _ in range(count)]
    for span in unit.spans:
        if span.trainable and is_whole(span):
            pieces[unit.index % count].append((span, span))
        elif span.trainable:
            stretches = _stretches(span.elements, count)
            for piece, (first, last) in zip(pieces, stretches, strict=True):
                if first < last:
                    piece.append((span, span.piece(first, last)))
    return list(pieces)


def _stretches(elements: int, count: int) -> list[tuple[int, int]]:
    grains = -(-elements // GRAIN)
    ends = [min(grains * i // count * GRAIN, elements) for i in range(count + 1)]
    return list(pairwise(ends))


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE
