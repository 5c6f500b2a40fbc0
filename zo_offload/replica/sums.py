"""What rank 0 answers: sums over all micro-batches, in as few bytes as hold their float64 exactly.

A sum of fp32 losses ends in zeros, and the sums of one step are near each other, so that they begin
alike. Most significant byte first, bytes at the end that are zero in all of them are left out, and
those at the front that all share travel once: 10 bytes for two lanes, mostly, where two float64 are
16. Every rank divides by itself, by weights that travel only where they are not a plain count.

A block of numbers begins with one byte: ``WEIGHTED`` where a block of weights follows, how many
bytes are shared, how many are kept. Whatever that says, a block is no longer than the float64. One
byte that says neither tells that the run ends after this step, and that all bytes are kept.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from zo_offload.errors import DivergedError
from zo_offload.replica.booked import Booked, Row
from zo_offload.replica.told import FAILURE, no_answer, raise_failure

WEIGHTED = 0x80
SHARED_SHIFT, MOST_SHARED = 4, 7
KEPT = 0x0F
STOPS = 0x0F  # in the place of how many are kept: all, and the run ends after this step
NUMBER = struct.Struct(">d")

Receive = Callable[[int], bytes]


@dataclass(frozen=True)
class Sums:
    """Over all micro-batches, a number a column.

    Attributes:
        totals: Of losses.
        weights: What they are sums over.
        stops: Whether the run ends after this step, on every rank.

    Example:
        >>> sums = Sums([14.25, 14.75], [2.0, 2.0])
        >>> sums.means, sums.pack(2).hex()
        ([7.125, 7.375], '13402c802d80')
    """

    totals: list[float]
    weights: list[float]
    stops: bool = False

    @property
    def means(self) -> list[float]:
        """Of each column."""
        return [total / weight for total, weight in zip(self.totals, self.weights, strict=True)]

    def pack(self, count: int) -> bytes:
        """Totals, and weights where one of them is not ``count``, the number of micro-batches."""
        if all(weight == count for weight in self.weights):
            return _pack(self.totals, stops=self.stops)
        return _pack(self.totals, WEIGHTED, self.stops) + _pack(self.weights)

    @classmethod
    def receive(cls, receive: Receive, columns: int, count: int) -> "Sums":
        """From what rank 0 sends; ``receive`` gives the next bytes.

        Raises:
            ZOError: Rank 0 says that the step has failed.
            ReplicaError: This is no answer.
        """
        first = receive(1)
        if first == FAILURE[:1]:
            raise_failure(receive, first)
        shares = first[0] & ~WEIGHTED
        stops = shares == STOPS
        totals = _unpack(NUMBER.size if stops else shares, receive, columns)
        if not first[0] & WEIGHTED:
            return cls(totals, [float(count)] * columns, stops)
        weights = _unpack(receive(1)[0], receive, columns)
        if not all(weights):
            raise no_answer(first)
        return cls(totals, weights, stops)


def sums_of(
    everyone: Sequence[Booked], what: str, names: Sequence[str] = (), finite: bool = True
) -> Sums:
    """Totals and weights of each column, added in the order of global micro-batches.

    Args:
        everyone: By rank, of one shape ``[M, C]``. As many neighbours as hold all columns together
            are a group; row i of group g of G is micro-batch i G + g.
        what: Is being summed, for messages.
        names: Of all columns (default: those that every rank holds).
        finite: Whether a total that is not is refused.

    Raises:
        DivergedError: A sum is not finite, or a column's weights add up to 0.
    """
    names = names or everyone[0].columns
    share = len(everyone[0].columns)
    totals = _rows([booked.totals for booked in everyone], len(names) // share)
    weights = _rows([booked.weights for booked in everyone], len(names) // share)
    if finite:
        _refuse_others(totals, what, names)
    total, weight = _sum(totals), _sum(weights)
    if not all(weight):
        raise DivergedError(
            f"{what}: the weights of all micro-batches add up to 0, so there is no mean loss; "
            "nothing was changed. Look at what the objective counts"
        )
    return Sums(total, weight)


def _rows(tables: Sequence[Sequence[Row]], neighbours: int) -> list[Row]:
    """A row a global micro-batch, from tables by rank: ``neighbours`` hold one row together."""
    micro_batches = zip(*tables, strict=True)  # of each, a row or its part a rank
    if neighbours == 1:
        return list(chain.from_iterable(micro_batches))
    groups = range(0, len(tables), neighbours)
    return [
        tuple(chain.from_iterable(parts[first : first + neighbours]))
        for parts in micro_batches
        for first in groups
    ]


def _sum(rows: Sequence[Row]) -> list[float]:
    """Of each column, added in order."""
    total = list(rows[0])
    for row in rows[1:]:
        total = [one + other for one, other in zip(total, row, strict=True)]
    return total


def _refuse_others(totals: Sequence[Row], what: str, names: Sequence[str]) -> None:
    for micro_batch, row in enumerate(totals):
        bad = [place for place, total in enumerate(row) if not math.isfinite(total)]
        if bad:
            raise DivergedError(
                f"{what}: the loss is {row[bad[0]]} ({names[bad[0]]}, micro-batch {micro_batch}); "
                "nothing was changed. Lower the learning rate or eps, or look at its data"
            )


def _pack(values: Sequence[float], flag: int = 0, stops: bool = False) -> bytes:
    words = [NUMBER.pack(value) for value in values]
    if stops:
        return bytes([flag | STOPS]) + b"".join(words)
    kept = max(len(word.rstrip(b"\0")) for word in words)
    both = enumerate(zip(min(words), max(words), strict=True))  # in the order of their bytes
    shared = next((place for place, (one, other) in both if one != other), MOST_SHARED)
    shared = min(shared, MOST_SHARED, kept)
    first = flag | shared << SHARED_SHIFT | kept
    return bytes([first]) + words[0][:shared] + b"".join(word[shared:kept] for word in words)


def _unpack(first: int, receive: Receive, columns: int) -> list[float]:
    shared, kept = first >> SHARED_SHIFT, first & KEPT
    if not shared <= kept <= NUMBER.size:
        raise no_answer(bytes([first]))
    front, width = receive(shared), kept - shared
    rest = receive(width * columns)
    parts = (rest[start : start + width] for start in range(0, width * columns, width or 1))
    words = parts if width else [b""] * columns
    return [NUMBER.unpack((front + word).ljust(NUMBER.size, b"\0"))[0] for word in words]
