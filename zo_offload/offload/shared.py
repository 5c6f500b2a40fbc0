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
from zo_offload.offload.memory import host_buffer, page_lock, page_unlock, passing_buffer
from zo_offload.offload.region import PAGE, Region
from zo_offload.offload.staged import Buffer
from zo_offload.offload.store import Lease, MemoryLease, Store
from zo_offload.ops import Span
from zo_offload.units import Unit

GRAIN = 1024  # elements; pieces begin on multiples
MakeRegion = Callable[[int], Region]  # of so many bytes
IsWhole = Callable[[Span], bool]  # whether a span is moved as one


@dataclass(frozen=True)
class Held:
    """A unit that ranks share.

    Attributes:
        number: Of the unit, among those.
        first: Its first byte in the region, where it rests there.
        unit: Which.
        pieces: What of it is moved together, by the rank that begins with it.
    """

    number: int
    first: int
    unit: Unit
    pieces: Sequence[Pieces]


class Shared:
    """A region with units in it, all zero at first, and what ranks must know of them.

    Args:
        units: Those that rest in it.
        elsewhere: Those that rest on a disk which one rank asks, and pass through the region.
        staging: Bytes of the wire and the rest of each buffer that they pass through.
        num_ranks: Of the machine.
        make: Makes the memory, together with its other ranks.
        is_whole: Which spans are not divided.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        elsewhere: Sequence[Unit],
        staging: Sequence[tuple[int, int]],
        num_ranks: int,
        make: MakeRegion,
        is_whole: IsWhole,
    ) -> None:
        self._held: dict[int, Held] = {}
        count = len(units) + len(elsewhere)
        first = _paged(8 * count * num_ranks)  # behind what is carried
        for number, unit in enumerate([*units, *elsewhere]):
            pieces = pieces_of(unit, num_ranks, is_whole)
            self._held[unit.index] = Held(number, first, unit, pieces)
            if number < len(units):
                first += _paged(unit.wire_bytes) + _paged(unit.rest_bytes)
        self._staging, self._sizes = first, staging
        self._locked: list[torch.Tensor] = []
        first += sum(_paged(wire) + _paged(rest) for wire, rest in staging)
        self.num_bytes, self.num_ranks = first, num_ranks
        self.region = make(first)
        table = self.region.array(0, count * num_ranks)
        self.steps = table.reshape(count, num_ranks)  # ~s while a piece that carries s changes

    def __contains__(self, unit: int) -> bool:
        return unit in self._held

    def __getitem__(self, unit: int) -> Held:
        return self._held[unit]

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def memory(self, unit: Unit, private: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Wire and rest of a unit that rests in the region."""
        sizes = unit.wire_bytes, unit.rest_bytes
        return self._pair(self._held[unit.index].first, sizes, private)

    def staging(self, pin_memory: bool) -> list[Buffer]:
        """The buffers, which begin on pages; page-locked for an accelerator that copies from it."""
        buffers, first = [], self._staging
        for sizes in self._sizes:
            buffers.append(Buffer(*self._pair(first, sizes)))
            first += sum(map(_paged, sizes))
        if pin_memory:
            self._locked = page_lock([part for b in buffers for part in (b.wire, b.rest)])
        return buffers

    def close(self) -> None:
        """Leave the other ranks; no copy may be on its way."""
        if self._locked:
            page_unlock(self._locked)
            self._locked = []
        self.region.close()

    def steps_of(self, unit: Unit) -> np.ndarray:
        """What the pieces of a unit carry, where it stands for all ranks."""
        return self.steps[self._held[unit.index].number]

    def locks(self, unit: int) -> int:
        """Number of the lock of a unit's first piece."""
        return self._held[unit].number * self.num_ranks

    def _pair(
        self, first: int, sizes: tuple[int, int], private: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        view = self.region.private if private else self.region.memory
        wire, rest = sizes
        return view(first, wire), view(first + _paged(wire), rest)


class SharedLease:
    """A shared unit's memory, with the locks that order who changes and who reads it.

    Args:
        inner: The memory.
        shared: What ranks share.
        unit: Which.
        spare: Room of this rank's own.
    """

    def __init__(self, inner: Lease, shared: Shared, unit: Unit, spare: "Spare") -> None:
        self.wire, self.rest, self.is_made = inner.wire, inner.rest, inner.is_made
        self.keep = inner.keep
        self._inner, self._unit, self._spare = inner, unit, spare
        self._region, self._count = shared.region, shared.num_ranks
        self._first, self._steps = shared.locks(unit.index), shared.steps_of(unit)
        self._is_held = self._waits = self._is_alone = False

    def spare_wire(self) -> torch.Tensor:
        """See :class:`Lease`."""
        return self._spare.wire(self._unit)

    def spare_rest(self) -> torch.Tensor:
        """See :class:`Lease`."""
        return self._spare.rest(self._unit)

    def hold(self, until_read: bool = False) -> None:
        """See :class:`Lease`."""
        self._region.read(self._first, self._count)
        self._is_held, self._waits = True, until_read

    def settle(self) -> None:
        """See :class:`Lease`."""
        self._inner.settle()

    def hold_alone(self) -> None:
        """See :class:`Lease`."""
        self._region.change(self._first, self._count)
        self._is_held = self._waits = self._is_alone = True

    def let_go(self) -> None:
        """See :class:`Lease`."""
        if self._is_held:
            self._is_held = False
            self._region.leave(self._first, self._count)

    def end(self, after: "torch.Event | None" = None) -> None:
        """See :class:`Lease`. What was changed is on its way before others may change it again."""
        if self._is_held and self._waits and after is not None:
            after.synchronize()
        if self._is_alone:  # had this rank died before, nobody would read the unit
            self._steps[:] = _as_counted(self._steps)
        self._inner.end(after)
        self.let_go()


class Locking:
    """A store of units on a disk that ranks share.

    Args:
        inner: Lends their memory.
        shared: What ranks share.
        spare: Room of this rank's own.
    """

    def __init__(self, inner: Store, shared: Shared, spare: "Spare") -> None:
        self.expect = inner.expect
        self._inner, self._shared, self._spare = inner, shared, spare

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """See :class:`Store`."""
        return SharedLease(self._inner.lend(unit, whole), self._shared, unit, self._spare)

    def fresh(self, unit: Unit) -> Lease:
        """See :class:`Store`."""
        return SharedLease(self._inner.fresh(unit), self._shared, unit, self._spare)


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
        if self._pin_memory:  # an earlier one may still be on its way
            return passing_buffer(unit.wire_bytes)
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
    """Units that rest in the region; see :class:`Store`.

    Args:
        shared: Holds them.
        units: They.
        pin_memory: Page-lock the region, for an accelerator that copies from it.
    """

    def __init__(self, shared: Shared, units: Sequence[Unit], pin_memory: bool) -> None:
        self._shared = shared
        self.spare = Spare([shared[index].unit for index in shared], pin_memory)
        self._memory = {unit.index: shared.memory(unit) for unit in units}
        memory = [part for pair in self._memory.values() for part in pair]
        self._locked = page_lock(memory) if pin_memory else []
        self._is_own = False

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory: of the machine's, and a copy of a unit beside."""
        return self._shared.num_bytes + self.spare.held_bytes

    def add(self, unit: Unit) -> None:
        """Nothing is to be done."""

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """See :class:`Store`."""
        lease = self._at_rest(unit)
        return lease if self._is_own else SharedLease(lease, self._shared, unit, self.spare)

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
        if self._locked:
            page_unlock(self._locked)
            self._locked = []
        self._memory = {
            index: self._shared.memory(self._shared[index].unit, private=True)
            for index in self._memory
        }
        self._is_own = True

    def _at_rest(self, unit: Unit) -> Lease:
        wire, rest = self._memory[unit.index]
        spare = self.spare
        return MemoryLease(wire, rest, lambda: spare.wire(unit), lambda: spare.rest(unit))


class SharedCarried(Carried):
    """Steps of units some of which ranks share."""

    def __init__(self, units: Sequence[int], shared: Shared) -> None:
        super().__init__(units)
        self._shared = shared

    def __getitem__(self, unit: int) -> int:
        if unit not in self._shared:
            return super().__getitem__(unit)
        return int(_as_counted(self._shared.steps[self._shared[unit].number]).min())

    def __setitem__(self, unit: int, step: int) -> None:
        if unit not in self._shared:
            super().__setitem__(unit, step)
        else:
            self._shared.steps[self._shared[unit].number] = step

    def bring(self, unit: Unit, goal: int, move: Move) -> bool:
        """Bring a unit to its goal, together with whoever else needs it."""
        if unit.index not in self._shared:
            return super().bring(unit, goal, move)
        changed: dict[int, bool] = {}
        later = []
        for piece in self._mine_first():
            if not self._lacks(unit, piece, goal):
                continue
            if self._shared.region.try_to_change(self._lock(unit, piece)):
                changed[piece] = self._move(unit, piece, goal, move)
            else:
                later.append(piece)
        for piece in later:
            self._shared.region.change(self._lock(unit, piece))
            changed[piece] = self._move(unit, piece, goal, move)
        return changed.get(0, False)  # of those who have changed a unit, one says so

    def own(self) -> Carried:
        """The same, where this rank goes on by itself."""
        own = Carried(self._steps)
        for unit in self._steps:
            own[unit] = self[unit]
        return own

    def will_carry(self, unit: Unit, step: int) -> None:
        """See :meth:`Carried.will_carry`."""
        if unit.index in self._shared:
            self._shared.steps_of(unit)[:] = ~step
        else:
            super().will_carry(unit, step)

    def furthest(self, unit: Unit) -> int:
        """See :meth:`Carried.furthest`."""
        if unit.index not in self._shared:
            return super().furthest(unit)
        return int(_as_counted(self._shared.steps_of(unit)).max())

    def is_even(self, unit: Unit) -> bool:
        """See :meth:`Carried.is_even`."""
        if unit.index not in self._shared:
            return True
        steps = self._shared.steps_of(unit)
        return bool((steps == steps[0]).all()) and bool(steps[0] >= 0)

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
        return self._shared.steps_of(unit)[piece] < goal

    def _move(self, unit: Unit, piece: int, goal: int, move: Move) -> bool:
        """With the piece's lock, which is given back: take its steps, unless somebody has."""
        held = self._shared[unit.index]
        steps, changed = self._shared.steps_of(unit), False
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


def _as_counted(steps: np.ndarray) -> np.ndarray:
    """Steps that pieces carry, or carried before they began to change."""
    return np.where(steps < 0, ~steps, steps)


def _stretches(elements: int, count: int) -> list[tuple[int, int]]:
    grains = -(-elements // GRAIN)
    ends = [min(grains * i // count * GRAIN, elements) for i in range(count + 1)]
    return list(pairwise(ends))


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE
