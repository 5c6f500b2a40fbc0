"""What is done to a model itself, beside its parameters, so that lanes can run it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def cast_buffers(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Move buffers to the device; those that a checkpoint holds take the forward's dtype."""
    saved = set(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            casts = (
                dtype is not None
                and buffer.is_floating_point()
                and f"{path}.{name}".lstrip(".") in saved
            )
            module._buffers[name] = buffer.to(device=device, dtype=dtype if casts else None)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switch key-value caches off, which a training lane would fill and never read."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    switched = [c for c in configs.values() if getattr(c, "use_cache", False)]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True
