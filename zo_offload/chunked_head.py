"""A head of which only some rows are perturbed at a time.

Noise is a pure function of the element, so a row has the same bits in a part as in a whole copy.
What it costs: every forward perturbs the head anew, where a whole copy serves all micro-batches.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from zo_offload import ops
from zo_offload.exact_head import exact_linear
from zo_offload.factors import AmbientFactors
from zo_offload.offload.planner import rows_bytes
from zo_offload.ops import ALIGNMENT, Draw, Segment, Span, rank_sums
from zo_offload.weights import Weights

logger = logging.getLogger(__name__)


class HeadChunks:
    """Parts of the head, perturbed in one buffer of the arena.

    Args:
        weights: Hold it.
        span: Where it lies among the ambient parameters.
        segment: Itself, ``[vocabulary, width]``.
        rows: Of a part.
        factors: Of ambient matrices, where they move by small factors.
    """

    def __init__(
        self,
        weights: Weights,
        span: Span,
        segment: Segment,
        rows: int,
        factors: AmbientFactors | None = None,
    ) -> None:
        self.span, self.segment = span, segment
        self.chunk = min(rows, segment.shape[0])
        self._weights = weights
        self._buffer: torch.Tensor | None = None
        self._factors = factors if factors is not None and segment.name in factors else None
        self._holds: tuple[int, Draw | None, int, int] | None = None
        self._told: set[str] = set()

    def part(self, first: int, last: int, draw: Draw | None) -> torch.Tensor:
        """Rows ``[last - first, width]`` along ``draw``, until another part is asked for."""
        span, segment = self.span, self.segment
        width = segment.shape[1]
        start, stop = first * width, last * width
        wire = self._weights.ambient_values(span)
        pair = self._factors.pair(segment.name, draw) if self._factors is not None else None
        wanted = (len(self._weights.history), draw, first, last)
        if pair is not None:
            buffer = self._buffer_of(wire)[: stop - start]
            if self._holds != wanted:
                rank_sums.add_product(segment, wire, buffer, *pair, first, last)
                self._holds = wanted
            return buffer.view(-1, width)
        if draw is None or not self._weights.map.moves(span, draw.step):
            return wire[segment.start + start : segment.start + stop].view(-1, width)
        begin = start // ALIGNMENT * ALIGNMENT
        count = -(-(stop - begin) // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer_of(wire)[:count]
        if self._holds != wanted:
            at = segment.start + begin
            ops.perturb(span, wire, buffer, self._weights.direction, draw, at, count)
            self._holds = wanted
        return buffer[start - begin : stop - begin].view(-1, width)

    def _buffer_of(self, wire: torch.Tensor) -> torch.Tensor:
        if self._buffer is None:
            size = rows_bytes(self.span, self.segment, self.chunk)
            self._buffer = self._weights.arena.take("ambient copies", size).view(wire.dtype)
        return self._buffer

    def invalidate(self) -> None:
        """Forget what the buffer holds."""
        self._holds = None

    def tell(self, reader: str) -> None:
        """Log, once a reader, that all logits were made for it."""
        if reader not in self._told:
            self._told.add(reader)
            logger.warning(
                "zeroth_order.head_chunk: %s needs logits of all %s columns at once, and "
                "a whole copy of the head; cross_entropy, logsumexp and gather over the vocabulary "
                "need neither",
                reader,
                f"{self.segment.shape[0]:,}",
            )


class Copies(Protocol):
    """What a head is read through; see ``AmbientCopies``."""

    head: torch.nn.Parameter | None

    def value(self, parameter: object, draw: Draw | None, rank: int) -> torch.Tensor:
        """The whole parameter."""
        ...

    def rows(self, parameter: object, indices: torch.Tensor, draw: Draw | None) -> torch.Tensor:
        """Some rows of it."""
        ...


@dataclass(frozen=True)
class LaneHead:
    """The head as one lane sees it; makes the logits of ``lazy_logits.py``.

    Attributes:
        copies: For rows and wholes.
        chunks: For parts.
        draw: Where the lane's weights stand.
        rank: Of the draw in the visit.
        bias: fp32 ``[vocabulary]``, of this draw.
    """

    copies: Copies
    chunks: HeadChunks
    draw: Draw | None
    rank: int
    bias: torch.Tensor | None

    @property
    def num_columns(self) -> int:
        """The size of the vocabulary."""
        return self.chunks.segment.shape[0]

    @property
    def chunk(self) -> int:
        """Columns of a block."""
        return self.chunks.chunk

    def block(self, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """fp32 logits ``[tokens, last - first]``."""
        bias = None if self.bias is None else self.bias[first:last]
        return exact_linear(hidden, self.chunks.part(first, last, self.draw), bias)

    def pairs(self, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """fp32 ``[n]``: of each hidden state the logit at its column."""
        rows = self.copies.rows(self.copies.head, columns, self.draw)
        logits = (hidden.float() * rows.float()).sum(1)
        return logits if self.bias is None else logits + self.bias[columns]

    def whole(self, hidden: torch.Tensor, reader: str | None) -> torch.Tensor:
        """All logits, to the bits that they have without chunks."""
        if reader is not None:
            self.chunks.tell(reader)
        return exact_linear(
            hidden, self.copies.value(self.copies.head, self.draw, self.rank), self.bias
        )
