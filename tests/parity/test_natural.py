"""Steps that weigh probes by examples' losses: a plain loop, tiers, ranks, what is refused."""

import copy
import math
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from models.table import Plain, vectors
from replica.world import Run, on_ranks
from torch import nn

from parity import plain
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import DivergedError, TaskError
from zo_offload.objective import Objective, call_with
from zo_offload.replica import Replica
from zo_offload.step import Stepper

__all__ = ["on_ranks"]

LR, DAMPING, STEPS = 1e-2, 0.1, 3
BATCHES = [vectors(6), vectors(3)]
SETTINGS = [{"probes": 4}, {"probes": 5, "estimator": "one_sided"}]


class Each(Plain):
    """Gives a loss an example."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.leave(x).float(), labels, reduction="none")


def each(model: Any, batch: Any, outputs: Any) -> torch.Tensor:
    return outputs


def net() -> Each:
    torch.manual_seed(0)
    return Each(2, width=8)


def stepper(model: nn.Module | None = None, loss: Any = each, **block: Any) -> Stepper:
    config = ZOConfig.model_validate({"eps": 1e-2, "natural": DAMPING, "probes": 4, **block})
    return Stepper(model or net(), config, objective=Objective(loss=loss))


@torch.inference_mode()
def lanes(model: nn.Module, config: ZOConfig, step: int) -> list[np.ndarray]:
    """Losses [lanes, examples] of each micro-batch, the model moved and moved back."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    found: list[list[Any]] = [[] for _ in BATCHES]
    for probe in range(config.probes):
        for sign in config.signs:
            shift = plain.noise(model, config, (step, probe), sign * config.eps, {})
            for name, p in model.named_parameters():
                p.copy_(before[name] + shift[name])
            for rows, batch in zip(found, BATCHES, strict=True):
                rows.append(call_with(model, batch).double().numpy())
    for name, p in model.named_parameters():
        p.copy_(before[name])
    return [np.stack(rows) for rows in found]


def expected(losses: list[np.ndarray], config: ZOConfig) -> np.ndarray:
    """The step's estimates, by numpy."""
    gbar, fisher = np.zeros(config.probes), np.zeros((config.probes, config.probes))
    for table in losses:
        if config.estimator == "spsa":
            g = (table[0::2] - table[1::2]) / (2 * config.eps)
        else:
            g = config.probes / (config.probes - 1) * (table - table.mean(0)) / config.eps
        gbar += g.mean(1) / len(losses)
        fisher += g @ g.T / g.shape[1] / len(losses)
    phi = DAMPING * fisher.diagonal().mean()
    return np.linalg.solve(fisher / phi + np.eye(config.probes), gbar)


@torch.inference_mode()
def descend(model: nn.Module, config: ZOConfig, step: int, grads: tuple[float, ...]) -> None:
    """As ``plain.train_step`` does."""
    terms = [
        plain.noise(model, config, (step, probe), LR * grad / config.probes, {})
        for probe, grad in enumerate(grads)
    ]
    for name, p in model.named_parameters():
        p.copy_(p - sum(term[name] for term in terms))


@pytest.mark.parametrize("settings", SETTINGS, ids=["spsa", "one_sided"])
def test_steps_equal_a_plain_loop_and_replay(settings: dict[str, Any]):
    """In memory and streamed; two micro-batches of unequal size weigh the same."""
    model = net()
    streamed = {"offload_param": OffloadConfig(device="cpu"), "live_lanes": 2}
    with closing(stepper(**settings)) as held, closing(stepper(**settings, **streamed)) as moved:
        for step in range(STEPS):
            losses = lanes(model, held.config, step)
            found = held.train_step(BATCHES, LR)
            assert moved.train_step(BATCHES, LR) == found
            means = sum(table.mean(1) for table in losses) / len(losses)
            assert found.lane_losses == pytest.approx(means, rel=1e-12)
            wanted = expected(losses, held.config)
            assert found.projected_grads == pytest.approx(wanted, rel=1e-6, abs=1e-9)
            unsolved = plain.projected_grads(list(found.lane_losses), held.config)
            assert math.hypot(*found.projected_grads) < 0.8 * math.hypot(*unsolved)
            descend(model, held.config, step, found.projected_grads)
        masters, moved_masters = dict(held.weights.masters()), dict(moved.weights.masters())
        with closing(stepper(**settings)) as again:
            again.follow(held.journal)
            replayed = dict(again.weights.masters())
    for name, p in model.named_parameters():
        assert torch.equal(masters[name], p), name
        assert torch.equal(moved_masters[name], p), name
        assert torch.equal(replayed[name], p), name


