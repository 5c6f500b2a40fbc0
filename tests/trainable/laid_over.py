"""A model with overlays in plain torch: values are parameters, written into copies of matrices."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from zo_offload.trainable.overlay import Overlay
from zo_offload.trainable.sparse import Chosen


class LaidOver(nn.Module):
    """Its parameters are the model's, then the overlays'."""

    def __init__(self, model: nn.Module, overlays: Sequence[Overlay]) -> None:
        super().__init__()
        self.inside = model
        self.overlays = overlays

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.inside.named_parameters(*args, **kwargs)
        for overlay in self.overlays:
            yield overlay.name, overlay.parameter

    def matrices(self) -> dict[str, torch.Tensor]:
        """As the forward is to see them."""
        found = dict(self.inside.named_parameters())
        return {each.matrix: written(found[each.matrix], each) for each in self.overlays}

    def forward(self, **batch: Any) -> Any:
        return functional_call(self.inside, self.matrices(), (), batch)


def written(matrix: torch.Tensor, overlay: Overlay) -> torch.Tensor:
    assert isinstance(overlay, Chosen)
    flat = matrix.detach().reshape(-1).clone()
    for place, value in zip(overlay.indices.tolist(), overlay.parameter.data, strict=True):
        flat[place] = value
    return flat.view(matrix.shape)


def reference_of(prepared: nn.Module, overlays: Sequence[Overlay]) -> nn.Module:
    return LaidOver(prepared, overlays) if overlays else prepared
