"""How many steps the masters of each unit carry, and who brings them further."""

from collections.abc import Callable, Iterable, Sequence

from zo_offload.ops import Span
from zo_offload.units import Unit

Pieces = Sequence[tuple[Span, Span]]  # a span of a unit, and the piece of it that is meant
# Brings pieces that carry so many steps to the goal; whether that changed any of them.
Move = Callable[[Pieces, int], bool]


class Carried:
    """Of units that one process alone moves.

    Example:
        >>> carried = Carried([3, 4])
        >>> carried[3] = 7
        >>> carried[3], carried[4], carried.most
        (7, 0, 7)
    """

    def __init__(self, units: Iterable[int]) -> None:
        self._steps = dict.fromkeys(units, 0)

    def __getitem__(self, unit: int) -> int:
        return self._steps[unit]

    def __setitem__(self, unit: int, step: int) -> None:
        self._steps[unit] = step

    @property
    def most(self) -> int:
        """Of any unit."""
        return max(self[unit] for unit in self._steps)

    def bring(self, unit: Unit, goal: int, move: Move) -> bool:
        """Bring a unit to its goal.

        Returns:
            Whether it was changed.
        """
        carried = self[unit.index]
        assert carried <= goal, f"{unit.name}: carries {carried} steps, the goal is {goal}"
        changed = move([(span, span) for span in unit.spans], carried)
        self[unit.index] = goal
        return changed

    def will_carry(self, unit: Unit, step: int) -> None:
        """All of the unit is written by the holder of its lease, and carries so many at its end."""
        self[unit.index] = step

    def furthest(self, unit: Unit) -> int:
        """Of any part of the unit; what holds of all of it is :meth:`__getitem__`."""
        return self[unit.index]

    def is_even(self, unit: Unit) -> bool:
        """Whether all of the unit carries as many steps."""
        return True

    def is_mine(self, unit: Unit) -> bool:
        """Whether this process writes the unit's values where they are written once."""
        return True

    def is_first(self, unit: Unit) -> bool:
        """Whether this process is the first of those that share the unit."""
        return True

    def meet(self) -> None:
        """Wait for whoever else writes units that this process looks at."""
