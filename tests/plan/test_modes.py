"""What moves is counted as a run counts it, in every mode."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from plan.smaller import config_like
from plan.test_arena import weights_of
from zo_offload.config import parse_config
from zo_offload.errors import CheckpointError, ConfigError, ModelError
from zo_offload.mask import Chosen, Mask, Origin, write_mask
from zo_offload.plan.budget import Tiers, place
from zo_offload.plan.rates import Rates
from zo_offload.plan.report import block_of
from zo_offload.plan.request import Budgets, Request, request_of
from zo_offload.plan.search import Layouts, plan
from zo_offload.step import Stepper

BF16 = torch.bfloat16
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
ALL = {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}
MODES: dict[str, dict[str, Any]] = {
    "kinds": {"trainable": {"kinds": ["o_proj", "down_proj"]}},
    "kinds, packed": {"trainable": {"kinds": ["o_proj", "down_proj"]}, "wire": "nf4"},
    "kinds, lagging": {"trainable": {"kinds": ["o_proj"]}, "wire": "int8", "update": {"lag": 3}},
    "kinds, on the device": {
        "trainable": {"kinds": ["down_proj"]}, "wire": "nf4", "update": {"where": "device"},
    },
    "layers": {"trainable": {"layers": [0]}},
    "parameters": {"trainable": {"parameters": ["*norm*", "*.bias"]}, "wire": "int4:64"},
    "turns": {"trainable": {"rotate": {"blocks": 1, "interval": 2}}},
    "adapters": {"trainable": {"mode": "peft", "peft_config": LORA}, "wire": "nf4"},
    "adapters everywhere": {"trainable": {"mode": "peft", "peft_config": ALL}, "probes": 4},
    "low rank": {"trainable": {"mode": "low_rank", "rank": 3}, "probes": 2, "unit": "sublayer"},
    "low rank, chosen": {"trainable": {"mode": "low_rank", "kinds": ["o_proj", "vector"]}},
    "scales, chosen": {
        "trainable": {"mode": "scales", "kinds": ["down_proj"]}, "wire": "int4:64",
    },
}  # fmt: skip


def compared(name: str, ds: dict[str, Any]) -> tuple[Stepper, Tiers]:
    """A run's stepper, closed, and its plan."""
    config = config_like(name)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.randint(4, 500, (1, 16))
    with closing(Stepper(model, parse_config(ds), dtype=BF16)) as stepper:
        stepper.train_step([{"input_ids": tokens, "labels": tokens}], lr=1e-4)
        assert stepper.weights.arena.peak_bytes <= stepper.plan.device_bytes
    request, budgets, _ = request_of(ds)
    request = replace(
        request, length=16, unit=request.unit or "block", where=request.where or "host"
    )
    return stepper, place(Layouts(config, BF16).at(request), request, budgets)


