"""``sparse``: the weights that a mask names move, in fp32, over a frozen base.

They are few (0.1 % by default), so that they stay on the device, as do parameters that are named to
move whole beside them, and the base may rest and travel in four bits: a unit is decoded once a
visit, and for every probe and sign the chosen weights alone are written over it. They begin at the
values that the model came with, which no codec has rounded.

Reference:
    Guo et al. (2024), arXiv 2406.02913, section 3. Deviation: the base may be of any codec here.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload.errors import ConfigError
from zo_offload.mask import check_mask, read_mask
from zo_offload.ops import Segment
from zo_offload.trainable.laid_over import LaidOver
from zo_offload.trainable.moving import Moving
from zo_offload.trainable.overlay import Base, Overlay, Patch
from zo_offload.trainable.selection import PATH, by_name, matrices_of
from zo_offload.trainable.trainable import Trainable

SMALL = 2**31  # places below this are kept in four bytes


@dataclass(frozen=True)
class Scattered(Patch):
    """Values at places of their own."""

    indices: torch.Tensor

    @property
    def places(self) -> torch.Tensor:
        """See :class:`Patch`: positions in the part."""
        return self.indices

    def write(
        self, target: torch.Tensor, values: torch.Tensor, places: torch.Tensor | None, base: Base
    ) -> None:
        """See :class:`Patch`."""
        assert places is not None
        target.index_copy_(0, places.long(), values.to(target.dtype))


@dataclass(frozen=True)
class Chosen(Overlay):
    """The weights of a matrix that a mask names.

    Attributes:
        indices: int64, rising, into the flat matrix.

    Example:
        >>> overlay = Chosen("w", nn.Parameter(torch.tensor([7.0, 8.0])), torch.tensor([1, 5]))
        >>> overlay.patch(Segment("w", 0, (4,), 0, offset=4)).values
        range(1, 2)
    """

    indices: torch.Tensor

    @property
    def name(self) -> str:
        """See :class:`Overlay`."""
        return f"{self.matrix}.sparse"

    def patch(self, segment: Segment) -> Scattered:
        """See :class:`Overlay`."""
        ends = torch.tensor([segment.offset, segment.offset + segment.numel])
        first, last = torch.searchsorted(self.indices, ends).tolist()
        places = self.indices[first:last] - segment.offset
        dtype = torch.int32 if segment.numel <= SMALL else torch.int64
        return Scattered(range(first, last), places.to(dtype))


class Sparse(LaidOver):
    """A static mask."""

    mode = "sparse"

    def prepare(self, model: nn.Module) -> nn.Module:
        """See :class:`LaidOver`."""
        path = self._config.trainable.mask
        if path is None:
            raise ConfigError(
                f"{PATH}.mask: {self.mode} needs one, found null; write the path of a mask"
            )
        prepared = super().prepare(model)
        overlays = tuple(self._overlays(model, Path(path)))
        whole = self._whole(model, {overlay.matrix for overlay in overlays})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in whole)
        self.moving = Moving(resident=frozenset(whole), overlays=overlays)
        return prepared

    def _overlays(self, model: nn.Module, path: Path) -> Iterator[Overlay]:
        """In the model's order; on the meta device they have sizes and no values."""
        mask = read_mask(path)
        matrices = matrices_of(model, self._config.unit)
        check_mask(path, mask, {name: tuple(p.shape) for name, p in matrices.items()})
        for name, parameter in matrices.items():
            if name in mask.chosen:
                indices = mask.chosen[name].indices
                values = parameter.detach().reshape(-1)[indices.to(parameter.device)].float()
                values = values if values.is_meta else values.cpu()
                yield Chosen(name, nn.Parameter(values), indices)

    def _whole(self, model: nn.Module, masked: set[str]) -> set[str]:
        """What moves beside the mask's weights, all of it."""
        patterns = self._config.trainable.parameters
        whole = by_name(model, patterns) if patterns is not None else set()
        for name in sorted(whole & masked):
            raise ConfigError(
                f"{PATH}.parameters: {name} would move whole, and the mask chooses some of its "
                "weights; leave it out of one of the two"
            )
        moved = {n for n, p in model.named_parameters() if n in whole and self._flags[p]}
        if whole and not moved:
            raise ConfigError(
                f"{PATH}.parameters: all {len(whole)} that it names are frozen "
                "(requires_grad_(False)); leave it out, or let some move"
            )
        return moved

    def header(self, model: nn.Module) -> dict[str, Any]:
        """See :class:`Trainable`; with the digest of the places."""
        total = hashlib.sha256()
        for overlay in self.moving.overlays:
            assert isinstance(overlay, Chosen)
            total.update(f"{overlay.matrix} {len(overlay.indices)}\n".encode())
            total.update(overlay.indices.numpy().data)
        whole = Trainable.header(self, model) if self.moving.resident else {}
        return {"trainable": {"mode": self.mode, **whole.get("trainable", {}),
                              "mask": total.hexdigest()}}  # fmt: skip
