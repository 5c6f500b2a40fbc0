"""What one rank measured in one step, and the few bytes in which it travels."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

HEADER = struct.Struct("<HHH")  # low bits of the step; micro-batches; columns and WEIGHTED
WEIGHTED = 0x8000
MOST_COLUMNS = WEIGHTED - 1
MOST_MICRO_BATCHES = 2**16 - 1


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

    def pack(self, step: int) -> bytes:
        """Six bytes and eight a value; weights travel only where one of them is not 1."""
        weighted = WEIGHTED if (self.weights != 1.0).any() else 0
        num_rows, num_columns = self.totals.shape
        header = HEADER.pack(step & 0xFFFF, num_rows, num_columns | weighted)
        values = self.totals.astype("<f8").tobytes()
        return header + values + (self.weights.astype("<f8").tobytes() if weighted else b"")

    def unpack_like(self, data: bytes, weighted: bool) -> "Booked":
        """Another rank's numbers, of the same shape as these, from what follows the header."""
        table = np.frombuffer(data, "<f8").astype(np.float64)
        table = table.reshape(-1, *self.totals.shape)
        return Booked(self.columns, table[0], table[1] if weighted else np.ones_like(table[0]))

    def body_bytes(self, weighted: bool) -> int:
        """Length of what follows the header."""
        return self.totals.nbytes * (2 if weighted else 1)
