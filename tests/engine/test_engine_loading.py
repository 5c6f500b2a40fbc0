"""A model given by its path: beside the stores no more than a shard and a unit is in memory."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models.table import EXPERTS, of
from safetensors.torch import load_file

SHARD = 8 << 20
SLACK = 8 << 20  # allocators, module objects
PROGRAM = """
import gc, json, re, sys, threading, time
import zo_offload, zo_offload.engine

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def sample():  # the kernel keeps no high-water mark of anonymous memory
    while True:
        most[0] = max(most[0], status("RssAnon"))
        time.sleep(0.002)

def used(path, config):
    engine, *_ = zo_offload.initialize(model=path, config=config)
    weights = engine.stepper.weights
    weights.digest()  # every unit passes through memory once, those of a disk too
    unit = max(unit.wire_bytes + unit.rest_bytes for unit in weights.map.everything)
    found = {"held": weights.host_bytes + weights.arena.peak_bytes, "unit": unit}
    engine.destroy()
    return found

most = [0]
threading.Thread(target=sample, daemon=True).start()
for tiny, large, config in json.loads(sys.argv[1]):
    used(tiny, config)  # what a first use imports
    gc.collect()
    before, mapped = status("RssAnon"), status("VmHWM")
    most[0] = before
    found = used(large, config)
    grown = {"anonymous": most[0] - before, "all": status("VmHWM") - mapped}
    print(json.dumps(found | grown), flush=True)
"""


def opt(width: int, layers: int) -> Any:
    own = {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    return made("OPTForCausalLM", width, layers, **own)


def mixtral(width: int, layers: int) -> Any:
    own = {"intermediate_size": 2 * width, "num_local_experts": 4}
    return made("MixtralForCausalLM", width, layers, **own, **EXPERTS)


def qwen3_moe(width: int, layers: int) -> Any:
    own = {"moe_intermediate_size": width, "num_experts": 8, "head_dim": width // 4}
    return made("Qwen3MoeForCausalLM", width, layers, **own, **EXPERTS)


def made(architecture: str, width: int, layers: int, **own: int) -> Any:
    own |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    return of(architecture, vocab_size=512, max_position_embeddings=64, **own)()


def saved(folder: Path, make: Callable[[int, int], Any], width: int, layers: int) -> list[str]:
    """A tiny model, and a large one in shards of 8 MB."""
    found = []
    for name, model in (("tiny", make(8, 2)), ("large", make(width, layers))):
        found.append(str(folder / name))
        model.to(torch.bfloat16).save_pretrained(found[-1], max_shard_size=SHARD)
    assert len(list((folder / "large").glob("*.safetensors"))) > 5
    return found


def config_of(**offload: Any) -> dict[str, Any]:
    block = {"offload_param": offload, "journal": {"path": None}}
    return {"train_batch_size": 1, "bf16": {"enabled": True}, "zeroth_order": block}


def measured(folder: Path, *cases: list[Any]) -> list[dict[str, int]]:
    """Bytes of each case (tiny model, large model, config), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},  # what is freed goes back at once
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_peak_is_the_stores_a_shard_and_a_unit(tmp_path: Path):
    folders = saved(tmp_path, opt, 512, 16)
    found = measured(tmp_path, [*folders, config_of(device="cpu")])[0]
    assert found["all"] <= found["held"] + SHARD + found["unit"] + SLACK
    assert found["held"] > 200e6


def test_what_is_converted_is_not_in_memory(tmp_path: Path):
    """Experts that are merged as they are loaded: 50 MB, nearly all of the model."""
    disk = config_of(device="nvme", nvme_path=str(tmp_path / "disk"))
    folders = [saved(tmp_path / make.__name__, make, 256, 16) for make in (mixtral, qwen3_moe)]
    merged = 2 * 8 * 256 * 256 * 2  # gates and projections of a layer, either model's
    for (_, large), found in zip(
        folders, measured(tmp_path, *([*each, disk] for each in folders)), strict=True
    ):
        bound = found["held"] + SHARD + found["unit"] + merged + SLACK
        assert found["anonymous"] <= bound
        assert bytes_of_experts(Path(large)) > 2 * (bound - found["held"] - SLACK)


def bytes_of_experts(folder: Path) -> int:
    """That lie in a checkpoint as matrices of their own."""
    held = [item for path in folder.glob("*.safetensors") for item in load_file(path).items()]
    return sum(value.nbytes for key, value in held if re.search(r"\.experts\.\d+\.", key))
