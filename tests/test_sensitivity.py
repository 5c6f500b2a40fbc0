"""Squared gradients over streamed weights are autograd's."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError, ModelError
from zo_offload.objective import Objective, model_loss
from zo_offload.sensitivity import squared_gradients
from zo_offload.step import Stepper

LENGTHS = (5, 7)
NAMES = ("albert", "bart", "clip", "deberta", "mamba", "opt", "plain", "qwen3-moe", "swin", "t5")


def expected(name: str) -> dict[str, torch.Tensor]:
    """By autograd, all at once."""
    row = ROWS[name]
    model, sums = row.build(), {}
    for length in LENGTHS:
        model.zero_grad()
        loss = model_loss(model, None, model(**row.inputs(length)))
        assert loss is not None
        loss.backward()
        for each, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[each] = sums.get(each, 0) + parameter.grad.square()
    return sums


def scored(model: nn.Module, batches: list[Any], **block: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with closing(Stepper(model, ZOConfig.model_validate(block))) as stepper:
        before = stepper.weights.digest()
        squared_gradients(stepper, batches, lambda unit, sums: found.update(sums))
        assert stepper.weights.digest() == before
        assert all(parameter.grad is None for parameter in model.parameters())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_they_are_autograds(name: str, tmp_path: Path):
    row, right = ROWS[name], expected(name)
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    found = scored(row.build(), [row.inputs(n) for n in LENGTHS], offload_param=nvme)
    with closing(Stepper(row.build())) as stepper:
        units = {s.name for unit in stepper.weights.map.units for _, s in unit.segments}
    assert set(found) == units & set(right)
    largest = max(float(sums.max()) for sums in found.values())  # a key's bias has none
    for each, sums in found.items():
        torch.testing.assert_close(sums, right[each], rtol=1e-3, atol=1e-9 * largest)


@pytest.mark.parametrize("unit", ["sublayer", "linear"])
def test_any_division(unit: str):
    row, right = ROWS["opt"], expected("opt")
    found = scored(row.build(), [row.inputs(n) for n in LENGTHS], unit=unit)
    assert len(found) > 10
    for each, sums in found.items():
        torch.testing.assert_close(sums, right[each], rtol=1e-3, atol=1e-9)


def test_gradients_of_half_precision(tmp_path: Path):
    row, right = ROWS["opt"], expected("opt")
    with closing(Stepper(row.build(), dtype=torch.bfloat16)) as stepper:
        found: dict[str, torch.Tensor] = {}
        batches = [row.inputs(n) for n in LENGTHS]
        squared_gradients(stepper, batches, lambda unit, sums: found.update(sums))
    for each, sums in found.items():
        assert sums.dtype == torch.float32
        if each.endswith("weight"):
            close = torch.corrcoef(torch.stack([sums.flatten(), right[each].flatten()]))
            assert close[0, 1] > 0.95, each


def test_what_cannot_be_scored_is_refused():
    row = ROWS["qwen3-moe"]
    with pytest.raises(ModelError, match=r'experts are divided.*"unit": "sublayer"'):
        scored(row.build(), [row.inputs(5)], unit="linear")
    with pytest.raises(ConfigError, match="head_chunk: a head in chunks has no gradient"):
        scored(row.build(), [row.inputs(5)], head_chunk=8)
    accuracy = Objective(loss=lambda model, batch, outputs: outputs.logits.argmax(-1).float())
    with closing(Stepper(row.build(), objective=accuracy)) as stepper:
        with pytest.raises(ModelError, match="the loss has no gradient; score with a loss that"):
            squared_gradients(stepper, [row.inputs(5)], lambda unit, sums: None)
        stepper.train_step([row.inputs(5)], 1e-3)  # nothing was left behind


class Turning(nn.Module):
    """Leaves its second block out where the input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        for block in self.blocks[: 1 if bool(x[0, 0] < 0) else 2]:
            x = block(x)
        return {"loss": (x - labels).square().mean()}


def test_batches_that_go_different_ways_are_scored_one_by_one():
    batches = [{"x": sign * torch.ones(2, 4), "labels": torch.zeros(2, 4)} for sign in (1.0, -1.0)]
    model, kept = Turning(), []
    with closing(Stepper(model)) as stepper:
        words = "batches take different ways through the model's units; score them one at a time$"
        with pytest.raises(ModelError, match=words):
            squared_gradients(stepper, batches, lambda *found: kept.append(found))
        assert kept == []
        for batch in batches:  # each alone, and nothing was left behind
            squared_gradients(stepper, [batch], lambda *found: kept.append(found))
    assert [unit.name for unit, _ in kept] == ["blocks.1", "blocks.0", "blocks.0"]


def test_training_goes_on_to_the_same_bits():
    row, digests = ROWS["opt"], []
    for scores in (False, True):
        with closing(Stepper(row.build())) as stepper:
            stepper.train_step([row.inputs(5)], 1e-3)
            if scores:
                squared_gradients(stepper, [row.inputs(5)], lambda unit, sums: None)
            stepper.train_step([row.inputs(5)], 1e-3)
            digests.append(stepper.weights.digest())
    assert digests[0] == digests[1]


PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
from transformers import OPTConfig, OPTForCausalLM
from zo_offload.config import ZOConfig
from zo_offload.sensitivity import squared_gradients
from zo_offload.step import Stepper

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

config = OPTConfig(
    hidden_size=512, ffn_dim=2048, num_hidden_layers=10, vocab_size=512, num_attention_heads=4,
    word_embed_proj_dim=512, max_position_embeddings=64,
)
nvme = {"offload_param": {"device": "nvme", "nvme_path": sys.argv[1]}}
with Stepper(OPTForCausalLM(config), ZOConfig.model_validate(nvme)) as stepper:
    tokens = torch.randint(5, 500, (1, 32))
    batches = [{"input_ids": tokens + i, "labels": tokens + i} for i in range(4)]
    stepper.train_step(batches, 1e-4)  # every block is on the disk now
    stepper.train_step(batches, 1e-4)
    Path("/proc/self/clear_refs").write_text("5")
    stepper.train_step(batches, 1e-4)
    training = most()
    squared_gradients(stepper, batches, lambda unit, sums: None)
    units = stepper.weights.map.units
    print(json.dumps({
        "grown": most() - training,
        "unit": max(4 * unit.num_parameters for unit in units),
        "model": sum(4 * unit.num_parameters for unit in units),
        "passages": len(units) * len(batches) * 32 * 512 * 4,
    }))
"""


@pytest.mark.thorough
def test_it_takes_the_memory_of_training_and_one_units_gradients(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes at once
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    gradients = 3 * found["unit"]  # a batch's, their square and the sum
    left = 3 * found["passages"]  # what units gave and were given, and its gradients
    slack = 8 << 20
    assert found["grown"] <= gradients + left + slack
    assert found["model"] > 2 * (gradients + left + slack)
