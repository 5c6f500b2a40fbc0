"""Steps with momentum as plainly as can be, to be read beside ``parity.plain``."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from parity import plain
from zo_offload.config import ZOConfig


class MomentumLoop:
    """Takes steps as :func:`plain.train_step` does, with the update of a config.

    Keys of the config's ``update`` are written out: momentum, or beta1, beta2 and adam_eps; window.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[float], set[str]]] = []  # number, slopes, what moved
        self.square = 0.0

    def __call__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        batches: Sequence[Any],
        config: ZOConfig,
        step: int,
        lr: float,
        scales: Mapping[str, float],
    ) -> list[float]:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = plain.train_step(model, loss, batches, config, step, 0.0, scales)
        limit = config.clip or math.inf
        grads = [min(max(g, -limit), limit) for g in plain.projected_grads(losses, config)]
        moving = {name for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append((step, grads, moving))
        terms = self.terms(model, config, lr, scales)
        for name, p in model.named_parameters():
            along = [term[name] for term, moved in terms if name in moving & moved]
            p.data.copy_(before[name] - sum(along[1:], along[0]) if along else before[name])
        return losses

    def terms(
        self, model: nn.Module, config: ZOConfig, lr: float, scales: Mapping[str, float]
    ) -> list[tuple[dict[str, torch.Tensor], set[str]]]:
        """Of every direction in the window, the oldest first; and which parameters it moved."""
        update, count = config.update, config.probes
        assert update.window is not None
        beta, rate = update.momentum, lr
        if update.type == "adam":
            beta, rate = update.beta1, self.adams(config, lr)
        assert beta is not None
        found, power = [], 1.0
        for step, grads, moved in reversed(self.steps[-update.window :]):
            for probe in reversed(range(count)):
                coefficient = rate * power * grads[probe] / count
                draw = step, probe
                found.append((plain.noise(model, config, draw, coefficient, scales), moved))
            power *= beta
        return found[::-1]

    def adams(self, config: ZOConfig, lr: float) -> float:
        """The rate of the step, from all slopes so far."""
        update, number = config.update, len(self.steps)
        assert update.beta1 is not None
        assert update.beta2 is not None
        assert update.adam_eps is not None
        first = second = 1.0
        for _ in range(number):
            first, second = first * update.beta1, second * update.beta2
        mean_square = sum((g / config.probes) ** 2 for g in self.steps[-1][1])
        self.square = self.square * update.beta2 + (1.0 - update.beta2) * mean_square
        root = math.sqrt(self.square) / math.sqrt(1.0 - second)
        return lr * ((1.0 - update.beta1) / (1.0 - first)) / (root + update.adam_eps)
