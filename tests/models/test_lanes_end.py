"""Lanes always end: whatever raises, starts late, or is called while it unwinds."""

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from models.perturbed import assert_equals_plain_forwards
from models.table import WIDTH, Plain, vectors
from zo_offload.ambient import AmbientMode
from zo_offload.config import TrainableConfig, ZOConfig
from zo_offload.lane import TurnLane
from zo_offload.objective import Objective
from zo_offload.replica import Division
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


class CleansUpInside(nn.Linear):
    """Multiplies while it unwinds, where lanes stop to share a product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if len(input) == 2:
            raise ValueError("bad micro-batch")
        try:
            return super().forward(input)
        finally:
            super().forward(input)


def test_a_lane_that_shares_a_product_while_it_unwinds():
    model = Plain()
    for index in range(len(model.blocks)):
        model.blocks[index] = CleansUpInside(WIDTH, WIDTH)
    config = ZOConfig(trainable=TrainableConfig(parameters=("leave*",)), joined_rows=1000)
    with closing(Stepper(model, config)) as stepper:
        error = in_time(lambda: stepper.train_step([vectors(3), vectors(2)], lr=0.0))
        assert str(error) == "bad micro-batch"


def test_lanes_that_have_ended_are_left_to_no_collector():
    """Else memory grows until one comes, which may be thousands of steps later."""
    with closing(Stepper(Plain())) as stepper:
        stepper.train_step([vectors(2)], lr=0.0)
        gc.collect()
        gc.disable()
        try:
            stepper.train_step([vectors(2)], lr=0.0)
            left = [each for each in gc.get_objects() if type(each) in (TurnLane, AmbientMode)]
        finally:
            gc.enable()
    assert not left


COLLECTED = """
from models.table import WIDTH, Plain, vectors
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.step import Stepper

class Owner:
    def __init__(self):
        self.stepper = Stepper(Plain(), ZOConfig(offload_param=OffloadConfig(device="cpu")))
        self.stepper.model.owner = self

    def __del__(self):
        self.stepper.close()

def main():
    Owner().stepper.train_step([vectors(2)], lr=0.0)

main()
"""


def test_a_program_that_closes_nothing_ends():
    """What is collected together with its model, as at exit, has nobody to give weights back to."""
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


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

SOURCES: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "NumPy": lambda: float(np.random.rand()),  # noqa: NPY002
    "NumPy, normal": lambda: float(np.random.randn()),  # noqa: NPY002
    "Python": random.random,
}
from_every_source = pytest.mark.parametrize("draw", SOURCES.values(), ids=SOURCES)


class Drawing(Plain):
    """Draws before, between and after the blocks; its loss is what it drew."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        drawn, x = [self.draw()], self.enter(x)
        for block in self.blocks:
            x = block(x)
            drawn.append(self.draw())
        return torch.tensor(drawn).double() @ torch.tensor([1.0, 7.0, 49.0, 343.0]).double()


def drawn(
    draw: Callable[[], float],
    num_batches: int = 2,
    rank: int = 0,
    world_size: int = 1,
    **config: Any,
) -> list[list[float]]:
    """What a model draws in each micro-batch (a row) along each draw."""
    with closing(Stepper(Drawing(draw), ZOConfig(**config))) as stepper:
        stepper.division = Division(rank, world_size)
        rows = stepper.measure([vectors(2)] * num_batches, stepper.draws())
    return [[total for total, _ in row] for row in rows]


@from_every_source
def test_both_signs_and_all_probes_draw_alike_and_micro_batches_do_not(draw: Callable[[], float]):
    first, second = drawn(draw, probes=2)
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


@from_every_source
def test_numbers_follow_the_seed_alone(draw: Callable[[], float]):
    found = drawn(draw, seed=0)
    draw()  # the caller's own generators do not matter
    assert drawn(draw, seed=0) == found != drawn(draw, seed=1)
    assert drawn(draw, seed=0, live_lanes=1) == found


@from_every_source
def test_ranks_draw_what_one_rank_draws(draw: Callable[[], float]):
    one = drawn(draw, num_batches=4)
    ranks = [drawn(draw, 2, rank, world_size=2) for rank in (0, 1)]
    assert one == [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]]


@from_every_source
def test_the_callers_numbers_go_on(draw: Callable[[], float]):
    def five(between: Callable[[], Any]) -> list[float]:
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        first = draw()
        between()
        return [first, *(draw() for _ in range(4))]

    with closing(Stepper(Drawing(draw))) as stepper:
        assert five(lambda: stepper.train_step([vectors(2)], lr=0.0)) == five(lambda: None)


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
