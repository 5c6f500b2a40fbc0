"""What one rank measured in one step, and the few bytes in which it travels.

Plain floats, not arrays: a step has a few numbers, and what it calls once behind a forward that has
filled the caches with weights costs by how much code it runs through.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

HEADER = struct.Struct("<H")  # low bits of the step, and flags
SHAPE = struct.Struct("<HH")  # micro-batches, columns; behind the header where a flag says so
STEP_BITS = 0x0FFF
STOPS = 0x1000  # this rank was asked to end after the step
SHAPED = 0x2000  # the shape follows: it is not that of the message before
WEIGHTED = 0x4000  # weights follow the totals
SHORT = 0x8000  # all values are fp32 numbers, and travel as such
MOST_COLUMNS = MOST_MICRO_BATCHES = 2**16 - 1
Shape = tuple[int, int]  # [M, C]
Row = Sequence[float]  # a number a column


class Header(NamedTuple):
    """What a packed message says first.

    Attributes:
        step: Low bits of its number.
        shaped: Whether the shape follows.
        weighted: Whether weights follow the totals.
        short: Whether values travel as fp32.
        stops: Whether the rank was asked to end after this step.
    """

    step: int
    shaped: bool
    weighted: bool
    short: bool
    stops: bool

    @classmethod
    def read(cls, data: bytes) -> "Header":
        """From the first bytes of a message."""
        (first,) = HEADER.unpack(data)
        shaped, weighted = bool(first & SHAPED), bool(first & WEIGHTED)
        return cls(first & STEP_BITS, shaped, weighted, bool(first & SHORT), bool(first & STOPS))

    def values(self, shape: Shape) -> struct.Struct:
        """How they lie behind the header: totals, then weights if there are any."""
        rows, columns = shape
        return _layout(rows * columns * (2 if self.weighted else 1), self.short)


@dataclass(frozen=True)
class Booked:
    """Sums with their weights: a row a micro-batch, a column for everything that is averaged.

    Attributes:
        columns: What each column is, for messages; its order is the same on every rank.
        totals: Sums over a micro-batch, ``[M][C]``.
        weights: What they are sums over (1 for a mean), ``[M][C]``.
    """

    columns: tuple[str, ...]
    totals: Sequence[Row]
    weights: Sequence[Row]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[tuple[float, float]]]) -> "Booked":
        """From ``(total, weight)`` pairs, a row a micro-batch.

        Example:
            >>> Booked.of(["+eps", "-eps"], [[(6.0, 3.0), (3.0, 3.0)]]).totals
            [(6.0, 3.0)]
        """
        assert len(columns) <= MOST_COLUMNS
        assert len(rows) <= MOST_MICRO_BATCHES
        totals = [tuple([float(total) for total, _ in row]) for row in rows]
        weights = [tuple([float(weight) for _, weight in row]) for row in rows]
        return cls(tuple(columns), totals, weights)

    @property
    def shape(self) -> Shape:
        """Micro-batches, columns."""
        return len(self.totals), len(self.columns)

    def pack(self, step: int, before: Shape | None = None, stops: bool = False) -> bytes:
        """Two bytes, four for the shape if it is not that of the message before, and the values.

        Losses of one micro-batch are fp32 numbers most often, and then travel as such, in four
        bytes instead of eight; weights travel only where one of them is not 1.
        """
        values = list(chain.from_iterable(self.totals))
        weights = list(chain.from_iterable(self.weights))
        weighted = any(weight != 1.0 for weight in weights)
        if weighted:
            values += weights
        body = _as_fp32(values)
        short = body is not None
        if body is None:
            body = _layout(len(values), short).pack(*values)
        shaped = self.shape != before
        flags = STOPS * stops | SHAPED * shaped | WEIGHTED * weighted | SHORT * short
        header = HEADER.pack(step & STEP_BITS | flags)
        return header + (SHAPE.pack(*self.shape) if shaped else b"") + body

    def unpack_like(self, header: Header, data: bytes) -> "Booked":
        """Another rank's numbers, of the same shape as these, from the values' bytes."""
        count, columns = self.shape
        values = header.values(self.shape).unpack(data)
        rows = [values[start : start + columns] for start in range(0, len(values), columns)]
        weights = rows[count:] if header.weighted else [(1.0,) * columns] * count
        return Booked(self.columns, rows[:count], weights)


@lru_cache  # every step's is the same
def _layout(count: int, short: bool) -> struct.Struct:
    return struct.Struct(f"<{count}{'f' if short else 'd'}")


def _as_fp32(values: Sequence[float]) -> bytes | None:
    """In four bytes each; nothing where that would round one of them."""
    layout = _layout(len(values), short=True)
    try:
        data = layout.pack(*values)
    except OverflowError:
        return None
    return data if _are_same(values, layout.unpack(data)) else None


def _are_same(values: Iterable[float], others: Iterable[float]) -> bool:
    return all(
        one == other or (one != one and other != other)  # NaN
        for one, other in zip(values, others, strict=True)
    )
