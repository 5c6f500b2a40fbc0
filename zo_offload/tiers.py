"""Where a model's units rest: a store a tier, on this rank or shared by those of its machine."""

import json
from collections.abc import Callable

from zo_offload.converted import Base
from zo_offload.offload.arena import Arena
from zo_offload.offload.carried import Carried
from zo_offload.offload.desk import Desk, Guest
from zo_offload.offload.residency import DEVICE, HOST, NVME
from zo_offload.offload.run_files import RunFiles
from zo_offload.offload.shared import Locking, SharedCarried, SharedStore
from zo_offload.offload.slot import Identity
from zo_offload.offload.staged import (
    FirstValues,
    Staged,
    make_buffers,
    num_staged,
    staged_bytes,
    stored,
)
from zo_offload.offload.store import DeviceStore, HostStore, Store
from zo_offload.placement import Placement
from zo_offload.units import ModelMap, Unit


class Tiers:
    """The stores of a model's units.

    Args:
        model_map: The units.
        placement: Where they rest.
        arena: The device's memory.
        pin_memory: Whether an accelerator copies from the host's.
        base: Holds initial values, where the model is a converted one.

    Attributes:
        stores: Who lends a unit, by its index.
        carried: Steps that units carry.
        shared: What ranks of this machine share, if they do.
        staged: Of units on a disk: its store, or the way to the rank that has it.
        files: Of units on a disk, on the rank that asks it.
        read_ahead: Units that can be read while one is worked on and one is written.
    """

    def __init__(
        self,
        model_map: ModelMap,
        placement: Placement,
        arena: Arena,
        pin_memory: bool,
        base: Base | None,
    ) -> None:
        self._tiers, self._map = placement.tiers, model_map
        self._together = placement.together
        self.shared = placement.shared
        self._device = DeviceStore(arena)
        self._host: HostStore | SharedStore = HostStore(pin_memory)
        self.carried = Carried(placement.tiers)
        if self.shared is not None:
            at_rest = [u for u in model_map.everything if placement.tiers[u.index] == HOST]
            self._host = SharedStore(self.shared, at_rest, pin_memory)
            self.carried = SharedCarried(list(placement.tiers), self.shared)
        self.files: RunFiles | None = None
        self._desk: Desk | None = None
        self._staging_bytes = 0
        self.staged = self._open_disk(placement, pin_memory, base)
        self.read_ahead = self.staged.read_ahead if self.staged is not None else 0
        holds: dict[str, Store] = {DEVICE: self._device, HOST: self._host}
        if self.staged is not None:
            holds[NVME] = self.staged
            if isinstance(self._host, SharedStore) and self.shared is not None:
                holds[NVME] = Locking(self.staged, self.shared, self._host.spare)
        self.stores = {index: holds[tier] for index, tier in placement.tiers.items()}

    def _open_disk(
        self, placement: Placement, pin_memory: bool, base: Base | None
    ) -> Staged | Guest | None:
        """This rank's way to a disk: its own, or by the desk of the rank that leads."""
        units = [unit for unit in self._map.units if self._tiers[unit.index] == NVME]
        if not units:
            return None
        assert placement.disk is not None
        disk, shared, together = placement.disk, self.shared, self._together
        buffers = shared.staging(pin_memory) if shared is not None else []
        staged: list[Staged] = []

        def open_files() -> str:
            """On the rank that asks the disk; where the others find it."""
            files = base.files if base is not None else None
            self.files = RunFiles(disk, [stored(unit) for unit in units], files)
            mine = buffers or make_buffers(units, placement.num_slots, pin_memory)
            if shared is None:
                self._staging_bytes = num_staged(placement.num_slots) * staged_bytes(units)
            staged.append(Staged(self.files, mine, for_several=shared is not None))
            if shared is None:
                return ""
            self._desk = Desk(staged[0], mine, {unit.index: unit for unit in units})
            return self._desk.address

        address = together.once(open_files) if together is not None else open_files()
        if staged:
            return staged[0]
        assert shared is not None
        read_ahead = num_staged(placement.num_slots) - 2
        ranks = shared.region.ranks[0], shared.region.ranks[shared.region.index]
        return Guest(address, buffers, ranks, read_ahead)

    def add(self, unit: Unit, base: FirstValues | None) -> None:
        """Take a unit over, with what it came with, if that is not in the base's files."""
        if self._tiers[unit.index] != NVME:
            self._memory_of(unit).add(unit)
        elif base is not None:
            assert self.staged is not None
            self.staged.add(unit, base)

    def base_of(self, unit: Unit) -> FirstValues | None:
        """What a unit came with, while it is not on the disk."""
        assert self.staged is not None
        return self.staged.base_of(unit)

    def adopt(self, identity: Identity, steps: int, most: Callable[[int], int]) -> dict[int, int]:
        """See :meth:`RunFiles.adopt`; all ranks of the run call this together."""
        if self.staged is None:
            return {}

        def take() -> str:
            assert self.files is not None
            assert self.staged is not None
            self.staged.forget()
            return json.dumps(list(self.files.adopt(identity, steps, most).items()))

        found = dict(json.loads(self._together.once(take) if self._together else take()))
        for unit in self._map.units:
            if unit.index in found:
                self.staged.let_base_go(unit)
        return found

    def drop(self, unit: Unit) -> None:
        """Nobody asks for a unit in memory any more."""
        self._memory_of(unit).drop(unit)

    def take_own(self) -> None:
        """Go on without the ranks that share memory: changes here are not seen there any more.

        A page of memory is copied when it is changed, so that what is not changed stays shared.
        """
        if isinstance(self.carried, SharedCarried) and isinstance(self._host, SharedStore):
            self.carried = self.carried.own()
            self._host.take_own()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory: of the machine's, where its ranks share them."""
        return self._host.held_bytes + self._staging_bytes

    def close(self) -> None:
        """Write what is to be written, and leave the other ranks."""
        if self._desk is not None:
            self._desk.close()
        if self.staged is not None:
            self.staged.close()
        if self.shared is not None:
            self.shared.close()

    def _memory_of(self, unit: Unit) -> DeviceStore | HostStore | SharedStore:
        return self._device if self._tiers[unit.index] == DEVICE else self._host
