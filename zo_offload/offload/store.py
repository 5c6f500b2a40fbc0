"""The memory of one tier: for each unit what travels (wire) and what stays (rest). Bytes only."""

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.arena import Arena
from zo_offload.units import Unit


class DeviceStore:
    """Units that rest on the device, in the arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._units: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

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


class HostStore:
    """Units that rest in host memory, page-locked where an accelerator will copy from it."""

    def __init__(self, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._units: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.held_bytes = 0

    def add(self, unit: Unit) -> None:
        """Allocate a unit's memory, zeroed."""
        wire, rest = self._allocate(unit, unit.wire_bytes), self._allocate(unit, unit.rest_bytes)
        self._units[unit.index] = wire, rest
        self.held_bytes += unit.wire_bytes + unit.rest_bytes

    def wire(self, unit: Unit) -> torch.Tensor:
        """What travels, uint8 ``[unit.wire_bytes]``."""
        return self._units[unit.index][0]

    def rest(self, unit: Unit) -> torch.Tensor:
        """What stays with the master, uint8 ``[unit.rest_bytes]``."""
        return self._units[unit.index][1]

    def _allocate(self, unit: Unit, num_bytes: int) -> torch.Tensor:
        try:
            return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        except RuntimeError as error:
            raise StoreError(
                f"host memory: no {num_bytes:,} bytes for unit {unit.name or 'ambient'} "
                f"beside {self.held_bytes:,} held: {error}"
            ) from error


Store = DeviceStore | HostStore
