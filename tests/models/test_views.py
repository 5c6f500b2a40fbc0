"""Views of weights that outlive the place where they may be read."""

from contextlib import closing
from typing import Any

import torch
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.offload import planner
from zo_offload.ops import Draw
from zo_offload.step import Stepper

WIDTH = 8


class Viewing(nn.Module):
    """Starts from a view of an ambient table; each block hands a view of its own weight on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, WIDTH))
        self.blocks = nn.ModuleList(ViewingBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.table[: len(x)]  # a view, held across every block
        shift: Any = torch.zeros(())
        for block in self.blocks:
            x, shift = block(x, shift)
        return ((x + start) * shift).sum()


class ViewingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(x @ self.weight + shift), self.weight[0]


def test_views_keep_their_lanes_values(monkeypatch):
    monkeypatch.setattr(planner, "SMALL_BYTES", 0)  # the table has one copy, rebuilt a sign
    torch.manual_seed(0)
    model, x = Viewing(), torch.randn(2, WIDTH)
    with closing(Stepper(model, ZOConfig(eps=1e-2))) as stepper:
        stepper.weights.poison = True
        apart = [stepper.measure([x], [(0, s, Draw(0, 0, 0, s * 1e-2))])[0][0] for s in (1, -1)]
        (together,) = stepper.measure([x], [(0, s, Draw(0, 0, 0, s * 1e-2)) for s in (1, -1)])
        assert together == apart
        assert apart[0] != apart[1]
