"""A model with overlays in plain torch: values are parameters, written into copies of matrices."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from zo_offload.codec import groups
from zo_offload.ops import ALIGNMENT, Layout, layout_of
from zo_offload.trainable.overlay import Overlay
from zo_offload.trainable.scales import Scaled
from zo_offload.trainable.sparse import Chosen


class LaidOver(nn.Module):
    """Its parameters are the model's, as ``wire`` makes its packed matrices, then the overlays'."""

    def __init__(self, model: nn.Module, overlays: Sequence[Overlay], wire: str | None) -> None:
        super().__init__()
        self.inside = model
        self.overlays = overlays
        self.layout = layout_of(wire or "identity")
        self.codes: dict[str, torch.Tensor] = {}
        if self.layout.group:
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and ".layers." in name:
                    self.codes[name], scales = coded(parameter.data, self.layout)
                    parameter.data = times(self.codes[name], scales, parameter.shape)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.inside.named_parameters(*args, **kwargs)
        for overlay in self.overlays:
            yield overlay.name, overlay.parameter

    def matrices(self) -> dict[str, torch.Tensor]:
        """As the forward is to see them."""
        found = dict(self.inside.named_parameters())
        return {
            each.matrix: written(found[each.matrix], each, self.codes.get(each.matrix))
            for each in self.overlays
        }

    def forward(self, **batch: Any) -> Any:
        return functional_call(self.inside, self.matrices(), (), batch)


def coded(matrix: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """``[groups, group]`` codes of an fp32 matrix, padded, and ``[groups]`` scales; by NumPy."""
    elements = -(-matrix.numel() // ALIGNMENT) * ALIGNMENT
    values = np.zeros(elements, np.float32)
    values[: matrix.numel()] = matrix.numpy().reshape(-1)
    packed = groups.encode(layout, values)
    scales = groups.group_scales(layout, packed, elements)
    codes = groups.decode(layout, packed, elements, np.ones_like(scales))
    return torch.from_numpy(codes).view(-1, layout.group), torch.from_numpy(scales)


def times(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return (codes * scales.unsqueeze(1)).view(-1)[: shape.numel()].view(shape)


def written(
    matrix: torch.Tensor, overlay: Overlay, codes: torch.Tensor | None = None
) -> torch.Tensor:
    if isinstance(overlay, Scaled):
        assert codes is not None
        return times(codes, overlay.parameter.data, matrix.shape)
    assert isinstance(overlay, Chosen)
    flat = matrix.detach().reshape(-1).clone()
    for place, value in zip(overlay.indices.tolist(), overlay.parameter.data, strict=True):
        flat[place] = value
    return flat.view(matrix.shape)


def reference_of(
    prepared: nn.Module, overlays: Sequence[Overlay], wire: str | None = None
) -> nn.Module:
    return LaidOver(prepared, overlays, wire) if overlays else prepared
