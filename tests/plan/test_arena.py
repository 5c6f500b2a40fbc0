"""What is planned is what training then holds, on small models of the same blocks."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from plan.smaller import SMALLER, config_like
from zo_offload.config import OffloadConfig, ZOConfig, parse_config
from zo_offload.mask import Chosen, Mask, Origin, write_mask
from zo_offload.plan.budget import Tiers, place
from zo_offload.plan.request import Budgets, Request, read_json
from zo_offload.plan.search import Layouts
from zo_offload.step import Stepper

BASE = Request(length=16, lowest="host", only=True, where="host")
ACTIVATIONS = ("activations", "logits")


def planned(config: Any, dtype: torch.dtype, request: Request) -> Tiers:
    layout = Layouts(config, dtype).at(request)
    return place(layout, request, Budgets())


def weights_of(tiers: Tiers) -> int:
    return tiers.device_bytes - sum(tiers.device[part] for part in ACTIVATIONS)


def stepper_of(config: Any, dtype: torch.dtype, request: Request, device: Any) -> Stepper:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    options: Any = {
        "unit": request.unit,
        "probes": request.probes,
        "head_chunk": request.head_chunk,
        "master": request.master,
        "offload_param": OffloadConfig(device=device, buffer_count=request.num_slots),
        "update": {"where": request.where if device == "cpu" else None, "lag": request.lag},
        "wire": request.wire,
    }
    return Stepper(model, ZOConfig(**options), dtype=dtype)


@pytest.mark.parametrize(
    ("unit", "head_chunk"),
    [("block", None), ("sublayer", None), ("linear", None), ("block", 100)],
)
@pytest.mark.parametrize("name", SMALLER)
def test_the_arena_peaks_where_the_plan_says(name: str, unit: str, head_chunk: int | None):
    config = config_like(name)
    request = replace(BASE, unit=unit, probes=2, head_chunk=head_chunk)
    tokens = torch.randint(4, 500, (1, 16))
    with closing(stepper_of(config, torch.bfloat16, request, "cpu")) as stepper:
        stepper.train_step([{"input_ids": tokens, "labels": tokens}], lr=1e-3)
        peak, plan = stepper.weights.arena.peak_bytes, stepper.plan
        assert stepper.weights.host_bytes == plan.host_bytes
    tiers = planned(config, torch.bfloat16, request)
    assert peak == pytest.approx(weights_of(tiers), rel=0.02)
    assert tiers.host_bytes == plan.host_bytes


@pytest.mark.parametrize("device", ["cpu", "none"])
@pytest.mark.parametrize(
    "wire", ["int4", "nf4", "int8", "lossless12", "int4:64", "nf4:64", "int8:64", "fp8_e4m3:64"]
)
def test_a_frozen_base_takes_what_its_wire_takes(wire: str, device: Any):
    config = config_like("llama-3-8b")
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)  # something has to be
    tokens = torch.randint(4, 500, (1, 16))
    block = {"wire": wire, "offload_param": {"device": device}}
    with closing(Stepper(model, ZOConfig.model_validate(block), dtype=torch.bfloat16)) as stepper:
        stepper.train_step([{"input_ids": tokens, "labels": tokens}], lr=1e-3)
        weights, plan, units = stepper.weights, stepper.plan, stepper.weights.map.units
        assert (weights.arena.peak_bytes, weights.host_bytes) == (
            plan.device_bytes, plan.host_bytes,
        )  # fmt: skip
        trained = 2 * 2 * 128 + 2 * 128  # a norm of 64, padded: its copies, and its masters' rest
    lowest = {"cpu": "host", "none": "device"}[device]
    request = replace(BASE, unit="block", lowest=lowest, wire=wire, trainable="sparse")
    request = replace(request, share=0.0)
    tiers = planned(config, torch.bfloat16, request)
    rounding = 64 * len(units)  # scales up to whole sections
    for name, found in (("slots", plan.slots), ("scratch", plan.scratch)):
        assert tiers.device[name] <= found <= tiers.device[name] + rounding, name
    on_device = weights_of(tiers)
    assert on_device <= plan.device_bytes <= on_device + rounding + trained
    assert tiers.host_bytes <= plan.host_bytes <= tiers.host_bytes + rounding + trained


@pytest.mark.parametrize("device", ["cpu", "none"])
@pytest.mark.parametrize("name", ["opt-175b", "llama-2-7b"])
def test_chosen_weights_take_what_is_planned(tmp_path: Path, name: str, device: Any):
    config, mask = config_like(name), tmp_path / "mask.safetensors"
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    matrices = {k: p.numel() for k, p in model.named_parameters() if "layers" in k and p.ndim > 1}
    chosen = {
        k: Chosen(torch.arange(0, n, 20), torch.ones(-(-n // 20))) for k, n in matrices.items()
    }
    write_mask(mask, Mask(Origin("random", "matrix", 0.05, sum(matrices.values())), chosen))
    trainable = {"mode": "sparse", "mask": str(mask)}
    ds = {
        "zeroth_order": {
            "wire": "int8",
            "trainable": trainable,
            "offload_param": {"device": device},
        }
    }
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    with closing(Stepper(model, parse_config(ds), dtype=torch.bfloat16)) as stepper:
        plan = stepper.plan
    request, _, _ = read_json(tmp_path / "ds.json")
    tiers = planned(config, torch.bfloat16, replace(request, length=16, unit="block"))
    assert plan.device_bytes == pytest.approx(weights_of(tiers), rel=0.02)
    assert plan.host_bytes == pytest.approx(tiers.host_bytes, rel=0.02)


@pytest.mark.parametrize("device", ["cpu", "none"])
@pytest.mark.parametrize("wire", ["int4", "int8", "int4:64"])
def test_scales_take_what_the_plan_says(wire: str, device: Any):
    config = config_like("llama-3-8b")
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.randint(4, 500, (1, 16))
    block = {
        "wire": wire, "trainable": {"mode": "scales"}, "offload_param": {"device": device},
    }  # fmt: skip
    with closing(Stepper(model, ZOConfig.model_validate(block), dtype=torch.bfloat16)) as stepper:
        stepper.train_step([{"input_ids": tokens, "labels": tokens}], lr=1e-6)
        plan = stepper.plan
        assert stepper.weights.arena.peak_bytes == plan.device_bytes
        assert stepper.weights.host_bytes == plan.host_bytes
    lowest = {"cpu": "host", "none": "device"}[device]
    request = replace(BASE, unit="block", lowest=lowest, wire=wire, trainable="scales")
    tiers = planned(config, torch.bfloat16, request)
    rounding = 2 * 7 * 128 * 4 + 7 * 128 * 4 + 2 * 64 + 2 * 64  # every matrix's scales up to 128
    assert weights_of(tiers) <= plan.device_bytes <= weights_of(tiers) + rounding
    assert tiers.host_bytes <= plan.host_bytes <= tiers.host_bytes + rounding


@pytest.mark.parametrize(
    ("device", "changes", "dtype"),
    [
        ("cpu", {"where": "device"}, torch.bfloat16),
        ("cpu", {"lag": 4}, torch.bfloat16),
        ("cpu", {"master": "bf16+8", "num_slots": 3}, torch.bfloat16),
        ("cpu", {"master": "bf16_sr", "unit": "linear"}, torch.bfloat16),
        ("cpu", {"unit": "sublayer"}, torch.float16),
        ("cpu", {"head_chunk": 100}, torch.bfloat16),
        ("cpu", {"head_chunk": 100_000, "probes": 2}, torch.float32),
        ("cpu", {}, torch.float32),
        ("none", {}, torch.bfloat16),
        ("none", {"lag": 4, "unit": "linear"}, torch.bfloat16),
        ("none", {"master": "bf16+8"}, torch.bfloat16),
        ("cpu", {"wire": "int8"}, torch.bfloat16),
        ("cpu", {"wire": "nf4", "where": "device"}, torch.bfloat16),
        ("cpu", {"wire": "int4", "lag": 4, "unit": "linear"}, torch.bfloat16),
        ("cpu", {"wire": "fp8_e4m3", "master": "bf16_sr"}, torch.bfloat16),
        ("cpu", {"wire": "bf16"}, torch.float32),
        ("cpu", {"wire": "fp16"}, torch.float32),
        ("cpu", {"wire": "nf4"}, torch.float16),
        ("cpu", {"wire": "nf4:64", "lag": 4}, torch.bfloat16),
        ("cpu", {"wire": "int8:64", "where": "device"}, torch.bfloat16),
        ("none", {"wire": "int8"}, torch.bfloat16),
    ],
)
def test_weights_are_what_the_engine_counts(device: str, changes: dict, dtype: torch.dtype):
    request = replace(BASE, unit="block", lowest={"cpu": "host", "none": "device"}[device])
    request = replace(request, **changes)
    config = config_like("opt-175b")
    with closing(stepper_of(config, dtype, request, device)) as stepper:
        plan = stepper.plan
    tiers = planned(config, dtype, request)
    assert {name: tiers.device[name] for name in ("slots", "scratch", "ambient_copies")} == {
        "slots": plan.slots, "scratch": plan.scratch, "ambient_copies": plan.ambient_copies,
    }  # fmt: skip
    assert (weights_of(tiers), tiers.host_bytes) == (plan.device_bytes, plan.host_bytes)


@pytest.mark.parametrize("where", ["host", "device"])
def test_lossless_matrices_have_room_for_not_shrinking(where: str):
    request = replace(BASE, unit="block", wire="lossless12", where=where)
    config = config_like("opt-175b")
    with closing(stepper_of(config, torch.bfloat16, request, "cpu")) as stepper:
        plan = stepper.plan
    tiers = planned(config, torch.bfloat16, request)
    assert weights_of(tiers) == pytest.approx(plan.device_bytes, rel=0.02)
    assert tiers.host_bytes == pytest.approx(plan.host_bytes, rel=0.02)


@pytest.mark.parametrize("wire", ["identity", "int8"])
@pytest.mark.parametrize("unit", ["block", "sublayer", "linear"])
@pytest.mark.parametrize("name", ["opt-175b", "llama-3-8b", "qwen3-235b-a22b"])
def test_files_are_as_large_as_the_plan_says(tmp_path: Path, name: str, unit: str, wire: str):
    config = config_like(name, num_hidden_layers=12)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    offload = OffloadConfig.model_validate({"device": "nvme", "nvme_path": str(tmp_path)})
    options: Any = {"offload_param": offload, "unit": unit, "wire": wire}
    tokens = torch.randint(4, 500, (1, 16))
    with closing(Stepper(model, ZOConfig(**options), dtype=torch.bfloat16)) as stepper:
        for _ in range(2):  # updates are written by the next visit
            stepper.train_step([{"input_ids": tokens, "labels": tokens}], lr=1e-3)
        files = sum(path.stat().st_size for path in tmp_path.rglob("units.bin"))
        assert stepper.plan.nvme_bytes == files
    tiers = planned(config, torch.bfloat16, replace(BASE, unit=unit, lowest="nvme", wire=wire))
    assert tiers.nvme_bytes == files


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 2.0])
@pytest.mark.parametrize(
    ("tier", "wire"), [("device", "identity"), ("host", "identity"), ("device", "int8")]
)
def test_budgets_of_the_json_are_filled_as_the_engine_fills_them(
    tmp_path: Path, tier: str, wire: str, share: float
):
    """All that the JSON sends to a disk rests nearer as far as its own budgets say."""
    request = replace(BASE, unit="block", lowest="nvme", wire=wire)
    config = config_like("opt-175b")
    config.num_hidden_layers = 24
    layout = Layouts(config, torch.bfloat16).at(request)
    least = place(layout, request, Budgets(host_weights=0))
    units = int((least.sizes.wire + least.sizes.rest).sum())
    held = {"device": weights_of(least), "host": least.host_bytes}[tier]
    budget = held + int(share * units)
    asked = {"device": {"device_weights": budget}, "host": {"host_weights": budget}}[tier]
    tiers = place(layout, request, Budgets(**asked))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    offload = OffloadConfig.model_validate({"device": "nvme", "nvme_path": str(tmp_path)})
    options: Any = {"offload_param": offload, "unit": "block", "wire": wire}
    options[f"{tier}_budget"] = budget
    with closing(Stepper(model, ZOConfig(**options), dtype=torch.bfloat16)) as stepper:
        plan, there = stepper.plan, list(stepper.weights.tiers.values())
    assert abs(there.count("nvme") - tiers.residents[2]) <= 1
    assert plan.host_bytes == pytest.approx(tiers.host_bytes, rel=0.02)
    assert plan.device_bytes == pytest.approx(weights_of(tiers), rel=0.02)
