"""What is decided about a model's parameters before it is mapped: where and when they move."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from zo_offload.trainable.overlay import Overlay


@dataclass(frozen=True)
class Rotation:
    """Groups of parameters take turns.

    At step t those of group ``t // interval % num_groups`` move: a pure function of the step, so
    that replay, lag, snapshots and resume need to know nothing else.

    Attributes:
        group_of: By parameter name, of what moves at all.
        num_groups: They take turns in order.
        interval: Steps of a turn.

    Example:
        >>> rotation = Rotation({"a": 0, "b": 1}, num_groups=2, interval=3)
        >>> [rotation.moves("b", step) for step in range(7)]
        [False, False, False, True, True, True, False]

    Reference:
        Liu et al. (2024), arXiv 2401.15207, algorithm 1, bottom up. Deviation: embeddings, head and
        whatever else lies outside the blocks are one group, the last, and not two.
    """

    group_of: Mapping[str, int]
    num_groups: int
    interval: int

    def moves(self, name: str, step: int) -> bool:
        """Whether it is the turn of a parameter's group."""
        return self.group_of[name] == step // self.interval % self.num_groups


@dataclass(frozen=True)
class Moving:
    """Of the parameters with ``requires_grad``.

    Attributes:
        resident: Names of those that are ambient wherever they lie: they stay on the device, and
            the units around them travel without them.
        rotation: When which of them move; None: all at every step.
        overlays: Values that move beside them, in the place of frozen matrices.
    """

    resident: Collection[str] = frozenset()
    rotation: Rotation | None = None
    overlays: tuple[Overlay, ...] = ()


ALWAYS = Moving()
"""All of them, at every step, where they lie."""
