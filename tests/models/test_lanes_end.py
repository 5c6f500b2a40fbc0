"""Lanes always end: whatever raises, starts late, or is called while it unwinds."""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from models.perturbed import assert_equals_plain_forwards
from models.table import Plain, vectors
from zo_offload.config import ZOConfig
from zo_offload.objective import Objective
from zo_offload.step import Stepper


def in_time(work: Callable[[], Any]) -> Any:
    """What ``work`` gives or raises, in a thread that a deadlock cannot hold up."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "deadlock"
    return found[0]


def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch):
    start, count = threading.Thread.start, 0

    def third_fails(thread: threading.Thread) -> None:
        nonlocal count
        if thread.name.startswith("zo-lane"):
            count += 1
            if count == 3:
                raise RuntimeError("can't start new thread")
        start(thread)

    with closing(Stepper(Plain())) as stepper:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", third_fails)
            batches = [vectors(2), vectors(3)]
            error = in_time(lambda: stepper.train_step(batches, lr=0.0))
            assert str(error) == "can't start new thread"
        assert in_time(lambda: stepper.train_step(batches, lr=0.0)).step == 0


class CleansUp(Plain):
    """Calls a block while it unwinds."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(x) == 2:
            raise ValueError("bad micro-batch")
        try:
            return super().forward(x, labels)
        finally:
            self.blocks[0](x)


def test_a_lane_that_calls_a_unit_while_it_unwinds():
    with closing(Stepper(CleansUp())) as stepper:
        error = in_time(lambda: stepper.train_step([vectors(3), vectors(2)], lr=0.0))
        assert str(error) == "bad micro-batch"


class Pair(NamedTuple):
    x: torch.Tensor
    view: torch.Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    view: torch.Tensor


@dataclass
class Output(ModelOutput):
    x: torch.Tensor | None = None
    view: torch.Tensor | None = None


class Viewing(nn.Module):
    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.wrap = wrap

    def forward(self, held: Any) -> Any:
        x = held if isinstance(held, torch.Tensor) else held["x"] + held["view"]
        return self.wrap(x=torch.tanh(x @ self.weight), view=self.weight[0])


class Chain(nn.Module):
    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Viewing(wrap) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held: Any = x
        for block in self.blocks:
            held = block(held)
            if isinstance(held, (Pair, Frozen)):
                held = {"x": held.x, "view": held.view}
            held = held["deep"][0] if "deep" in held else held
        return (held["x"] + held["view"]).mean()


@pytest.mark.parametrize(
    "wrap",
    [dict, Pair, Frozen, Output, lambda **held: {"deep": [held]}],
    ids=["dict", "namedtuple", "dataclass", "ModelOutput", "nested"],
)
def test_a_view_of_a_weight_in_any_container(wrap: Callable[..., Any]):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert_equals_plain_forwards(Chain(wrap), [x, x[:2]])


# -- random numbers --


def drawn(seed: int, num_batches: int = 2) -> list[list[float]]:
    """What an objective draws in each micro-batch (a row) along each sign."""

    def loss(model: nn.Module, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        return torch.rand(()).double()

    config = ZOConfig(seed=seed)
    with closing(Stepper(Plain(), config, objective=Objective(loss))) as stepper:
        rows = stepper.measure([vectors(2)] * num_batches, stepper.draws())
    return [[total for total, _ in row] for row in rows]


def test_both_signs_draw_alike_and_micro_batches_do_not():
    first, second = drawn(seed=0)
    assert first[0] == first[1] != second[0] == second[1]
    assert drawn(seed=0) == [first, second] != drawn(seed=1)


def test_numbers_from_elsewhere_are_told_of(caplog: pytest.LogCaptureFixture):
    def loss(model: nn.Module, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        return outputs * float(np.random.rand())  # noqa: NPY002

    with closing(Stepper(Plain(), objective=Objective(loss))) as stepper:
        for _ in range(2):
            stepper.train_step([vectors(2)], lr=0.0)
    assert caplog.text.count("random numbers of NumPy or Python") == 1


def test_the_bare_model_stays_in_evaluation_mode():
    class Dropping(Plain):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training), labels)

    with closing(Stepper(Dropping())) as stepper:
        stepper.model.train()
        assert len({float(stepper.forward(vectors(3))) for _ in range(3)}) == 1


# -- how many are alive --


@pytest.mark.parametrize(("live_lanes", "most"), [(None, 8), (3, 3), (1, 1)])
def test_the_number_of_live_lanes_is_the_users(live_lanes: int | None, most: int):
    alive, seen = 0, []

    def forward(model: Any, batch: Any) -> torch.Tensor:
        nonlocal alive
        alive += 1
        seen.append(alive)
        outputs = model(**batch)
        alive -= 1
        return outputs

    config = ZOConfig(live_lanes=live_lanes)
    torch.manual_seed(0)
    with closing(Stepper(Plain(), config, objective=Objective(forward=forward))) as stepper:
        losses = stepper.measure([vectors(n) for n in (2, 3, 4, 5)], stepper.draws())
        assert max(seen) == most
        seen.clear()
        stepper.measure_noise(vectors(2))
        assert max(seen) <= 2
    torch.manual_seed(0)
    with closing(Stepper(Plain(), ZOConfig())) as stepper:
        assert losses == stepper.measure([vectors(n) for n in (2, 3, 4, 5)], stepper.draws())
