"""A zeroth-order step in plain torch, to be read beside arXiv 2305.17333, algorithms 1 and 2.

What the package does with stores, lanes and kernels is held to this, bit for bit. Only the noise is
the package's own (``ops.reference``, plain NumPy), because its bits are a convention.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.ops import reference

Scales = Mapping[str, float]


def noise(
    model: nn.Module, config: ZOConfig, draw: tuple[int, int], coefficient: float, scales: Scales
) -> dict[str, torch.Tensor]:
    """``coefficient * scale * z`` of every trainable parameter, for a draw ``(step, probe)``."""
    distribution = reference.DIRECTIONS[config.direction]
    return {
        name: torch.from_numpy(
            distribution(config.seed, *draw, i, 0, p.numel(), coefficient * scales.get(name, 1.0))
        ).view(p.shape)
        for i, (name, p) in enumerate(model.named_parameters())
        if p.requires_grad
    }


def projected_grads(losses: list[float], config: ZOConfig) -> list[float]:
    """One a probe, from losses in (probe, sign) order."""
    width = config.eps
    if config.fitness != "raw":
        width, array = 1.0, np.array(losses)
        if config.fitness == "ranks":
            losses = (array.argsort().argsort() / (len(losses) - 1) - 0.5).tolist()
        else:
            losses = [(x - sum(losses) / len(losses)) / statistics.stdev(losses) for x in losses]
    if config.estimator == "spsa":
        return [(a - b) / (2 * width) for a, b in zip(losses[::2], losses[1::2], strict=True)]
    mean, count = sum(losses) / len(losses), len(losses)
    return [count / (count - 1) * (loss - mean) / width for loss in losses]


@torch.inference_mode()
def train_step(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    batches: Sequence[Any],
    config: ZOConfig,
    step: int,
    lr: float,
    scales: Scales,
) -> list[float]:
    """Take a step in place; returns the losses at ``W + eps z`` and ``W - eps z`` of each probe."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses: list[float] = []
    terms: list[dict[str, torch.Tensor]] = []
    for probe in range(config.probes):
        for coefficient in [sign * config.eps for sign in config.signs]:
            shift = noise(model, config, (step, probe), coefficient, scales)
            for name, p in model.named_parameters():
                p.copy_(before[name] + shift.get(name, 0.0))
            losses.append(sum(float(loss(model, batch)) for batch in batches) / len(batches))
    for probe, projected_grad in enumerate(projected_grads(losses, config)):
        if config.clip is not None:
            projected_grad = min(max(projected_grad, -config.clip), config.clip)
        terms.append(
            noise(model, config, (step, probe), lr * projected_grad / config.probes, scales)
        )
    for name, p in model.named_parameters():
        p.copy_(
            before[name] - sum(term[name] for term in terms) if p.requires_grad else before[name]
        )
    return losses
