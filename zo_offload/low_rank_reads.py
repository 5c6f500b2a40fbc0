"""Matrices that move by products of small factors, as the forward reads them.

``F.linear``, which is nearly all that reads them, is given the product with the matrix as it is, to
which a product with the small factors is added: ``x W^T + (x V) L^T``. So one copy of the matrix
serves every probe and sign. Rows of a table are corrected as they are gathered. Whatever else reads
such a matrix is given a perturbed copy, which costs a pass over it for every draw.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from zo_offload.factors import AmbientFactors, Pair
from zo_offload.offload.planner import unit_copy
from zo_offload.ops import Draw, Segment, Span, rank_sums
from zo_offload.units import ModelMap
from zo_offload.weights import Weights

PURPOSE = "unit copies"


class LowRankReads:
    """Of a model.

    Args:
        weights: Hold its matrices.
        num_draws: Of a step.
        copied: Names of matrices in units that are surely read by something else than a product.
    """

    def __init__(self, weights: Weights, num_draws: int, copied: Collection[str]) -> None:
        self._weights = weights
        self.ambient = AmbientFactors(weights, num_draws)
        self._in_units: dict[int, tuple[int, Span, Segment]] = {}
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._held: dict[tuple[int, int], tuple[str, Draw]] = {}
        self.names: set[str] = set()  # of those that have been copied
        self.addresses: set[int] = set()
        for unit in weights.map.units:
            for span, segment in unit.segments:
                if weights.map.is_low_rank(span):
                    parameter = weights.map.parameters[segment.name]
                    self._in_units[id(parameter)] = unit.index, span, segment
                    if segment.name in copied:
                        self._buffer(span, segment)

    def pair(self, parameter: object, unit: int, draw: Draw | None) -> Pair | None:
        """Factors of a matrix in the unit at hand; None for any other, and where it is merged."""
        index, _, segment = self._in_units.get(id(parameter), (None, None, None))
        if draw is None or segment is None or index != unit:
            return None
        assert self._weights.factors is not None
        return self._weights.factors.pair(segment.name)

    def copy(self, parameter: object, pair: Pair, draw: Draw) -> torch.Tensor:
        """A matrix of the unit at hand, perturbed along ``draw``, until another lane runs."""
        _, span, segment = self._in_units[id(parameter)]
        key, buffer = self._buffer(span, segment)
        if self._held.get(key) != (segment.name, draw):
            source = self._weights.scratch_view(span, segment).view(-1)
            alone = span.alone(segment).segments[0]
            rank_sums.add_product(alone, source, buffer, *pair)
            self._held[key] = segment.name, draw
        self.names.add(segment.name)
        return buffer[: segment.numel].view(segment.shape)

    def invalidate(self) -> None:
        """A visit begins."""
        self.ambient.invalidate()
        self._held.clear()

    def _buffer(self, span: Span, segment: Segment) -> tuple[tuple[int, int], torch.Tensor]:
        """Units of one shape share a copy's memory."""
        key = unit_copy(span, segment)
        if key not in self._buffers:
            self._buffers[key] = self._weights.arena.take(PURPOSE, key[1]).view(span.dtype)
            self.addresses.add(self._buffers[key].untyped_storage().data_ptr())
        return key, self._buffers[key]


def corrected(product: torch.Tensor, input: torch.Tensor, pair: Pair) -> torch.Tensor:
    """Add ``(input V) L^T`` to a product with the matrix as it is, in place.

    Args:
        product: ``[..., rows]``, of the forward's dtype; it is rounded once more there.
        input: ``[..., columns]``.
        pair: L ``[rows, rank]`` and V ``[columns, rank]``.

    Example:
        >>> x, left, right = torch.ones(3, 2), torch.ones(4, 1), torch.tensor([[1.0], [2.0]])
        >>> corrected(torch.zeros(3, 4), x, (left, right))[0]
        tensor([3., 3., 3., 3.])
    """
    left, right = pair
    rows = input.reshape(-1, input.shape[-1])
    flat = product.view(-1, len(left))
    with torch.autocast(input.device.type, enabled=False):
        if product.dtype == torch.bfloat16:
            left, right = _in_bfloat16(left, right)
            flat.addmm_(F.linear(rows.to(product.dtype), right), left.t())
            return product
        # rows @ right would take four times as long
        projected = F.linear(rows.float(), right.t().contiguous())
        if product.dtype == torch.float32:
            flat.addmm_(projected, left.t())
        else:  # a float16 could not hold what is projected
            flat.add_(projected @ left.t())
    return product


def _in_bfloat16(left: torch.Tensor, right: torch.Tensor) -> Pair:
    """Factors ``[rows, 3 rank]`` and ``[3 rank, columns]`` that a library multiplies at once.

    Each is its high and its low half, 16 bits of precision: a step's ``eps U`` would else drown in
    what the interval's steps have gathered. Products in fp32 would need a temporary as large as the
    result, which costs more than the matrix itself.
    """
    (l_high, l_low), (r_high, r_low) = _halves(left), _halves(right)
    lefts = torch.cat([l_high, l_low, l_high], 1)
    return lefts, torch.cat([r_high, r_high, r_low], 1).t().contiguous()


def _halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def read_otherwise(model: nn.Module, model_map: ModelMap) -> set[str]:
    """Names of the matrices that move so and that some module owns which may read them otherwise.

    A linear layer multiplies, an embedding gathers; what belongs to any other class is counted as
    read whole. Should code read one of the others whole, it shows when that happens.
    """
    readers: dict[int, bool] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            plain = type(module) is nn.Linear or isinstance(module, nn.Embedding)
            readers[id(parameter)] = readers.get(id(parameter), True) and plain
    return {
        segment.name
        for unit in model_map.everything
        for segment in model_map.low_rank_segments(unit)
        if not readers[id(model_map.parameters[segment.name])]
    }
