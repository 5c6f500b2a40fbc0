"""Momentum and Adam: against plain loops and torch's optimizers, in any tier, resumed, rewound."""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.table import ROWS, Plain, vectors
from torch import nn
from trainable.laid_over import reference_of
from trainable.modes import BATCH, MODES, config_of, differing, masters, model

from parity.momentum_loop import MomentumLoop
from parity.test_lag import PlainRun, in_bf16
from parity.test_parity import loss_of
from parity.test_skipped import Failing
from zo_offload import masters as masters_module
from zo_offload.config import ZOConfig
from zo_offload.errors import CheckpointError, JournalError
from zo_offload.journal import Flags, Journal
from zo_offload.objective import Objective
from zo_offload.ops import reference
from zo_offload.resume import begin_with, rewind
from zo_offload.snapshot import write_snapshot
from zo_offload.step import Stepper
from zo_offload.trainable.choose import trainable_for

LR = 1e-2
MOMENTUM = {"type": "momentum", "momentum": 0.8, "window": 3}
ADAM = {"type": "adam", "beta1": 0.7, "beta2": 0.9, "adam_eps": 1e-3, "window": 4}


def net(num_blocks: int = 3) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(num_blocks, width=16)


def stepper_of(update: dict[str, Any], dtype: torch.dtype | None = None, **block: Any) -> Stepper:
    config = {"eps": 1e-2, "update": update, **block}
    return Stepper(net(), ZOConfig.model_validate(config), dtype=dtype)


def rate_of(step: int) -> float:
    """Another at every step."""
    return LR / (1 + step % 3)


def train(stepper: Stepper, number: int, decay: float = 1e-3) -> None:
    for _ in range(number):
        batch = vectors(2 + stepper.step % 3)
        batch["x"] = batch["x"].to(next(stepper.model.parameters()).dtype)
        stepper.train_step([batch], rate_of(stepper.step), weight_decay=decay)


@pytest.mark.parametrize(
    ("name", "update", "more"),
    [
        ("full", MOMENTUM, {"probes": 2}),
        ("full", ADAM, {"direction": "gaussian"}),
        ("rotate", MOMENTUM, {}),
        ("lora", ADAM, {"probes": 2}),
        ("sparse-beside-vectors", MOMENTUM, {}),
        ("scales", ADAM, {}),
    ],
)
def test_steps_equal_a_plain_loop(name: str, update: dict[str, Any], more: dict[str, Any]):
    config = config_of(name, offload_param={"device": "cpu"}, update=update, **more)
    mode = trainable_for(model(), config)
    expected = reference_of(mode.prepare(model()), mode.moving.overlays, config.wire)
    never_below = [each.parameter for each in mode.moving.overlays if each.non_negative]
    trained, take_step = dict(expected.named_parameters()), MomentumLoop()
    with closing(Stepper(model(), config)) as stepper:
        for step in range(6):
            for key, parameter in trained.items():
                parameter.requires_grad_(MODES[name].moves(key, step))
            losses = take_step(expected, loss_of, [BATCH], config, step, rate_of(step), {})
            for parameter in never_below:
                parameter.data.clamp_(min=0.0)
            assert stepper.train_step([BATCH], rate_of(step)).lane_losses == tuple(losses), step
        assert differing(masters(stepper), {k: p.data for k, p in trained.items()}) == []