def matches(stepper: Stepper, tiers: Tiers) -> None:
    found = stepper.plan
    assert (weights_of(tiers), tiers.host_bytes, tiers.nvme_bytes) == (
        found.device_bytes, found.host_bytes, found.nvme_bytes,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # of peft, for experts
@pytest.mark.parametrize("device", ["cpu", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["opt-175b", "qwen3-235b-a22b"])
def test_a_mode_holds_what_is_planned(name: str, mode: str, device: str):
    block = {**MODES[mode], "offload_param": {"device": device}}
    if device == "none" or name.startswith("qwen3"):
        block.pop("update", None)
    if mode == "parameters" and name.startswith("qwen3"):
        block["trainable"] = {"parameters": ["*norm*"]}
    if mode == "scales, chosen" and name.startswith("qwen3"):
        block["unit"] = "linear"  # of experts that are divided
    matches(*compared(name, {"zeroth_order": block}))


@pytest.mark.parametrize("parameters", [None, ["*layer_norm*", "*.bias"]])
@pytest.mark.parametrize("device", ["cpu", "none", "nvme"])
@pytest.mark.parametrize("unit", ["block", "linear"])
def test_a_mask_and_what_moves_whole_beside_it(
    tmp_path: Path, unit: str, device: str, parameters: list[str] | None
):
    path = masked(tmp_path)
    offload = {"device": device} | ({"nvme_path": str(tmp_path)} if device == "nvme" else {})
    trainable: dict[str, Any] = {"mode": "sparse", "mask": str(path)}
    if parameters is not None:
        trainable["parameters"] = parameters
    block = {
        "wire": "int4", "probes": 4, "unit": unit, "trainable": trainable, "offload_param": offload,
    }  # fmt: skip
    matches(*compared("opt-175b", {"zeroth_order": block}))


def masked(folder: Path, step: int = 20) -> Path:
    model: Any = transformers.AutoModelForCausalLM.from_config(config_like("opt-175b"))
    sizes = {k: p.numel() for k, p in model.named_parameters() if "layers" in k and p.ndim > 1}
    chosen = {
        k: Chosen(torch.arange(0, n, step), torch.ones(-(-n // step))) for k, n in sizes.items()
    }
    path = folder / "mask.safetensors"
    write_mask(path, Mask(Origin("random", "matrix", 1 / step, sum(sizes.values())), chosen))
    return path


def test_a_mask_of_another_model_is_refused(tmp_path: Path):
    trainable = {"mode": "sparse", "mask": str(masked(tmp_path))}
    request, budgets, _ = request_of({"zeroth_order": {"trainable": trainable}})
    layouts = Layouts(config_like("llama-3-8b"), BF16)
    with pytest.raises(CheckpointError, match="is no parameter of this model's units"):
        plan(layouts, replace(request, length=16), budgets, Rates())


def test_a_mask_that_is_yet_to_be_made_takes_what_it_will(tmp_path: Path):
    request = Request(
        length=16, unit="block", where="host", lowest="host", only=True, wire="int4",
        trainable="sparse",
    )  # fmt: skip
    layouts = Layouts(config_like("opt-175b"), BF16)
    share = replace(request, share=0.05)
    to_be = place(layouts.at(share), share, Budgets())
    made = replace(request, choice={"mode": "sparse", "mask": str(masked(tmp_path))})
    there = place(layouts.at(made), made, Budgets())
    assert to_be.device["sparse"] == pytest.approx(there.device["sparse"], rel=0.01)
    assert to_be.host_bytes == pytest.approx(there.host_bytes, rel=0.01)


def test_low_rank_is_planned_by_other_units_than_groups_of_experts():
    layouts = Layouts(config_like("qwen3-235b-a22b"), BF16)
    request = Request(length=16, trainable="low_rank")
    assert plan(layouts, request, Budgets(), Rates()).request.unit == "block"
    with pytest.raises(ModelError, match="its experts would move in groups"):
        plan(layouts, replace(request, unit="linear"), Budgets(), Rates())


def test_what_training_refuses_of_a_mode_is_refused():
    layouts = Layouts(config_like("opt-175b"), BF16)
    refusals: tuple[tuple[dict[str, Any], str], ...] = (
        ({"trainable": "low_rank", "lag": 2}, "has no other lag"),
        ({"trainable": "low_rank", "master": "bf16_sr"}, "merges steps into masters in fp32"),
        ({"trainable": "scales"}, "a base of integers"),
        ({"trainable": "peft", "master": "bf16+8"}, "would save next to nothing"),
        ({"choice": {"kinds": ["o_proj"], "parameters": ["*fc1*"]}}, "together choose none"),
        ({"choice": {"layers": [7]}}, "there is no layer 7"),
        ({"trainable": "peft", "choice": {"mode": "peft", "peft_config": {"peft_type": "LOAR"}}},
         "LORA"),
    )  # fmt: skip
    for changes, words in refusals:
        with pytest.raises(ConfigError, match=words):
            plan(layouts, Request(length=16, **changes), Budgets(), Rates())


def test_initialize_takes_the_block_that_is_printed(tmp_path: Path):
    config = config_like("opt-175b")
    request = Request(length=16, trainable="peft", wire="nf4", lowest="host", only=True)
    planned = plan(Layouts(config, BF16), request, Budgets(), Rates())
    ds = {
        "train_batch_size": 1, "bf16": {"enabled": True},
        "zeroth_order": json.loads(json.dumps(block_of(planned))),
    }  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stepper = Stepper(model, parse_config(ds), dtype=BF16)
    with closing(stepper):
        matches(stepper, planned.tiers)
