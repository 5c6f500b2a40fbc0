"""Overlays at work: values, as they are or perturbed, written into what the scratch holds."""

from collections.abc import Callable, Sequence

import torch

from zo_offload import ops
from zo_offload.offload.arena import Arena
from zo_offload.ops import ALIGNMENT, Draw, Span
from zo_offload.trainable.overlay import Base
from zo_offload.units import ModelMap, Overlaid, Unit

PURPOSE = "overlays"


class Overlays:
    """What a model's overlays need on the device, and how they get into the scratch.

    The values of a unit are perturbed in one pass, then written where they belong.

    Args:
        model_map: Of the model.
        arena: Where places and perturbed values lie.
        direction: Distribution of z.
    """

    def __init__(self, model_map: ModelMap, arena: Arena, direction: str) -> None:
        self._overlaid = model_map.overlaid
        self._direction = direction
        self._places: dict[int, list[torch.Tensor | None]] = {
            index: [_kept(each, arena) for each in overlaid]
            for index, overlaid in self._overlaid.items()
        }
        self._perturbed = torch.empty(0)
        if self._overlaid:
            self._perturbed = arena.take(PURPOSE, perturbed_bytes(model_map)).view(torch.float32)

    def write(
        self,
        unit: Unit,
        draw: Draw | None,
        values_of: Callable[[Span], torch.Tensor],
        wires: Sequence[torch.Tensor],
        scratch: torch.Tensor,
    ) -> None:
        """Write a unit's overlays into the scratch that holds it.

        Args:
            unit: Which.
            draw: Along which values are perturbed (None: not).
            values_of: An ambient span's elements on the device.
            wires: What each span was decoded from.
            scratch: To write.
        """
        overlaid = self._overlaid[unit.index]
        source, start, stop = _reach(overlaid)
        values = values_of(source)[start:stop]
        if draw is not None:
            perturbed = self._perturbed[: stop - start]
            ops.perturb(
                source, values_of(source), perturbed, self._direction, draw, start, stop - start
            )
            values = perturbed
        wire_of = dict(zip(unit.spans, wires, strict=True))
        for each, places in zip(overlaid, self._places[unit.index], strict=True):
            _, span, segment = each.place
            first, last = _range(each)
            target = span.plain(scratch)[segment.start : segment.start + segment.numel]
            base = Base(span, segment, wire_of[span])
            each.patch.write(target, values[first - start : last - start], places, base)


def kept_bytes(model_map: ModelMap) -> int:
    """On the device, beside the values: places, and room for a unit's perturbed values."""
    parts = [each.patch.places for of_unit in model_map.overlaid.values() for each in of_unit]
    return sum(p.nbytes for p in parts if p is not None) + perturbed_bytes(model_map)


def perturbed_bytes(model_map: ModelMap) -> int:
    """Of the values of any unit, perturbed."""
    reaches = map(_reach, model_map.overlaid.values())
    return max((stop - start for _, start, stop in reaches), default=0) * torch.float32.itemsize


def _kept(overlaid: Overlaid, arena: Arena) -> torch.Tensor | None:
    places = overlaid.patch.places
    if places is None:
        return None
    kept = arena.take(PURPOSE, places.nbytes).view(places.dtype)
    return kept.copy_(places)


def _range(overlaid: Overlaid) -> tuple[int, int]:
    """First and last element of a patch's values in their span."""
    _, _, segment = overlaid.values
    values = overlaid.patch.values
    return segment.start + values.start, segment.start + values.stop


def _reach(overlaid: Sequence[Overlaid]) -> tuple[Span, int, int]:
    """The stretch of whole blocks that holds a unit's values: they lie side by side."""
    spans = {id(each.values[1]): each.values[1] for each in overlaid}
    (span,) = spans.values()
    ranges = [_range(each) for each in overlaid]
    start = min(first for first, _ in ranges) // ALIGNMENT * ALIGNMENT
    stop = -(-max(last for _, last in ranges) // ALIGNMENT) * ALIGNMENT
    return span, start, stop
