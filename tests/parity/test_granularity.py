"""How far blocks are divided decides what moves together, and no bit of what is trained."""

from contextlib import closing
from typing import Any

import pytest
import torch
from models.table import ROWS
from torch import nn

from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import ModelError, StoreError
from zo_offload.step import Stepper
from zo_offload.units import map_model

STREAMED = OffloadConfig(device="cpu")


def trained(
    name: str, unit: Any, dtype: torch.dtype, offload: OffloadConfig = STREAMED
) -> tuple[list, dict[str, torch.Tensor]]:
    """Lane losses of three steps on two micro-batches, and the masters after them."""
    row = ROWS[name]
    model: Any = row.build()
    if "moe" in name:  # what linear units ask for; another forward rounds otherwise
        model.set_experts_implementation("eager")
    config = ZOConfig(probes=2, unit=unit, offload_param=offload)
    with closing(Stepper(model, config, dtype=dtype)) as stepper:
        stepper.weights.poison = True
        batches = [row.inputs(length, dtype) for length in (6, 4)]
        losses = [stepper.train_step(batches, lr=1e-3).lane_losses for _ in range(3)]
        assert stepper.weights.arena.peak_bytes == stepper.plan.device_bytes
        return losses, dict(stepper.weights.masters())


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["plain", "opt", "llama", "qwen3-moe", "t5"])
def test_finer_units_train_to_the_same_bits(name: str, dtype: torch.dtype):
    losses, masters = trained(name, "block", dtype)
    for unit in ("sublayer", "linear"):
        other_losses, others = trained(name, unit, dtype)
        assert other_losses == losses, unit
        assert [n for n in masters if not torch.equal(masters[n], others[n])] == [], unit


EXPECTED = {  # of the first block
    ("opt", "sublayer"): ["self_attn", "fc1", "fc2"],
    ("opt", "linear"): [
        *(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "fc1", "fc2",
    ],
    ("qwen3-moe", "sublayer"): ["self_attn", "mlp"],
    ("qwen3-moe", "linear"): [
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.experts[{i}:{i + 1}]" for i in range(4)), "mlp.gate",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "unit"), EXPECTED)
def test_what_a_block_is_divided_into(name: str, unit: str):
    units = map_model(ROWS[name].build(), unit).units
    first = [each.name.split("layers.0.")[1] for each in units if "layers.0." in each.name]
    assert first == EXPECTED[name, unit]


def test_a_block_that_is_one_layer_stays_whole():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    for unit in ("block", "sublayer", "linear"):
        assert [each.name for each in map_model(model, unit).units] == ["blocks.0", "blocks.1"]


def test_a_layer_whose_weight_others_read_is_refused():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)  # reads its projection's weight itself

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x)).square().mean()

    with (
        closing(Stepper(Model(), ZOConfig(unit="linear"))) as stepper,
        pytest.raises(ModelError, match=r"out_proj.weight was read by .* outside the forward"),
    ):
        stepper.train_step([torch.ones(3, 2, 8)], lr=0.0)


def test_a_budget_chooses_the_coarsest_units_that_fit():
    def units(budget: int | None) -> tuple[int, int]:
        config = ZOConfig(device_budget=budget, offload_param=STREAMED)
        with closing(Stepper(ROWS["opt"].build(), config)) as stepper:
            stepper.train_step([ROWS["opt"].inputs(6)], lr=0.0)
            return len(stepper.weights.map.units), stepper.weights.arena.peak_bytes

    blocks, most = units(None)
    assert (blocks, most) == units(most)
    divided, least = units(most - 1)
    assert divided > blocks
    assert least < most
    with pytest.raises(StoreError, match="device_budget: the weights need"):
        units(least // 2)


def test_divided_units_rest_on_the_device_too():
    streamed = trained("opt", "linear", torch.float32)
    resident = trained("opt", "linear", torch.float32, OffloadConfig())
    assert streamed[0] == resident[0]
    assert [n for n in resident[1] if not torch.equal(resident[1][n], streamed[1][n])] == []
