"""``scales``: the group scales of a base of integers move, in fp32; its codes never do.

A scale stands for 64 or 128 weights, so that what moves is a fiftieth of the base's bytes and
stays on the device. A unit is decoded anew for every probe and sign, from the same four or eight
bits a weight and other scales. They begin at the base's own, so that the first forward is the bits
of the frozen base's.

Reference:
    Shang et al. (2025), arXiv 2505.13430: ``s = max(s - lr * clip(g) * z, 0)``; what is perturbed
    may be below zero, as there. Deviation: scales alone move, not the vectors beside them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zo_offload import ops
from zo_offload.config import ZOConfig
from zo_offload.config_trainable import integer_layout
from zo_offload.errors import ConfigError
from zo_offload.granularity import GRANULARITIES
from zo_offload.ops import ALIGNMENT, Layout, Segment
from zo_offload.trainable.laid_over import LaidOver
from zo_offload.trainable.moving import Moving
from zo_offload.trainable.overlay import Base, Overlay, Patch
from zo_offload.trainable.selection import PATH, selected
from zo_offload.units import forward_dtype, in_units

CLIP = 100.0  # the paper's
PART = 1 << 20  # elements that are packed at once to find their scales


@dataclass(frozen=True)
class Rescaled(Patch):
    """Scales of whole groups, one after the other."""

    covers = True

    @property
    def places(self) -> None:
        """See :class:`Patch`."""
        return None

    def write(
        self, target: torch.Tensor, values: torch.Tensor, places: torch.Tensor | None, base: Base
    ) -> None:
        """See :class:`Patch`: codes times scales in fp32, rounded once."""
        span, start = base.span, base.segment.start
        wire = base.wire.to(target.device)  # which differ where a single weight is read
        decode = partial(ops.unpack, span.layout, wire, span.elements, span.dtype)
        whole = target.numel() // ALIGNMENT * ALIGNMENT
        groups = whole // span.layout.group
        if whole:
            decode(target[:whole], start, values[:groups])
        if whole < target.numel():
            last = torch.empty(ALIGNMENT, dtype=target.dtype, device=target.device)
            decode(last, start + whole, values[groups:])
            target[whole:].copy_(last[: target.numel() - whole])


@dataclass(frozen=True)
class Scaled(Overlay):
    """The group scales of a matrix.

    Attributes:
        group: Elements that share one.

    Example:
        >>> overlay = Scaled("w", nn.Parameter(torch.ones(6)), group=64)
        >>> overlay.patch(Segment("w", 0, (130,), 0, offset=128)).values
        range(2, 6)
    """

    group: int
    non_negative = True

    @property
    def name(self) -> str:
        """See :class:`Overlay`."""
        return f"{self.matrix}.scales"

    def patch(self, segment: Segment) -> Rescaled:
        """See :class:`Overlay`."""
        first = segment.offset // self.group
        return Rescaled(range(first, first + segment.padded // self.group))


class Scales(LaidOver):
    """The group scales of all matrices in units, or of those that are chosen."""

    mode = "scales"
    clip = CLIP

    def __init__(self, config: ZOConfig) -> None:
        super().__init__(config)
        self._layout = integer_layout(config.wire)

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`LaidOver`."""
        prepared = super().prepare(model)
        overlays = tuple(self._overlays(model))
        if not overlays:
            raise ConfigError(
                f"{PATH}: none of the model's matrices in units is chosen, so that no scale moves"
                "; choose some, or leave parameters, kinds and layers out"
            )
        self.moving = Moving(overlays=overlays)
        return prepared

    def header(self, model: nn.Module) -> dict[str, Any]:
        """See :class:`Trainable`; with the digest of the matrices' names."""
        names = "\n".join(overlay.matrix for overlay in self.moving.overlays)
        said: dict[str, Any] = {
            "mode": self.mode,
            "group": self._layout.group,
            "matrices": hashlib.sha256(names.encode()).hexdigest(),
        }
        return {"trainable": said}

    def _overlays(self, model: nn.Module) -> Iterator[Scaled]:
        """In the model's order."""
        chosen = self._chosen(model)
        for name, parameter in model.named_parameters():
            if name in chosen and parameter.ndim > 1 and parameter.is_floating_point():
                dtype = forward_dtype(model, name, parameter, self.dtype)
                scales = initial_scales(parameter, self._layout, dtype)
                yield Scaled(name, nn.Parameter(scales), self._layout.group)

    def _chosen(self, model: nn.Module) -> set[str]:
        """Names of what travels with a unit, however far the budget will divide blocks."""
        config = self._config
        open_ = config.unit is None and config.device_budget is not None
        chosen = set.intersection(
            *(in_units(model, unit) for unit in (GRANULARITIES if open_ else (config.unit,)))
        )
        return chosen & selected(model, config.trainable, config.unit)


def initial_scales(values: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The group scales that packing gives a matrix, as its unit will be packed: fp32, on the CPU.

    Args:
        values: Of the matrix, any dtype and device.
        layout: With groups.
        dtype: What the forward computes in: packing rounds to it first.

    Example:
        >>> initial_scales(torch.full((1, 130), 7.0), ops.layout_of("int4"), torch.float32)
        tensor([1., 1.])
    """
    if values.is_meta:  # whose bytes are counted
        elements = -(-values.numel() // ALIGNMENT) * ALIGNMENT
        return torch.empty(elements // layout.group, device="meta")
    found = []
    for part in values.detach().reshape(-1).split(PART):
        padded = -(-len(part) // ALIGNMENT) * ALIGNMENT
        elements = torch.zeros(padded, dtype=dtype)
        ops.encode(dtype, part.to("cpu", torch.float32), elements[: len(part)])
        packed = torch.empty(layout.capacity(padded, dtype), dtype=torch.uint8)
        ops.pack(layout, elements, packed)
        found.append(ops.group_scales(layout, packed, padded, 0, padded))
    return torch.cat(found)
