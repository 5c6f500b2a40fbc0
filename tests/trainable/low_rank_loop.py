"""Low-rank steps in plain torch and NumPy, to be read beside arXiv 2410.07698, algorithms 1 and 2.

Every product of a linear layer is corrected by the small factors, every gathered row as well; at
the end of an interval a matrix takes what its factor has gathered. Only the noise is the package's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from zo_offload.config import ZOConfig
from zo_offload.ops import reference

BASIS = 3 << 16  # the counter's last word for V


class LowRankLoop:
    """Takes steps in place; the model holds the current weights between them."""

    def __init__(self) -> None:
        self.base: dict[str, torch.Tensor] = {}
        self.steps: list[tuple[float, list[float]]] = []  # lr, and projected gradients by probe

    @torch.inference_mode()
    def __call__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        batches: Sequence[Any],
        config: ZOConfig,
        step: int,
        lr: float,
        scales: Any,
    ) -> list[float]:
        rank, interval = config.trainable.rank or 2, config.trainable.interval or 50
        named = dict(model.named_parameters())
        number = {name: i for i, name in enumerate(named)}
        matrices = {n for n, p in named.items() if p.requires_grad and p.ndim == 2}
        if step % interval == 0:
            self.base = {name: p.clone() for name, p in named.items()}
        before = {name: p.clone() for name, p in named.items()}
        draw_z = reference.DIRECTIONS[config.direction]

        def noise(name: str, at: tuple[int, int], shape: Sequence[int], c: float) -> np.ndarray:
            flat = draw_z(config.seed, *at, number[name], 0, math.prod(shape), c)
            return flat.reshape(tuple(shape))

        def u(name: str, at: tuple[int, int], c: float) -> np.ndarray:
            return noise(name, at, (len(named[name]), rank), c * (1 / math.sqrt(rank)))

        def v(name: str) -> np.ndarray:
            return noise(name, (step // interval, BASIS), (named[name].shape[1], rank), 1.0)

        def gathered(name: str, last: int) -> np.ndarray:
            """-A after the steps of the interval before ``last``."""
            total, first = None, step // interval * interval
            for t in range(first, last):
                for probe, c in enumerate(self._coefficients(t, last, config)):
                    term = u(name, (t, probe), c)
                    total = term if total is None else total + term
            shape = (len(named[name]), rank)
            return np.zeros(shape, np.float32) - (0 if total is None else total)

        losses: list[float] = []
        for probe in range(config.probes):
            for c in (config.eps, -config.eps):
                pairs = {}
                for name, p in named.items():
                    if name in matrices:
                        left = gathered(name, step) + u(name, (step, probe), c)
                        pairs[id(p)] = torch.from_numpy(left), torch.from_numpy(v(name))
                        p.copy_(self.base[name])
                    elif p.requires_grad:
                        z = noise(name, (step, probe), p.shape, c)
                        p.copy_(before[name] + torch.from_numpy(z))
                with corrected(model, pairs):
                    found = [float(loss(model, batch)) for batch in batches]
                losses.append(sum(found) / len(batches))
        pairs_of_losses = zip(losses[::2], losses[1::2], strict=True)
        self.steps.append(
            (lr, [(plus - minus) / (2 * config.eps) for plus, minus in pairs_of_losses])
        )
        for name, p in named.items():
            if name in matrices:
                p.copy_(self.base[name] + sums(gathered(name, step + 1), v(name)))
            elif p.requires_grad:
                terms = [
                    torch.from_numpy(noise(name, (step, probe), p.shape, lr * g / config.probes))
                    for probe, g in enumerate(self.steps[-1][1])
                ]
                p.copy_(before[name] - sum(terms))
        return losses

    def _coefficients(self, s: int, last: int, config: ZOConfig) -> list[float]:
        b = config.trainable.momentum or 0.0
        lr, grads = self.steps[s]
        later = 0.0
        for t in range(last - 1, s, -1):
            later = self.steps[t][0] + b * later
        k = config.probes
        return [(1 - b) * (lr * g / k + b * later * (g / k)) for g in grads]


def sums(left: np.ndarray, right: np.ndarray) -> torch.Tensor:
    """``left @ right.T``, one column after another in fp32."""
    total = np.multiply.outer(left[:, 0], right[:, 0])
    for k in range(1, left.shape[1]):
        total = total + np.multiply.outer(left[:, k], right[:, k])
    return torch.from_numpy(total)


@contextmanager
def corrected(
    model: nn.Module, pairs: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Meanwhile, layers add what the small factors ``(L, V)`` of their weight add."""

    def forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        left, right = pairs[id(module.weight)]

        def multiply(x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, module.weight, module.bias)
            projected = F.linear(x.reshape(-1, x.shape[-1]), right.t().contiguous())
            return torch.addmm(y.view(-1, len(left)), projected, left.t()).view(y.shape)

        def gather(ids: torch.Tensor) -> torch.Tensor:
            rows = module.weight[ids.reshape(-1)]
            rows = rows + sums(left[ids.reshape(-1)].numpy(), right.numpy())
            return rows.view(*ids.shape, -1)

        return gather if isinstance(module, nn.Embedding) else multiply

    with ExitStack() as stack:
        for module in model.modules():
            if id(getattr(module, "weight", None)) in pairs:
                module.forward = forward(module)
                stack.callback(delattr, module, "forward")
        yield
