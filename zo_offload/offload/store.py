"""The memory of one tier: for each unit what travels (wire) and what stays (rest). Bytes only.

A store lends a unit for a while (:class:`Lease`). Where units rest in memory that costs nothing;
from a disk it is a read, and whoever has changed what was lent says so before it goes back.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.arena import Arena
from zo_offload.offload.memory import host_buffer, passing_buffer
from zo_offload.units import Unit


class Lease(Protocol):
    """A unit's memory until :meth:`end`.

    Attributes:
        wire: What travels, uint8 ``[unit.wire_bytes]``.
        rest: What stays with the master, uint8 ``[unit.rest_bytes]``; not to be looked at unless
            the whole was asked for.
        is_made: Whether it was made of what the unit came with, and rests nowhere yet.
    """

    wire: torch.Tensor
    rest: torch.Tensor
    is_made: bool

    def spare_wire(self) -> torch.Tensor:
        """Room for a copy of the wire; it goes with the lease, or with the next copy."""
        ...

    def spare_rest(self) -> torch.Tensor:
        """Room for a copy of the rest."""
        ...

    def settle(self) -> None:
        """It is about to be changed: nothing of it may be on its way to a disk."""
        ...

    def hold(self, until_read: bool = False) -> None:
        """Until the end no other process changes it, and until a device has read it, if so."""
        ...

    def hold_alone(self) -> None:
        """Until the end, and a device has written it, no other process looks at it."""
        ...

    def let_go(self) -> None:
        """Other processes may change it again."""
        ...

    def keep(self, step: int) -> None:
        """What was lent has been changed, and carries this many steps now."""
        ...

    def end(self, after: "torch.Event | None" = None) -> None:
        """Give it back; ``after`` an event, where a device may be reading it until then."""
        ...


class Store(Protocol):
    """Holds units of one tier."""

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """A unit's memory; its wire alone unless ``whole``."""
        ...

    def fresh(self, unit: Unit) -> Lease:
        """Memory for all of a unit's values, which are to be written anew; its padding is zero."""
        ...

    def expect(self, unit: Unit, whole: bool) -> None:
        """The unit will be asked for soon."""
        ...


class Unlocked:
    """Of a lease whose memory no other process has, or whose locks are another lease's."""

    def hold(self, until_read: bool = False) -> None:
        """Nothing is to be done."""

    def hold_alone(self) -> None:
        """Nothing is to be done."""

    def let_go(self) -> None:
        """Nothing is to be done."""


class MemoryLease(Unlocked):
    """Of a unit that rests in memory: the memory itself."""

    is_made = False

    def __init__(
        self,
        wire: torch.Tensor,
        rest: torch.Tensor,
        spare_wire: Callable[[], torch.Tensor],
        spare_rest: Callable[[], torch.Tensor],
    ) -> None:
        self.wire, self.rest = wire, rest
        self.spare_wire, self.spare_rest = spare_wire, spare_rest

    def settle(self) -> None:
        """Nothing is to be done."""

    def keep(self, step: int) -> None:
        """Nothing is to be done."""

    def end(self, after: "torch.Event | None" = None) -> None:
        """Nothing is to be done."""


class DeviceStore:
    """Units that rest on the device, in the arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._units: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spare: torch.Tensor | None = None

    def add(self, unit: Unit) -> None:
        """Allocate a unit's memory, zeroed."""
        purpose = "resident" if unit.name else "ambient"
        wire = self._arena.take(purpose, unit.wire_bytes)
        rest = self._arena.take(f"{purpose} masters", unit.rest_bytes)
        self._units[unit.index] = wire, rest

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """The unit's memory."""
        wire, rest = self._units[unit.index]
        return MemoryLease(wire, rest, self._no_wire, lambda: self._spare_rest(unit))

    def fresh(self, unit: Unit) -> Lease:
        """The unit's memory."""
        return self.lend(unit)

    def expect(self, unit: Unit, whole: bool) -> None:
        """Nothing is to be done."""

    def drop(self, unit: Unit) -> None:
        """Nobody asks for the unit any more."""
        del self._units[unit.index]

    def _no_wire(self) -> torch.Tensor:
        raise AssertionError("copies of what rests on the device go to the scratch")

    def _spare_rest(self, unit: Unit) -> torch.Tensor:
        if self._spare is None:
            largest = max(rest.nbytes for _, rest in self._units.values())
            self._spare = self._arena.take("spare", largest)
        return self._spare[: unit.rest_bytes]


class HostStore:
    """Units that rest in host memory, page-locked where an accelerator will copy from it.

    Where masters lag, room for a copy of one unit lies beside them, taken when it is first needed.
    """

    def __init__(self, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._units: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spare: tuple[torch.Tensor, torch.Tensor] | None = None
        self.held_bytes = 0

    def add(self, unit: Unit) -> None:
        """Allocate a unit's memory, zeroed."""
        name = f"unit {unit.name or 'ambient'}"
        wire, rest = (self._allocate(name, n) for n in (unit.wire_bytes, unit.rest_bytes))
        self._units[unit.index] = wire, rest

    def lend(self, unit: Unit, whole: bool = True) -> Lease:
        """The unit's memory."""
        wire, rest = self._units[unit.index]
        return MemoryLease(
            wire, rest, lambda: self._spare_wire(unit), lambda: self._room()[1][: unit.rest_bytes]
        )

    def fresh(self, unit: Unit) -> Lease:
        """The unit's memory."""
        return self.lend(unit)

    def expect(self, unit: Unit, whole: bool) -> None:
        """Nothing is to be done."""

    def drop(self, unit: Unit) -> None:
        """Nobody asks for the unit any more."""
        self.held_bytes -= sum(part.nbytes for part in self._units.pop(unit.index))

    def _spare_wire(self, unit: Unit) -> torch.Tensor:
        if self._pin_memory:  # an earlier one may still be on its way
            return passing_buffer(unit.wire_bytes)
        return self._room()[0][: unit.wire_bytes]

    def _room(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._spare is None:
            pairs = list(self._units.values())
            wire, rest = (max(pair[i].nbytes for pair in pairs) for i in (0, 1))
            self._spare = self._allocate("a copy", wire), self._allocate("a copy", rest)
        return self._spare

    def _allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        try:
            room = host_buffer(num_bytes, self._pin_memory)
        except RuntimeError as error:
            raise StoreError(
                f"host memory: no {num_bytes:,} bytes for {name} beside {self.held_bytes:,} held: "
                f"{error}"
                '; free some, or write "offload_param": {"device": "nvme"}'
            ) from error
        self.held_bytes += num_bytes
        return room
