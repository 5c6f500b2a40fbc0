"""Units whose forward needs no lane's mode run without it, and nothing else changes."""

from collections import Counter
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zo_offload.ambient import AmbientMode
from zo_offload.config import ZOConfig
from zo_offload.errors import ModelError
from zo_offload.objective import Objective
from zo_offload.step import Stepper

WIDTH, PROBES, LR = 8, 3, 1e-2
seen: Counter[str] = Counter()


class Doubled(TorchFunctionMode):
    """A mode of the model's own code."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.tanh else result


class Halved(TorchDispatchMode):
    """One of operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result / 2 if func is torch.ops.aten.cos.default else result


AROUND = {"functions": Doubled, "operators": Halved, "autocast": partial(torch.autocast, "cpu")}


class Block(nn.Module):
    """``how`` it computes decides what it needs."""

    def __init__(self, how: str, shared: nn.Parameter) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.how = how
        vars(self)["borrowed"] = shared  # another module's: ambient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "fails" and seen["forwards"] > 4:
            raise ArithmeticError("in a unit")
        seen["forwards"] += 1
        x = torch.cos(self.linear(x))
        seen[str(x.dtype)] += 1
        if self.how == "borrows":
            x = x * vars(self)["borrowed"]
        if self.how == "shape":
            x = x / vars(self)["borrowed"].shape[0]
        if self.how == "in place":
            x = x.add_(1.0)
        if self.how == "mode":
            with Doubled():
                x = torch.tanh(x)
        return x


class Model(nn.Module):
    def __init__(self, how: str, around: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(Block(how, self.scale) for _ in range(2))
        self.around = around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.around == "vmap":
                x = torch.func.vmap(block)(x)
            elif self.around:
                with AROUND[self.around]():
                    x = block(torch.tanh(x))
            else:
                x = block(x)
        return (x * self.scale).square().mean(1)


def run(how: str, monkeypatch: Any, around: str = "", **fields: Any) -> tuple[Any, ...]:
    """Losses, weights, and how often the mode was asked about a cosine; two micro-batches."""
    seen.clear()
    call = AmbientMode._call

    def counted(self: AmbientMode, func: Any, *rest: Any) -> Any:
        seen[getattr(func, "__name__", "")] += 1
        return call(self, func, *rest)

    monkeypatch.setattr(AmbientMode, "_call", counted)
    objective = Objective(
        loss=lambda model, batch, outputs: outputs, forward=lambda model, batch: model(batch)
    )
    config = ZOConfig.model_validate({"probes": PROBES, "seed": 5, **fields})
    batches = [torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    with closing(Stepper(Model(how, around), config, objective=objective)) as it:
        for _ in range(3):
            it.train_step(batches, LR)
        losses = [record.losses for record in it.journal.records]
        masters = {name: value.clone() for name, value in it.weights.masters()}
    monkeypatch.undo()
    return losses, masters, seen["cos"]


LANES = 2 * 2 * PROBES  # of a step of two micro-batches
ONE_LANE_EACH, EVERY_LANE = 3 * 2 * 2, 3 * 2 * LANES  # in three steps, two blocks


@pytest.mark.parametrize(
    ("how", "around", "asked"),
    [
        ("plain", "", ONE_LANE_EACH),
        ("shape", "", ONE_LANE_EACH),
        ("in place", "", ONE_LANE_EACH),
        ("mode", "", ONE_LANE_EACH),
        ("borrows", "", EVERY_LANE),
        ("plain", "functions", EVERY_LANE),
        ("plain", "operators", ONE_LANE_EACH),
    ],
)
def test_one_lane_a_micro_batch_is_looked_at(how, around, asked, monkeypatch):
    ours = run(how, monkeypatch, around)
    monkeypatch.setattr(AmbientMode, "step_aside", lambda self: False)
    theirs = run(how, monkeypatch, around)
    assert ours[2] == asked
    assert theirs[2] == EVERY_LANE
    assert ours[0] == theirs[0]
    assert all(torch.equal(value, theirs[1][name]) for name, value in ours[1].items())


@pytest.mark.parametrize("around", AROUND)
def test_what_one_lane_enters_around_a_unit_is_not_the_others(around, monkeypatch):
    """Losses of lanes together, and of as many that come one after another."""
    together = run("plain", monkeypatch, around)
    assert seen["torch.bfloat16"] == (EVERY_LANE if around == "autocast" else 0)
    one_by_one = run("plain", monkeypatch, around, live_lanes=1)
    assert together[0] == one_by_one[0] != run("plain", monkeypatch)[0]


def test_a_unit_under_vmap_is_refused(monkeypatch):
    with pytest.raises(ModelError, match=r"unit 0 is called under torch\.func"):
        run("plain", monkeypatch, "vmap")


def test_an_error_in_a_unit_is_raised_as_itself(monkeypatch):
    with pytest.raises(ArithmeticError, match="in a unit"):
        run("fails", monkeypatch)


def test_what_a_later_forward_does_otherwise_is_seen_again(monkeypatch):
    """A unit is looked at in each visit, so that one which begins to read outside is refused."""
    plain = Block.forward

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        other = vars(self)["others"] if "others" in vars(self) and seen["late"] else None
        return plain(self, x) if other is None else plain(self, x) + other.linear.bias

    monkeypatch.setattr(Block, "forward", forward)
    model = Model("plain")
    vars(model.blocks[1])["others"] = model.blocks[0]
    objective = Objective(
        loss=lambda model, batch, outputs: outputs, forward=lambda model, batch: model(batch)
    )
    seen.clear()
    with closing(Stepper(model, ZOConfig.model_validate({}), objective=objective)) as it:
        it.train_step([torch.ones(4, WIDTH)], LR)
        seen["late"] = 1
        with pytest.raises(ModelError, match=r"blocks\.0\.linear\.bias was read .* outside"):
            it.train_step([torch.ones(4, WIDTH)], LR)
