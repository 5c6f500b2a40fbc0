"""Products of several lanes with one matrix, computed as one: the matrix is read once for all.

With few rows a product is bound by reading its matrix, and where the matrix is the same along every
draw (a frozen base, or one that moves by small factors) the lanes of a micro-batch can share that.
Each stops at the product; when all that will come have come, the first computes it on everybody's
rows, one below the other, and each takes its own.

Only lanes of one micro-batch are joined, all of whose draws are in one visit, and only while they
came the same way through the units: so neither the number of ranks nor what else is in the visit
decides who shares a product, and with that its last bits.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from zo_offload.errors import ModelError
from zo_offload.unmanageable import is_compiled
from zo_offload.weights import Weights

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Meeting:
    """A lane that stands before a product.

    Attributes:
        key: Equal for those that may share it: micro-batch, way, matrix, shape and dtype of input.
        input: ``[..., columns]``.
        together: Everybody's, in the order of lanes, when all have come.
        result: Of this lane, once one of them has computed it.
    """

    key: Hashable
    input: torch.Tensor
    together: "Sequence[Meeting]" = ()
    result: torch.Tensor | None = None

    def take(self, product: Product) -> torch.Tensor:
        """This lane's result: the first computes it for all.

        Example:
            >>> meetings = [Meeting("key", torch.full((1, 2), i)) for i in (1.0, 2.0)]
            >>> gather(meetings)
            >>> meetings[0].take(lambda x: 10 * x), meetings[1].take(torch.neg)
            (tensor([[10., 10.]]), tensor([[20., 20.]]))
        """
        if self.result is None:
            self._compute(product)
        result, self.result, self.together = self.result, None, ()  # else they hold each other
        assert result is not None
        return result

    def _compute(self, product: Product) -> None:
        if len(self.together) < 2:
            self.result = product(self.input)
            return
        rows = [each.input.reshape(-1, each.input.shape[-1]) for each in self.together]
        parts = product(torch.cat(rows)).split([len(each) for each in rows])
        for each, part in zip(self.together, parts, strict=True):
            each.result = part.view(*each.input.shape[:-1], part.shape[-1])


def gather(meetings: Sequence[Meeting]) -> None:
    """Tell each who is at the same product."""
    groups: dict[Hashable, list[Meeting]] = {}
    for meeting in meetings:
        groups.setdefault(meeting.key, []).append(meeting)
    for group in groups.values():
        for meeting in group:
            meeting.together = group


class SharedMatrices:
    """Which parameters in units are the same along every draw, and so may be multiplied with once.

    Args:
        weights: Of the model.
        most_rows: Rows of an input up to which a product is joined with others.

    Raises:
        ModelError: A unit is compiled.
    """

    def __init__(self, weights: Weights, most_rows: int) -> None:
        _refuse_compiled_units(weights)
        self._most_rows = most_rows
        model_map = weights.map
        self._ids = {
            id(model_map.parameters[segment.name])
            for unit in model_map.units
            if unit.index not in model_map.overlaid
            and all(not span.trainable or model_map.is_low_rank(span) for span in unit.spans)
            for _, segment in unit.segments
            if len(model_map.places[segment.name]) == 1
        }

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._ids

    def joins(self, matrix: object, input: torch.Tensor) -> bool:
        """Whether a lane stops before this product."""
        return matrix in self and 0 < input.numel() <= self._most_rows * input.shape[-1]


def _refuse_compiled_units(weights: Weights) -> None:
    """Lanes cannot stop inside compiled code."""
    for unit, module in zip(weights.map.units, weights.map.modules, strict=True):
        if any(is_compiled(part) for part in module.modules()):
            raise ModelError(
                f"{unit.name} is compiled, and lanes cannot stop at its products in compiled code; "
                "leave it as it is, or leave zeroth_order.joined_rows out"
            )