@pytest.mark.parametrize("settings", SETTINGS, ids=["spsa", "one_sided"])
def test_two_ranks_take_the_steps_of_one(on_ranks: Run, settings: dict[str, Any]):
    with closing(stepper(**settings)) as it:
        alone = [it.train_step(BATCHES, LR) for _ in range(STEPS)]
    models = [net(), net()]  # here: threads would share a generator

    def work(replica: Replica) -> list[Any]:
        config = ZOConfig.model_validate({"eps": 1e-2, "natural": DAMPING, **settings})
        given, objective = copy.deepcopy(models[replica.rank]), Objective(loss=each)
        with closing(Stepper(given, config, objective=objective, replica=replica)) as it:
            mine = [BATCHES[replica.rank]]
            return [it.train_step(mine, LR) for _ in range(STEPS)]

    assert on_ranks(2, work) == [alone, alone]


def test_the_damping_is_in_the_header_where_there_is_one():
    with closing(stepper()) as it, closing(stepper(natural=None)) as without:
        fields = it.bit_header()
        assert fields.pop("natural") == DAMPING
        assert fields == without.bit_header()


def pair(model: Any, batch: Any, outputs: torch.Tensor) -> Any:
    return outputs.sum(), len(outputs)


def scalar(model: Any, batch: Any, outputs: torch.Tensor) -> Any:
    return outputs.mean()


def tokens(model: Any, batch: Any, outputs: torch.Tensor) -> Any:
    return outputs[:, None].expand(-1, 2)


class Dropping:
    """Leaves out an example, in one lane."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return outputs[1:] if self.calls == 3 else outputs


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (pair, r"the objective returned a \(sum, weight\) pair; pass objective"),
        (scalar, r"the objective returned a tensor of shape \[\]; .* shape \[examples\]"),
        (tokens, r"returned a tensor of shape \[6, 2\]"),
        (lambda *_: 0.5, "the objective returned float;"),
        (Dropping(), "returned 5 losses in one lane of a micro-batch and 6 in another"),
    ],
    ids=["pair", "scalar", "tokens", "float", "dropping"],
)
def test_an_objective_without_examples_is_refused_before_anything_is_recorded(
    loss: Any, words: str
):
    with closing(stepper(loss=loss)) as it:
        with pytest.raises(TaskError, match=words):
            it.train_step([BATCHES[0]], LR)
        assert it.step == 0


class Bad:
    """The third lane's loss of one example is not finite."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        third = torch.arange(len(outputs)) == 2
        return outputs.masked_fill(third, math.inf) if self.calls == 3 else outputs


@pytest.mark.parametrize("settings", SETTINGS, ids=["spsa", "one_sided"])
def test_a_loss_that_is_no_number_takes_its_probe_out(settings: dict[str, Any]):
    bad = 2 if settings.get("estimator") == "one_sided" else 1
    with closing(stepper(loss=Bad(), guard={"nonfinite": "skip"}, **settings)) as it:
        grads = it.train_step([BATCHES[0]], LR).projected_grads
    assert [k for k, grad in enumerate(grads) if grad == 0.0] == [bad]
    assert all(map(math.isfinite, grads))
    with closing(stepper(loss=Bad(), **settings)) as it:
        with pytest.raises(DivergedError, match=f"the loss is inf .probe {bad}, "):
            it.train_step([BATCHES[0]], LR)
        assert it.step == 0
