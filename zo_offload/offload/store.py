"""The memory of one tier: for each unit what travels (wire) and what stays (rest). Bytes only.

Beside them, where masters lag, lies room for a copy of one unit (``spare_wire``, ``spare_rest``),
taken when it is first needed; the next copy may be given the same.
"""

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.arena import Arena
from zo_offload.units import Unit


class DeviceStore:
    """Units that rest on the device, in the arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._units: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spare: torch.Tensor | None = None

    def add(self, unit: Unit, purpose: str = "resident") -> None:
        """Allocate a unit's memory, zeroed."""
        wire = self._arena.take(purpose, unit.wire_bytes)
        rest = self._arena.take(f"{purpose} masters", unit.rest_bytes)
        self._units[unit.index] = wire, rest

    def wire(self, unit: Unit) -> torch.Tensor:
        """What travels, uint8 ``[unit.wire_bytes]``."""
        return self._units[unit.index][0]

    def rest(self, unit: Unit) -> torch.Tensor:
        """What stays with the master, uint8 ``[unit.rest_bytes]``."""
        return self._units[unit.index][1]

    def spare_rest(self, unit: Unit) -> torch.Tensor:
        """Room for a copy of the unit's rest."""
        if self._spare is None:
            largest = max(rest.nbytes for _, rest in self._units.values())
            self._spare = self._arena.take("spare", largest)
        return self._spare[: unit.rest_bytes]


class HostStore:
    """Units that rest in host memory, page-locked where an accelerator will copy from it."""

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

    def wire(self, unit: Unit) -> torch.Tensor:
        """What travels, uint8 ``[unit.wire_bytes]``."""
        return self._units[unit.index][0]

    def rest(self, unit: Unit) -> torch.Tensor:
        """What stays with the master, uint8 ``[unit.rest_bytes]``."""
        return self._units[unit.index][1]

    def spare_wire(self, unit: Unit) -> torch.Tensor:
        """Room for a copy of the unit's wire."""
        if self._pin_memory:  # an earlier one may still be on its way: torch knows when it is free
            return torch.empty(unit.wire_bytes, dtype=torch.uint8, pin_memory=True)
        return self._room()[0][: unit.wire_bytes]

    def spare_rest(self, unit: Unit) -> torch.Tensor:
        """Room for a copy of the unit's rest."""
        return self._room()[1][: unit.rest_bytes]

    def _room(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._spare is None:
            pairs = list(self._units.values())
            wire, rest = (max(pair[i].nbytes for pair in pairs) for i in (0, 1))
            self._spare = self._allocate("a copy", wire), self._allocate("a copy", rest)
        return self._spare

    def _allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        try:
            room = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        except RuntimeError as error:
            raise StoreError(
                f"host memory: no {num_bytes:,} bytes for {name} beside {self.held_bytes:,} held: "
                f"{error}"
            ) from error
        self.held_bytes += num_bytes
        return room


Store = DeviceStore | HostStore
