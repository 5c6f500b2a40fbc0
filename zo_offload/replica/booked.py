"""What one rank measured in one step, and the few bytes in which it travels."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

HEADER = struct.Struct("<H")  # low bits of the step, and flags
SHAPE = struct.Struct("<HH")  # micro-batches, columns; behind the header where a flag says so
STEP_BITS = 0x0FFF
STOPS = 0x1000  # this rank was asked to end after the step
SHAPED = 0x2000  # the shape follows: it is not that of the message before
WEIGHTED = 0x4000  # weights follow the totals
SHORT = 0x8000  # all values are fp32 numbers, and travel as such
MOST_COLUMNS = MOST_MICRO_BATCHES = 2**16 - 1
Shape = tuple[int, ...]  # [M, C]


@dataclass(frozen=True)
class Header:
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
        flags = (SHAPED, WEIGHTED, SHORT, STOPS)
        return cls(first & STEP_BITS, *(bool(first & flag) for flag in flags))

    @property
    def dtype(self) -> str:
        """Of the values."""
        return "<f4" if self.short else "<f8"

    def body_bytes(self, shape: Shape) -> int:
        """Length of the values."""
        rows, columns = shape
        return rows * columns * (4 if self.short else 8) * (2 if self.weighted else 1)


@dataclass(frozen=True)
class Booked:
    """Sums with their weights: a row a micro-batch, a column for everything that is averaged.

    Attributes:
        columns: What each column is, for messages; its order is the same on every rank.
        totals: Sums over a micro-batch, float64 ``[M, C]``.
        weights: What they are sums over (1 for a mean), float64 ``[M, C]``.
    """

    columns: tuple[str, ...]
    totals: F64
    weights: F64

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[tuple[float, float]]]) -> "Booked":
        """From ``(total, weight)`` pairs, a row a micro-batch.

        Example:
            >>> Booked.of(["+eps", "-eps"], [[(6.0, 3.0), (3.0, 3.0)]]).totals
            array([[6., 3.]])
        """
        assert len(columns) <= MOST_COLUMNS
        assert len(rows) <= MOST_MICRO_BATCHES
        table = np.array(rows, np.float64).reshape(len(rows), len(columns), 2)
        return cls(tuple(columns), table[..., 0].copy(), table[..., 1].copy())

    @property
    def shape(self) -> Shape:
        """Micro-batches, columns."""
        return self.totals.shape

    def pack(self, step: int, before: Shape | None = None, stops: bool = False) -> bytes:
        """Two bytes, four for the shape if it is not that of the message before, and the values.

        Losses of one micro-batch are fp32 numbers most often, and then travel as such, in four
        bytes instead of eight; weights travel only where one of them is not 1.
        """
        parts = [self.totals]
        if (self.weights != 1.0).any():
            parts.append(self.weights)
        values = np.stack(parts)
        with np.errstate(over="ignore", invalid="ignore"):
            short = np.array_equal(values.astype("<f4").astype(np.float64), values, equal_nan=True)
        shaped = self.shape != before
        flags = STOPS * stops | SHAPED * shaped | WEIGHTED * (len(parts) > 1) | SHORT * short
        header = HEADER.pack(step & STEP_BITS | flags)
        shape = SHAPE.pack(*self.shape) if shaped else b""
        return header + shape + values.astype("<f4" if short else "<f8").tobytes()

    def unpack_like(self, header: Header, data: bytes) -> "Booked":
        """Another rank's numbers, of the same shape as these, from the values' bytes."""
        table = np.frombuffer(data, header.dtype).astype(np.float64)
        table = table.reshape(-1, *self.shape)
        weights = table[1] if header.weighted else np.ones_like(table[0])
        return Booked(self.columns, table[0], weights)
