"""Low-rank directions: their small factors, and matrices with the product of such factors added.

A matrix W ``[rows, columns]`` moves along ``U V^T / sqrt(rank)``. U ``[rows, rank]`` is the noise
of the matrix's own counter, as if it were a parameter of that shape, and ``1 / sqrt(rank)`` is
folded into its table; V ``[columns, rank]`` is that of a stream of its own, where the number of the
interval stands for the step.

**The bit contract.** Factors are fp32. Their product is added element by element, in plain torch
operations that nothing fuses: ``d = l_0 r_0; d = d + l_k r_k`` for k = 1 ..., each product and each
sum rounded to fp32; then ``w = w + d``, rounded once. So any device gives the same bits, which no
matrix product of a library would.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from zo_offload.ops import kernels, torch_ops
from zo_offload.ops.draws import Draw, StepUpdate
from zo_offload.ops.reference import STREAM_BASIS
from zo_offload.ops.span import Segment, Span

CHUNK_ELEMENTS = 1 << 18  # of a matrix at a time: two fp32 temporaries stay in a cache
STREAM_SHIFT = 16  # in the counter's last word, behind the probe


@dataclass(frozen=True)
class FactorLayout:
    """Where the factors of some matrices lie, flat, one kind behind the other.

    Attributes:
        rank: Of the factors.
        sides: Rows and columns of each matrix, by name.
        left: Of U, and of what it adds up to.
        right: Of V.
    """

    rank: int
    sides: dict[str, tuple[int, int]]
    left: Span
    right: Span

    def lefts(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """A matrix's left factor ``[rows, rank]`` among ``left.elements``."""
        return _view(self.left, flat, name).view(-1, self.rank)

    def rights(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """A matrix's right factor ``[columns, rank]`` among ``right.elements``."""
        return _view(self.right, flat, name).view(-1, self.rank)


def lay_out_factors(
    segments: Sequence[Segment], sides: dict[str, tuple[int, int]], rank: int
) -> FactorLayout:
    """Lay the factors of these matrices out, each on a multiple of 128 elements."""
    scale = 1 / math.sqrt(rank)
    lefts = [
        replace(s, shape=(sides[s.name][0], rank), scale=s.scale * scale, start=0) for s in segments
    ]
    rights = [replace(s, shape=(sides[s.name][1], rank), scale=1.0, start=0) for s in segments]
    return FactorLayout(rank, sides, _span(lefts), _span(rights))


def _span(segments: Sequence[Segment]) -> Span:
    placed, start = [], 0
    for segment in segments:
        placed.append(replace(segment, start=start))
        start += segment.padded
    return Span(torch.float32, tuple(placed), 0, 0)


def _view(span: Span, flat: torch.Tensor, name: str) -> torch.Tensor:
    (segment,) = (each for each in span.segments if each.name == name)
    return flat[segment.start : segment.start + segment.numel]


def gathered(layout: FactorLayout, direction: str, draws: Sequence[Draw]) -> torch.Tensor:
    """``-sum of coefficient * U / sqrt(rank)``: what steps of one V have done, fp32, on the CPU.

    Args:
        layout: Of the factors.
        direction: Distribution of U.
        draws: The steps', in order, each with its coefficient.
    """
    total = torch.zeros(layout.left.elements)
    step = StepUpdate(1.0, tuple(draws))
    kernels.update(layout.left, total, torch.empty(0, dtype=torch.uint8), direction, [step])
    return total


def along(
    layout: FactorLayout, direction: str, total: torch.Tensor, draw: Draw, out: torch.Tensor
) -> None:
    """Write ``total + coefficient * U / sqrt(rank)``, the left factor of a perturbed copy."""
    kernels.perturb(layout.left, total, out, direction, draw)


def basis(layout: FactorLayout, direction: str, seed: int, interval: int) -> torch.Tensor:
    """V of the interval of this number, fp32, on the CPU."""
    out = torch.empty(layout.right.elements)
    draw = Draw(seed, interval, STREAM_BASIS << STREAM_SHIFT, 1.0)
    kernels.perturb(layout.right, torch.zeros_like(out), out, direction, draw)
    return out


@torch.inference_mode()
def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right.T`` by the bit contract: fp32 ``[rows, columns]``."""
    total = left[:, :1] * right[:, 0]
    for k in range(1, left.shape[1]):
        total.add_(left[:, k : k + 1] * right[:, k])
    return total


@torch.inference_mode()
def merge(
    span: Span,
    segment: Segment,
    wire: torch.Tensor,
    rest: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> None:
    """Add a product to a matrix's masters, in place, each rounded once.

    Args:
        span: What the buffers hold.
        segment: The matrix.
        wire: Of the span, as ``rest``: see :func:`zo_offload.ops.update`.
        rest: Likewise.
        left: fp32 ``[rows, rank]``, on their device.
        right: fp32 ``[columns, rank]``.
    """
    with torch_ops.denormals_kept():
        for rows, part in _parts(segment, left, right):
            resting = rest[part] if span.rest_bytes else rest
            master = torch_ops.load_master(span, wire[part], resting)
            master.add_(product(left[rows], right).view(-1))
            kernels.store_master(span, master, wire[part], resting)


@torch.inference_mode()
def add_product(
    segment: Segment,
    wire: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Write a copy of a matrix with a product added, rounded as masters are.

    Args:
        segment: The matrix in its span.
        wire: Elements of the span, in the forward's dtype.
        out: The same dtype: rows ``first .. last``, flat.
        left: fp32 ``[rows, rank]``, of all rows.
        right: fp32 ``[columns, rank]``.
        first: Row that it begins at.
        last: Row that it ends before (default: the end).
    """
    with torch_ops.denormals_kept():
        begin = first * len(right)
        inside = left[first:last]
        for rows, part in _parts(segment, inside, right, begin):
            value = (
                wire[part].to(torch.float32, copy=True).add_(product(inside[rows], right).view(-1))
            )
            at = part.start - segment.start - begin
            kernels.encode(out.dtype, value, out[at : at + len(value)])


@torch.inference_mode()
def rows_with_product(
    table: torch.Tensor, indices: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Some rows ``[n, columns]`` of a table with a product added: the bits of :func:`add_product`.

    Args:
        table: ``[rows, columns]`` in the forward's dtype.
        indices: ``[n]`` row numbers, repetition allowed.
        left: fp32 ``[rows, rank]``.
        right: fp32 ``[columns, rank]``.
    """
    out = table.new_empty(len(indices), table.shape[1])
    with torch_ops.denormals_kept():
        value = table.index_select(0, indices).float()
        if len(indices):
            value.add_(product(left.index_select(0, indices), right))
        kernels.encode(out.dtype, value.view(-1), out.view(-1))
    return out


def _parts(
    segment: Segment, left: torch.Tensor, right: torch.Tensor, begin: int = 0
) -> Iterator[tuple[slice, slice]]:
    """Rows at a time, and where their elements lie in the span."""
    columns = len(right)
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, len(left), step):
        rows = slice(first, min(first + step, len(left)))
        start = segment.start + begin
        yield rows, slice(start + rows.start * columns, start + rows.stop * columns)
