"""A packed wire: the same weights to the bit in every tier, wherever masters are moved."""

from contextlib import closing
from typing import Any

import pytest
import torch
from models.table import Plain, vectors
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError
from zo_offload.step import Stepper

CODECS = ["bf16", "fp16", "lossless12", "fp8_e4m3", "int8", "int4", "nf4", "nf4:64"]
LR = 1e-2


def net() -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(4, width=24)


def masters(dtype: torch.dtype, wire: str | None, lag: int, **more: Any) -> dict[str, torch.Tensor]:
    """After five steps and some looks between; what is planned is what is held."""
    update = {"lag": lag, "where": more.pop("where", None)}
    config = ZOConfig.model_validate({"eps": 1e-2, "wire": wire, "update": update, **more})
    with closing(Stepper(net(), config, dtype=dtype)) as stepper:
        for _ in range(5):
            stepper.train_step([batch(dtype)], LR)
            stepper.evaluate(batch(dtype))
        weights = stepper.weights
        assert weights.arena.peak_bytes == stepper.plan.device_bytes
        assert weights.host_bytes == stepper.plan.host_bytes
        return dict(weights.masters())


def batch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = vectors(3)
    return {**found, "x": found["x"].to(dtype)}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [(torch.bfloat16, "lossless12"), (torch.bfloat16, "int4"), (torch.bfloat16, "nf4:64")]
    + [(torch.float16, wire) for wire in ("fp8_e4m3", "nf4")]
    + [(torch.float32, wire) for wire in ("bf16", "fp16", "int8")],
)
def test_no_tier_changes_a_bit(dtype: torch.dtype, wire: str):
    lag = 2 if wire in ("int8", "lossless12") else 0
    on_device = masters(dtype, wire, lag)
    for more in (
        {"offload_param": {"device": "cpu"}},
        {"offload_param": {"device": "cpu", "buffer_count": 1}},
        {"offload_param": {"device": "cpu"}, "where": "device"},
        {"offload_param": {"device": "cpu"}, "device_budget": 40_000},
    ):
        assert differing(on_device, masters(dtype, wire, lag, **more)) == [], more


@pytest.mark.parametrize("wire", CODECS)
def test_what_is_exact_trains_as_without(wire: str):
    plain = masters(torch.bfloat16, None, 0)
    packed = masters(torch.bfloat16, wire, 0, offload_param={"device": "cpu"})
    assert (differing(plain, packed) == []) == (wire in ("bf16", "fp16", "lossless12"))


def test_lossless_packing_is_for_bfloat16():
    with pytest.raises(ConfigError, match=r"^zeroth_order\.wire: lossless12 packs bfloat16, not"):
        masters(torch.float32, "lossless12", 0)


class Wide(nn.Module):
    """Blocks large enough for padding not to count."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


@pytest.mark.parametrize(
    ("wire", "most"),
    [(None, 2.00), ("lossless12", 1.51), ("int8", 1.04), ("fp8_e4m3", 1.04), ("nf4", 0.53)],
)
def test_bytes_on_the_wire_of_a_parameter(wire: str | None, most: float):
    config = ZOConfig.model_validate({"wire": wire, "offload_param": {"device": "cpu"}})
    with closing(Stepper(Wide().bfloat16(), config)) as stepper:
        stepper.train_step([torch.ones(1, 256, dtype=torch.bfloat16)], LR)
        assert stepper.weights.pipeline is not None
        moved = stepper.weights.pipeline.bytes_moved
    matrices, vectors_ = 3 * 256 * 256, 3 * 256
    assert (moved - 2 * vectors_) / matrices <= most


def test_the_journal_says_what_decides_bits():
    """Which parameters are packed, or lag, follows from the units."""

    def header(**config: Any) -> dict[str, Any]:
        with closing(Stepper(net(), ZOConfig.model_validate(config), dtype=torch.bfloat16)) as one:
            return one.bit_header()

    assert header()["streamed"] is None
    assert header() == header(unit="linear")
    assert header(wire="int8")["wire"] == "int8"
    for bits in ({"wire": "int8"}, {"update": {"lag": 2}}):
        assert header(**bits) == header(**bits, unit="block")
        assert header(**bits) != header(**bits, unit=["Linear"])
