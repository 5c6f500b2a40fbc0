"""Which slot holds what: numbers only, so that the rule can be read and tested by itself.

A unit is written to a free slot. When that has landed, the slot is the unit's, and its old one is
*retired*: it may be written again only after a sync that began later, since until then a power cut
may take the new version back. A slot that is being read is not written either.
"""

from collections import Counter, deque
from collections.abc import Iterable


class SlotTable:
    """Slots of one store, each free, being written, current or retired.

    Args:
        num_slots: In all.
        current: Slots by the unit whose newest version they hold; all others are free.

    Example:
        >>> table = SlotTable(2, {})
        >>> table.take(7), table.landed(7)
        (0, None)
        >>> table.take(7), table.landed(7)  # the old slot waits for a sync
        (1, None)
        >>> table.take(7) is None
        True
        >>> table.synced(table.retired)
        >>> table.take(7)
        0
    """

    def __init__(self, num_slots: int, current: dict[int, int]) -> None:
        self.current = dict(current)
        self.writing: dict[int, int] = {}
        self._retired: list[int] = []
        self._readers: Counter[int] = Counter()
        held = set(current.values())
        # the one that was free longest is written next: wear spreads
        self._free = deque(slot for slot in range(num_slots) if slot not in held)

    @property
    def retired(self) -> list[int]:
        """Slots whose versions have a successor that has landed."""
        return list(self._retired)

    @property
    def has_free(self) -> bool:
        """Whether :meth:`take` gives one."""
        return bool(self._free)

    @property
    def is_sync_due(self) -> bool:
        """Whether a sync would free a slot."""
        return any(not self._readers[slot] for slot in self._retired)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being read or written."""
        return not self.writing and not +self._readers

    def take(self, unit: int) -> int | None:
        """A free slot for the unit's next version; None where there is none."""
        assert unit not in self.writing
        if not self._free:
            return None
        slot = self.writing[unit] = self._free.popleft()
        return slot

    def landed(self, unit: int) -> None:
        """The version that was being written is the unit's newest."""
        before = self.current.get(unit)
        self.current[unit] = self.writing.pop(unit)
        if before is not None:
            self._retired.append(before)

    def failed(self, unit: int) -> None:
        """It could not be written: its slot is free again."""
        self._free.append(self.writing.pop(unit))

    def synced(self, retired: Iterable[int]) -> None:
        """A sync is done that began when these were retired."""
        freed = [slot for slot in retired if slot in self._retired and not self._readers[slot]]
        self._retired = [slot for slot in self._retired if slot not in freed]
        self._free.extend(freed)

    def read_begins(self, slot: int) -> None:
        """Keep a slot as it is."""
        self._readers[slot] += 1

    def read_ends(self, slot: int) -> None:
        """Let go of it."""
        self._readers[slot] -= 1