TORCHS: list[tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = [
    ({"type": "momentum"}, lambda given: torch.optim.SGD(given, momentum=0.9)),
    (
        {"type": "adam", "beta2": 0.95, "adam_eps": 1e-4},
        lambda given: torch.optim.Adam(given, betas=(0.9, 0.95), eps=1e-4),
    ),
]


@pytest.mark.parametrize(("update", "make"), TORCHS, ids=["SGD", "Adam"])
def test_equals_torchs_optimizer_with_a_dense_buffer(update: dict[str, Any], make: Callable):
    """In float64, on the dense gradients that the records stand for; the third step is skipped."""
    losses = Objective(loss=Failing({4: math.nan}), forward=lambda model, batch: model(**batch))
    config = ZOConfig.model_validate(
        {"eps": 1e-2, "update": update, "guard": {"nonfinite": "skip"}}
    )
    with closing(Stepper(net(), config, objective=losses)) as stepper:
        train(stepper, 14, decay=0.0)
        records, found = stepper.journal.records, dict(stepper.weights.masters())
    dense = {name: nn.Parameter(p.detach().double()) for name, p in net().named_parameters()}
    optimizer = make(dense.values())
    for record in records:
        if record.flags & Flags.SKIPPED:
            assert record.step == 2
            continue
        for index, p in enumerate(dense.values()):
            z = reference.rademacher(0, record.step, 0, index, 0, p.numel())
            p.grad = record.probes[0].projected_grad * torch.from_numpy(z).double().view(p.shape)
        for group in optimizer.param_groups:
            group["lr"] = record.lr
        optimizer.step()
    moved = 0.0
    for (name, p), begun in zip(dense.items(), net().parameters(), strict=True):
        torch.testing.assert_close(found[name].double(), p.detach(), rtol=0, atol=1e-6)
        moved = max(moved, float((p - begun).detach().abs().max()))
    assert moved > 1e-2


class WindowRun(PlainRun):
    """Momentum with lag, off the definition: steps of a stretch of the grid in one sum."""

    def train_step(self, batch: Any, eps: float) -> list[float]:
        losses = [self.loss(batch, eps), self.loss(batch, -eps)]
        self.coefficients.append((losses[0] - losses[1]) / (2 * eps))  # here, slopes
        return losses

    def moved(self, value: np.ndarray, index: int, first: int, last: int) -> np.ndarray:
        in_unit = list(self.base)[index].startswith(self.units)
        grain = self.lag if in_unit and self.lag else 1
        while first < last:
            end = min(last, (first // grain + 1) * grain)
            value, first = self.along(value, index, first, end), end
        return value

    def along(self, value: np.ndarray, index: int, first: int, last: int) -> np.ndarray:
        """After steps first to last, less one: every direction that any of them goes along."""
        beta, window = MOMENTUM["momentum"], MOMENTUM["window"]
        totals: dict[int, float] = {}
        for t in range(first, last):
            for s in range(max(0, t - window + 1), t + 1):
                power = math.prod([beta] * (t - s))
                totals[s] = totals.get(s, 0.0) + LR * power * self.coefficients[s]
        terms = [
            reference.rademacher(0, s, 0, index, 0, value.size, totals[s]).reshape(value.shape)
            for s in sorted(totals)
        ]
        return value - sum(terms[1:], terms[0])


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_lag_equals_a_plain_loop(lag: int):
    row = ROWS["plain"]
    expected = WindowRun(row.build(), row.units, lag)
    block = {"eps": 1e-2, "update": {**MOMENTUM, "lag": lag}, "offload_param": {"device": "cpu"}}
    config = ZOConfig.model_validate(block)
    with closing(Stepper(row.build(), config, dtype=torch.bfloat16)) as stepper:
        for step in range(8):
            batch = row.inputs(5 + step % 2, torch.bfloat16)
            losses = expected.train_step(batch, stepper.config.eps)
            assert stepper.train_step([batch], LR).lane_losses == tuple(losses), step
        for key, master in stepper.weights.masters():
            np.testing.assert_array_equal(master.numpy(), expected.masters()[key])


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("update", [MOMENTUM, ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("master", ["fp32", "bf16+8"])
def test_tiers_places_and_looking_change_no_bit(
    lag: int, update: dict[str, Any], master: str, tmp_path: Path
):
    nvme = {"device": "nvme", "nvme_path": str(tmp_path / "units")}
    found = []
    for offload, where, looks in [
        ({"device": "none"}, None, False),
        ({"device": "cpu"}, "host", True),
        ({"device": "cpu", "buffer_count": 1}, "device", False),
        (nvme, None, True),
    ]:
        more = {"probes": 2, "master": master, "offload_param": offload}
        asked = {**update, "lag": lag, "where": where}
        with closing(stepper_of(asked, torch.bfloat16, **more)) as stepper:
            for _ in range(7):
                train(stepper, 1)
                if looks:
                    stepper.evaluate(in_bf16(vectors(4)))
                    stepper.model.state_dict()
            found.append((stepper.weights.digest(), [r.losses for r in stepper.journal.records]))
    assert [each == found[0] for each in found] == [True] * 4


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("update", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_a_run_is_its_records(
    update: dict[str, Any], lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Begun again in the middle, replayed from the base at once, rewound and gone on."""
    update, offload = {**update, "lag": lag}, {"device": "cpu"}
    path, snapshot = tmp_path / "run.journal", tmp_path / "weights"
    snapshot.mkdir()
    with closing(stepper_of(update, torch.bfloat16, offload_param=offload)) as stepper:
        header = stepper.bit_header()
        stepper.follow(Journal.create(path, header))
        train(stepper, 5)
        write_snapshot(snapshot, stepper.weights, 5, stepper.journal.records.lineage())
        five = Journal.of(stepper.journal.content, "five")
        train(stepper, 4)
        expected = masters(stepper)
        history = stepper.weights.history
        for record, step in zip(stepper.journal.records, history, strict=True):
            newest = step.draws[-1]
            assert (newest.step, newest.coefficient) == (record.step, record.probes[0].coefficient)
        assert [len(step.draws) for step in history[2:6]] == [3, min(4, update["window"])] + [
            update["window"]
        ] * 2
        # The same steps at other rates, then back: nothing of them remains.
        rewind(stepper, five, snapshot)
        stepper.train_step([in_bf16(vectors(3))], 7 * LR)
        assert differing(masters(stepper), expected) != []
        rewind(stepper, five, snapshot)
        train(stepper, 4)
        assert differing(masters(stepper), expected) == []
    monkeypatch.setattr(masters_module, "AT_ONCE", 2)  # the replay comes in parts
    with closing(stepper_of(update, torch.bfloat16)) as again:  # in another tier
        again.follow(Journal.open(path, header))
        assert again.step == 9
        assert differing(masters(again), expected) == []


def test_another_update_is_another_run(tmp_path: Path):
    path = tmp_path / "run.journal"
    with closing(stepper_of(MOMENTUM)) as stepper:
        assert stepper.bit_header()["update"] == MOMENTUM
        Journal.create(path, stepper.bit_header()).close()
    for update, words in [
        ({}, 'header.update: journal has {"momentum":0.8,.*, this run has "sgd"'),
        ({**MOMENTUM, "window": 4}, "header.update.window: journal has 3, this run has 4"),
    ]:
        with closing(stepper_of(update)) as stepper, pytest.raises(JournalError, match=words):
            Journal.open(path, stepper.bit_header())


def test_without_momentum_the_bits_are_those_of_plain_descent():
    digests = set()
    for update in ({}, {"type": "momentum", "momentum": 0.0}):
        with closing(stepper_of(update, probes=3)) as stepper:
            assert update or stepper.bit_header()["update"] == "sgd"
            train(stepper, 4)
            digests.add(stepper.weights.digest())
    assert len(digests) == 1


def test_a_skipped_step_is_none():
    """It neither counts in the window nor fades what was before, and a replay knows it."""
    block = {"eps": 1e-2, "update": {**ADAM, "window": 2}, "guard": {"nonfinite": "skip"}}
    config = ZOConfig.model_validate(block)
    losses = Objective(loss=Failing({2: math.nan, 5: math.inf}), forward=lambda m, b: m(**b))
    with closing(Stepper(net(), config, objective=losses)) as stepper:
        train(stepper, 5)
        history, found = stepper.weights.history, masters(stepper)
        along = [[draw.step for draw in step.draws] for step in history]
        assert along == [[0], [], [], [0, 3], [3, 4]]
        with closing(Stepper(net(), config)) as again:
            again.follow(stepper.journal)
            assert differing(masters(again), found) == []


@pytest.mark.parametrize("lag", [0, 3])
def test_a_new_run_begins_where_one_with_momentum_stands(lag: int, tmp_path: Path):
    update = {**ADAM, "lag": lag}
    with closing(stepper_of(update)) as stepper:
        stepper.follow(Journal.memory(stepper.bit_header()))
        train(stepper, 5)
        write_snapshot(tmp_path, stepper.weights, 5, stepper.journal.records.lineage())
        journal, expected = stepper.journal, masters(stepper)
        with closing(stepper_of({**update, "window": 9})) as other:
            other.follow(Journal.memory(other.bit_header()))
            if lag:  # masters lag, and are brought forward as their own run would
                with pytest.raises(CheckpointError, match="which need the update of its run"):
                    begin_with(other, journal, tmp_path)
        with closing(stepper_of(update)) as other:
            other.follow(Journal.memory(other.bit_header()))
            begin_with(other, journal, tmp_path)
            assert other.step == 0
            assert differing(masters(other), expected) == []
