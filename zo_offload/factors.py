"""Small factors at work: those of the unit at hand, and those of ambient matrices.

A visit takes a matrix W that moves by products as it is; what its steps have done since W was
merged, and the direction of a draw, are in the left factor: ``W + L V^T`` with ``L = -A + eps U``.
Factors are made in host memory, by the same kernels as everywhere, and copied to the device: they
are a hundredth of a matrix. It is pageable, and so is read before the call that copies returns.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from zo_offload.offload.arena import Arena
from zo_offload.ops import Draw, StepUpdate, rank_sums
from zo_offload.ops.rank_sums import FactorLayout
from zo_offload.units import ModelMap, Unit

PURPOSE = "factors"
Pair = tuple[torch.Tensor, torch.Tensor]  # left [rows, rank] and right [columns, rank]


class Holder(Protocol):
    """Who has the weights; see ``Masters``."""

    map: ModelMap
    arena: Arena
    direction: str
    history: Sequence[StepUpdate]

    def in_factor(self) -> tuple[Draw, ...]:
        """What the left factors hold at the next step's visit."""
        ...


class UnitFactors:
    """Of the unit in the scratch, along one draw at a time.

    Args:
        weights: Which.
    """

    def __init__(self, weights: Holder) -> None:
        self._weights = weights
        self._layouts = _layouts(weights.map)
        left, right = _largest(list(self._layouts.values()))
        self._left = weights.arena.take(PURPOSE, left).view(torch.float32)
        self._right = weights.arena.take(PURPOSE, right).view(torch.float32)
        self._total = torch.empty(0)
        self._unit: tuple[int, int] | None = None
        self._draw: Draw | None = None

    def load(self, unit: Unit, draw: Draw) -> None:
        """Let the factors be the unit's, along ``draw``."""
        layout = self._layouts.get(unit.index)
        if layout is None:
            return
        at = unit.index, len(self._weights.history)
        if self._unit != at:
            self._total = _gathered(self._weights, layout)
            right = _basis(self._weights, layout, draw)
            self._right[: len(right)].copy_(right, non_blocking=True)
            self._unit, self._draw = at, None
        if self._draw != draw:
            left = _along(self._weights, layout, self._total, draw)
            self._left[: len(left)].copy_(left, non_blocking=True)
            self._draw = draw

    def pair(self, name: str) -> Pair:
        """Of a matrix of the unit at hand."""
        assert self._unit is not None
        layout = self._layouts[self._unit[0]]
        return layout.lefts(self._left, name), layout.rights(self._right, name)

    def invalidate(self) -> None:
        """The scratch holds no unit."""
        self._unit = None


class AmbientFactors:
    """Of the ambient matrices: V of the interval, and a left factor for each draw of a step.

    Args:
        weights: Which.
        num_draws: Of a step; a visit of more makes them again.
    """

    def __init__(self, weights: Holder, num_draws: int) -> None:
        self._weights = weights
        self._num_draws = num_draws
        self._layouts = {
            segment.name: weights.map.factors_of([segment])
            for segment in weights.map.low_rank_segments(weights.map.ambient)
        }
        self._memory = {
            name: [
                weights.arena.take(PURPOSE, span.wire_bytes).view(torch.float32)
                for span in (layout.right, *[layout.left] * num_draws)
            ]
            for name, layout in self._layouts.items()
        }
        self._slots: dict[Draw | None, int] = {}
        self._held: dict[tuple[str, int], Draw | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._layouts

    def pair(self, name: str, draw: Draw | None) -> Pair | None:
        """Of a matrix along a draw (None: as it is); None where there is nothing to be added."""
        gathered = self._weights.in_factor()
        if draw is None and not gathered:
            return None
        layout, (right, *lefts) = self._layouts[name], self._memory[name]
        slot = self._slots.setdefault(draw, len(self._slots) % self._num_draws)
        if not any(held == name for held, _ in self._held):  # V is that of all draws of a visit
            basis = _basis(self._weights, layout, draw or gathered[0])
            right.copy_(basis, non_blocking=True)
        if (name, slot) not in self._held or self._held[name, slot] != draw:
            left = _gathered(self._weights, layout)
            if draw is not None:
                left = _along(self._weights, layout, left, draw)
            lefts[slot].copy_(left, non_blocking=True)
            self._held[name, slot] = draw
        return layout.lefts(lefts[slot], name), layout.rights(right, name)

    def invalidate(self) -> None:
        """A visit begins."""
        self._slots.clear()
        self._held.clear()


def factor_bytes(model_map: ModelMap, num_draws: int) -> int:
    """What both take on the device."""
    if model_map.low_rank is None:
        return 0
    ambient = [
        model_map.factors_of([segment])
        for segment in model_map.low_rank_segments(model_map.ambient)
    ]
    return sum(_largest(list(_layouts(model_map).values()))) + sum(
        each.right.wire_bytes + num_draws * each.left.wire_bytes for each in ambient
    )


def _layouts(model_map: ModelMap) -> dict[int, FactorLayout]:
    """Of the units that have any, by index."""
    return {
        unit.index: model_map.factors_of(segments)
        for unit in model_map.units
        if (segments := model_map.low_rank_segments(unit))
    }


def _largest(layouts: Sequence[FactorLayout]) -> tuple[int, int]:
    """Bytes of the left and of the right factors of any of them."""
    left = max((layout.left.wire_bytes for layout in layouts), default=0)
    return left, max((layout.right.wire_bytes for layout in layouts), default=0)


def _gathered(weights: Holder, layout: FactorLayout) -> torch.Tensor:
    return rank_sums.gathered(layout, weights.direction, weights.in_factor())


def _along(weights: Holder, layout: FactorLayout, total: torch.Tensor, draw: Draw) -> torch.Tensor:
    left = torch.empty_like(total)
    rank_sums.along(layout, weights.direction, total, draw, left)
    return left


def _basis(weights: Holder, layout: FactorLayout, draw: Draw) -> torch.Tensor:
    assert weights.map.low_rank is not None
    interval = len(weights.history) // weights.map.low_rank.interval
    return rank_sums.basis(layout, weights.direction, draw.seed, interval)
