"""Every way to say what moves: a plain loop, other tiers and a resumed run end in equal bits."""

from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_parity import loss_of

from trainable.laid_over import reference_of
from trainable.modes import BATCH, LR, MODES, config_of, differing, masters, model, stepper_of
from zo_offload.journal import Journal
from zo_offload.trainable.choose import trainable_for

STEPS = 6
LOW_RANK = ["low-rank", "low-rank-momentum"]


@pytest.mark.parametrize("name", MODES)
def test_steps_equal_a_plain_loop(name: str):
    """Whose parameters are told at each step, by the row, whether they move."""
    config = config_of(name, offload_param={"device": "cpu"})
    mode = trainable_for(model(), config)
    reference = reference_of(mode.prepare(model()), mode.moving.overlays, config.wire)
    never_below = [each.parameter for each in mode.moving.overlays if each.non_negative]
    trained, take_step = dict(reference.named_parameters()), MODES[name].loop()
    with closing(stepper_of(name, offload_param={"device": "cpu"})) as stepper:
        begun = masters(stepper)
        assert differing(begun, {k: p.data for k, p in trained.items()}) == []
        for step in range(STEPS):
            for key, parameter in trained.items():
                parameter.requires_grad_(MODES[name].moves(key, step))
            expected = take_step(reference, loss_of, [BATCH], config, step, LR, {})
            for parameter in never_below:
                parameter.data.clamp_(min=0.0)
            found = stepper.train_step([BATCH], LR)
            assert found.lane_losses == tuple(expected), step
        assert differing(masters(stepper), {k: p.data for k, p in trained.items()}) == []
        moved = differing(begun, masters(stepper))
    assert moved == [k for k in begun if any(MODES[name].moves(k, s) for s in range(STEPS))]


def after(name: str, **more: Any) -> dict[str, torch.Tensor]:
    """Masters after steps with decay, in bfloat16, and looks between."""
    with closing(stepper_of(name, torch.bfloat16, **more)) as stepper:
        for _ in range(STEPS):
            stepper.train_step([BATCH], LR, weight_decay=1e-2)
            stepper.evaluate(BATCH)
        weights, plan = stepper.weights, stepper.plan
        assert weights.arena.peak_bytes == plan.device_bytes
        assert weights.host_bytes == plan.host_bytes
        return masters(stepper)


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    ("name", "lag"),
    [
        *product(["layers", "rotate", "lora", "sparse-beside-vectors", "scales"], [0, 2]),
        *product(LOW_RANK, [0]),
    ],
)
def test_no_tier_changes_a_bit(name: str, lag: int, tmp_path: Path):
    update = {"lag": lag}
    expected = after(name, update=update)
    nvme = {"device": "nvme", "nvme_path": str(tmp_path / "units")}
    for more in (
        {"offload_param": {"device": "cpu"}, "unit": "sublayer" if not lag else None},
        {"offload_param": {"device": "cpu"}, "update": {"where": "device", **update}},
        {"offload_param": nvme},
    ):
        found = after(name, **{"update": update, **more})
        assert differing(expected, found) == [], more


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        *product(["rotate", "lora", "sparse-beside-vectors", "scales"], [1, 3]),
        *product(LOW_RANK, [1, 4, 5]),
    ],
)
def test_a_run_goes_on_from_its_journal(name: str, stop: int, tmp_path: Path):
    def run(path: Path, steps: int, **more: Any) -> dict[str, torch.Tensor]:
        with closing(stepper_of(name, torch.bfloat16, **more)) as stepper:
            stepper.follow(Journal.open(path, stepper.bit_header()))
            while stepper.step < steps:
                stepper.train_step([BATCH], LR, weight_decay=1e-2)
            return masters(stepper)

    offload = {"device": "cpu"}
    if name in ("rotate", *LOW_RANK):
        offload = {"device": "nvme", "nvme_path": str(tmp_path / "units")}
    whole = run(tmp_path / "whole.journal", STEPS)
    run(tmp_path / "parts.journal", stop, offload_param=offload)
    assert differing(whole, run(tmp_path / "parts.journal", STEPS, offload_param=offload)) == []


def test_the_header_says_what_moves():
    def said(name: str) -> Any:
        with closing(stepper_of(name)) as stepper:
            return stepper.bit_header().get("trainable")

    headers = {name: said(name) for name in MODES}
    assert headers["full"] is None
    assert headers == {name: said(name) for name in MODES}
    assert len({repr(header) for header in headers.values()}) == len(headers)
