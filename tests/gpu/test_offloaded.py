"""Wherever weights rest and however they travel, losses and masters are those of memory."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.common import Ended, assert_equal, net, offloaded, trained, vectors
from zo_offload.config import ZOConfig
from zo_offload.step import Stepper

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIRES = [  # of forwards, of the bus, and the lag
    (BF16, None, 0), (BF16, None, 2), (BF16, "lossless12", 0), (BF16, "fp8_e4m3", 2),
    (BF16, "int8", 0), (BF16, "int4", 2), (BF16, "nf4:64", 0), (FP16, None, 2), (FP16, "nf4", 0),
    (FP32, None, 0), (FP32, "bf16", 2), (FP32, "fp16", 0),
]  # fmt: skip


def after(device: torch.device, dtype: torch.dtype, wire: str | None, **block: Any) -> Ended:
    wide = 512 if device.type == "cuda" else 24  # a copy takes some time
    model = net(6, wide)
    return trained(model, device, vectors(3, dtype), dtype=dtype, wire=wire, **block)


@pytest.mark.parametrize(("dtype", "wire", "lag"), WIRES, ids=str)
def test_no_tier_changes_a_bit(
    device: torch.device, dtype: torch.dtype, wire: str | None, lag: int, tmp_path: Path
):
    update = {"lag": lag}
    right = after(device, dtype, wire, update=update)
    for block in (
        {**offloaded("cpu"), "update": {**update, "where": "host"}},
        {**offloaded("cpu"), "update": {**update, "where": "device"}},
        {**offloaded("cpu", buffer_count=1), "update": {**update, "where": "device"}},
        {**offloaded("cpu", pin_memory=False), "update": {**update, "where": "host"}},
        {**offloaded("nvme", tmp_path), "update": update},
    ):
        assert_equal(after(device, dtype, wire, **block), right, block)


def test_a_place_that_is_tried_out_changes_no_bit(device: torch.device):
    """Left open, updates go back and forth between host and device for eight steps."""
    right = after(device, BF16, None, steps=12)
    assert_equal(after(device, BF16, None, steps=12, **offloaded("cpu")), right)


def test_units_in_every_tier_at_once(device: torch.device, tmp_path: Path):
    """Blocks so large that staging them takes less memory than keeping them."""
    block, batch = {**offloaded("nvme", tmp_path), "probes": 3}, vectors(3, BF16)
    config, held = ZOConfig.model_validate(block), []
    with closing(Stepper(net(12, 128), config, device, BF16)) as least:
        one = max(unit.wire_bytes + unit.rest_bytes for unit in least.weights.map.units)
        more: dict[str, Any] = {
            "device_budget": least.plan.device_bytes + one,
            "host_budget": least.plan.host_bytes + 3 * one,
        }

    def note(stepper: Stepper) -> None:
        held.extend(stepper.weights.tiers.values())

    right = trained(net(12, 128), device, batch, probes=3)
    found = trained(net(12, 128), device, batch, at_work=note, **block, **more)
    assert {"device", "host", "nvme"} == set(held)
    assert_equal(found, right)
