"""Parameters that several units divide along their first axis: their parts, and the whole again."""

from collections.abc import Iterable

import torch

from zo_offload.ops import Segment
from zo_offload.views import address_of


def part_of(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """What a segment holds of its parameter, a view."""
    if tensor.shape == segment.shape:
        return tensor
    first = segment.offset // (segment.numel // segment.shape[0])
    return tensor[first : first + segment.shape[0]]


def together(shape: torch.Size, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Parts along the first axis as one tensor, of the first one's device; a whole one as it is."""
    rest = iter(parts)
    first = next(rest)
    if first.shape == shape:
        return first
    whole = first.new_empty(shape)
    whole[: len(first)] = first
    done = len(first)
    for part in rest:
        whole[done : done + len(part)] = part
        done += len(part)
    assert done == len(whole)
    return whole


def joined(shape: torch.Size, parts: list[torch.Tensor]) -> torch.Tensor:
    """The same of parts at hand: a view of neighbours; of several devices, on the CPU."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if _side_by_side(parts):
        return first.as_strided(shape, first.stride(), first.storage_offset())
    if len({part.device for part in parts}) > 1:  # one device's budget is full
        parts = [part.cpu() for part in parts]
    return together(shape, parts)


def _side_by_side(parts: list[torch.Tensor]) -> bool:
    first = parts[0]
    expected = first.storage_offset()
    for part in parts:
        same = address_of(part) == address_of(first) and part.stride() == first.stride()
        if not same or part.storage_offset() != expected:
            return False
        expected += len(part) * part.stride(0)
    return True
