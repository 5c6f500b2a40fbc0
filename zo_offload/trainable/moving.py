"""What is decided about a model's parameters before it is mapped: where and when they move."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

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
class LowRank:
    """Directions of matrices are products of two small factors.

    ``z = U V^T / sqrt(rank)``: U ``[rows, rank]`` is new at every step, V ``[columns, rank]`` every
    ``interval`` steps. So the steps of an interval add up in the small factor alone, and a matrix
    takes them all at the interval's end: masters move on the grid of ``interval``.

    Attributes:
        rank: Columns of the factors.
        interval: Steps that share V.
        momentum: Of the small factor; it begins anew with every interval.

    Reference:
        Chen et al. (2024), arXiv 2410.07698, algorithms 1 and 2. Deviations: a matrix is merged
        with its factor at the interval's end, and momentum is not projected onto the next V.
    """

    rank: int
    interval: int
    momentum: float = 0.0

    def grid(self, step: int) -> int:
        """Number of steps that matrices carry at the visit of a step.

        Example:
            >>> [LowRank(rank=2, interval=3).grid(step) for step in range(7)]
            [0, 0, 0, 3, 3, 3, 6]
        """
        return step // self.interval * self.interval

    def sides(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of a parameter; None where its directions are dense.

        The axes are parted where rows and columns are the fewest together. Vectors, and what is no
        larger than its factors would be, have dense directions.

        Example:
            >>> low_rank = LowRank(rank=2, interval=50)
            >>> low_rank.sides((8, 64, 32)), low_rank.sides((16, 3, 4, 4)), low_rank.sides((2, 9))
            ((512, 32), (16, 48), None)
        """
        pairs = [(prod(shape[:axis]), prod(shape[axis:])) for axis in range(1, len(shape))]
        rows, columns = min(pairs, key=sum, default=(1, 1))
        return (rows, columns) if min(rows, columns) > self.rank else None


@dataclass(frozen=True)
class Moving:
    """Of the parameters with ``requires_grad``.

    Attributes:
        resident: Names of those that are ambient wherever they lie: they stay on the device, and
            the units around them travel without them.
        rotation: When which of them move; None: all at every step.
        overlays: Values that move beside them, in the place of frozen matrices.
        low_rank: How matrices move, where it is by products of small factors.
    """

    resident: Collection[str] = frozenset()
    rotation: Rotation | None = None
    overlays: tuple[Overlay, ...] = ()
    low_rank: LowRank | None = None


ALWAYS = Moving()
"""All of them, at every step, where they lie."""
