"""Tries end where they began: on the same weights, to the bit, in every mode and tier."""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS
from replica.world import Run, on_ranks
from torch import nn
from trainable.modes import MODEL, MODES, differing, masters, model

from zo_offload.config import ZOConfig, parse_config
from zo_offload.config_update import UpdateConfig
from zo_offload.find_lr.trials import Trials, seed_of, tried_config
from zo_offload.objective import Objective
from zo_offload.replica import Replica
from zo_offload.step import Stepper

__all__ = ["on_ranks"]

STEPS, LR = 5, 3e-3
BATCHES = [ROWS[MODEL].batch(length) for length in (6, 4, 5, 6)]
CPU = {"offload_param": {"device": "cpu"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "host": ("full", CPU),
    "on the device": ("full", {**CPU, "update": {"where": "device"}}),
    "disk": ("full", {"offload_param": {"device": "nvme", "nvme_path": "units"}}),
    "three bytes": ("full", {**CPU, "master": "bf16+8"}),
    "momentum": ("full", {"update": {"type": "momentum", "window": 3}}),
    "own lag": ("full", {**CPU, "update": {"lag": 2}}),
    "by turns": ("rotate", CPU),
    "adapter": ("lora", {}),
    "low rank": ("low-rank-momentum", CPU),
    "single weights": ("sparse", CPU),
    "scales": ("scales", {}),
}


class Product(nn.Module):
    """Linear blocks: its loss has no bound."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def tried(name: str) -> ZOConfig:
    mode, more = CASES[name]
    block = {"eps": 1e-2, "trainable": MODES[mode].trainable, **MODES[mode].block, **more}
    return parse_config(tried_config({"zeroth_order": block}, STEPS))


def trials_of(stepper: Stepper, batches: Sequence[Any] = BATCHES) -> Trials:
    ranks = stepper.division

    def of_step(step: int) -> list[Any]:
        both = [batches[step % 2], batches[2 + step % 2]]
        return both[ranks.data_rank :: ranks.num_data_ranks]

    return Trials(stepper, of_step, held_out=BATCHES[:3], steps=STEPS)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", CASES)
def test_every_try_begins_on_the_same_weights(name, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Stepper(model(), tried(name), dtype=torch.bfloat16) as stepper:
        trials, given = trials_of(stepper), masters(stepper)
        before = trials.loss()
        first = trials.attempt(LR, 0)
        assert differing(given, masters(stepper))
        far = trials.attempt(10 * LR, 0)
        assert len({before, first, far}) == 3
        assert trials.attempt(LR, 0) == first
        trials.begin(0)
        assert trials.loss() == before
        assert differing(given, masters(stepper)) == []


def test_a_closed_stepper_gives_the_model_back_as_it_was():
    with closing(Stepper(model(), tried("host"))) as stepper:
        trials = trials_of(stepper)
        trials.attempt(LR, 0)
        trials.begin(0)
        given = stepper.model
    for (name, a), b in zip(model().named_parameters(), given.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_rounds_go_along_other_directions_than_each_other_and_the_run():
    assert len({7, *(seed_of(7, number) for number in range(4)), seed_of(8, 0)}) == 6
    with Stepper(model(), tried("full")) as stepper:
        trials = trials_of(stepper)
        assert trials.attempt(LR, 0) != trials.attempt(LR, 1)
        assert stepper.draws()[0][2].seed == seed_of(0, 1)


def test_a_try_says_whether_anything_moved():
    flat = Objective(lambda model, batch, outputs: (1.0, 2.0), smooth=False)
    for objective, moves in ((flat, False), (Objective(), True)):
        with Stepper(model(), tried("full"), objective=objective) as stepper:
            trials = trials_of(stepper)
            trials.attempt(LR, 0)
            assert trials.moved is moves


def test_a_try_whose_losses_run_away_is_cut_short():
    config = ZOConfig(eps=1e-3, update=UpdateConfig(lag=40))
    with Stepper(Product(), config) as stepper:
        trials = Trials(stepper, lambda step: [torch.ones(2, 8)], [torch.ones(2, 8)], steps=40)
        before = trials.loss()
        assert trials.attempt(10.0, 0) == math.inf
        assert 0 < trials.taken < 40
        trials.begin(0)
        assert trials.loss() == before


def test_a_loss_that_is_no_number_diverges_and_the_next_try_goes_on():
    def loss(model: Any, batch: Any, outputs: Any) -> torch.Tensor:
        found = outputs.loss
        return torch.where(found > 6.0, torch.nan, found)

    with Stepper(model(), tried("full"), objective=Objective(loss=loss)) as stepper:
        trials = trials_of(stepper)
        assert trials.attempt(10.0, 0) == math.inf
        assert trials.attempt(LR / 10, 0) < 6.0


def test_slopes_and_forwards_are_counted():
    with Stepper(model(), tried("full")) as stepper:
        trials = trials_of(stepper)
        found, length = trials.slopes()
        assert trials.forwards == 12 * 2 * 2 * 3  # directions, steps, micro-batches, losses
        assert length == pytest.approx(1.0)
        assert found.squared.value > 0
        trials.attempt(LR, 0)
        assert trials.forwards == 144 + STEPS * 2 * 2 + 3


@pytest.mark.parametrize("name", ["host", "disk"])
def test_two_ranks_find_the_numbers_of_one(name, on_ranks: Run, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    monkeypatch.setattr("zo_offload.find_lr.trials.DIRECTIONS", 2)
    models = [model() for _ in range(3)]  # not in threads, which share a generator

    def numbers(replica: Replica) -> list[float]:
        with Stepper(models.pop(), tried(name), replica=replica) as stepper:
            trials = trials_of(stepper)
            found, _ = trials.slopes()
            seen = [found.agreed.value, found.curvature.value, found.loss]
            seen += [trials.attempt(LR, 0), trials.attempt(10 * LR, 1), trials.attempt(LR, 0)]
            return [*seen, trials.forwards]

    alone = numbers(Replica())
    assert on_ranks(2, numbers) == [alone, alone]
    assert alone[3] == alone[5]
