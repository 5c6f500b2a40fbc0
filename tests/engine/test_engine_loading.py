"""A model given by its path: beside the stores no more than a shard and a unit is in memory."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import EXPERTS, of
from safetensors.torch import load_file

SHARD = 8 << 20
SLACK = 8 << 20  # allocators, module objects
PROGRAM = """
import gc, json, re, sys, threading, time
import zo_offload, zo_offload.engine
from zo_offload.integrations.hf import load_causal_lm

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def sample():  # the kernel keeps no high-water mark of anonymous memory
    while True:
        with lock:  # or a case's beginning is lost to a sample of the case before
            most[0] = max(most[0], status("RssAnon"))
        time.sleep(0.002)

def used(path, config, frozen=None):
    if frozen is not None:
        path = load_causal_lm(path)
        path.get_submodule(frozen).requires_grad_(False)
    engine, *_ = zo_offload.initialize(model=path, config=config)
    weights = engine.stepper.weights
    weights.digest()  # every unit passes through memory once, those of a disk too
    unit = max(unit.plain_bytes + unit.rest_bytes for unit in weights.map.everything)
    found = {"held": weights.host_bytes + weights.arena.peak_bytes, "unit": unit}
    engine.destroy()
    return found

most, lock = [0], threading.Lock()
threading.Thread(target=sample, daemon=True).start()
for tiny, large, config, *frozen in json.loads(sys.argv[1]):
    used(tiny, config)  # what a first use imports
    gc.collect()
    before, mapped = status("RssAnon"), status("VmHWM")
    with lock:
        most[0] = before
    found = used(large, config, *frozen)
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


def config_of(wire: str | None = None, **offload: Any) -> dict[str, Any]:
    block = {"offload_param": offload, "journal": {"path": None}, "wire": wire}
    return {"train_batch_size": 1, "bf16": {"enabled": True}, "zeroth_order": block}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes that loading takes, measured in a process of its own."""
    folder = tmp_path_factory.mktemp("models")
    disk = config_of(device="nvme", nvme_path=str(folder / "disk"))
    dense = saved(folder / "opt", opt, 512, 16)
    cases: dict[str, list[Any]] = {  # the first is measured by a high-water mark
        "opt": [*dense, config_of(device="cpu")],
        "frozen": [*dense, config_of("nf4", device="cpu"), "model.decoder.layers"],
        "mixtral": [*saved(folder / "mixtral", mixtral, 256, 16), disk],
        "qwen3-moe": [*saved(folder / "qwen3-moe", qwen3_moe, 256, 16), disk],
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(cases.values()))],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},  # what is freed goes back at once
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    experts = [bytes_of_experts(Path(large)) for _, large, *_ in cases.values()]
    return {
        name: {"experts": size, **each}
        for name, size, each in zip(cases, experts, found, strict=True)
    }


def test_peak_is_the_stores_a_shard_and_a_unit(measured: dict[str, dict[str, int]]):
    found = measured["opt"]
    assert found["all"] <= found["held"] + SHARD + found["unit"] + SLACK
    assert found["held"] > 200e6


def test_a_frozen_base_is_in_memory_as_it_rests(measured: dict[str, dict[str, int]]):
    """Beside the stores, anonymous memory holds a unit that is packed and one fp32 matrix of it."""
    found = measured["frozen"]
    assert found["held"] < 40e6  # of 100 MB
    assert found["anonymous"] <= found["held"] + found["unit"] + 512 * 2048 * 4 + SLACK


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_that_are_merged_are_not_in_memory(measured: dict[str, dict[str, int]], name: str):
    found = measured[name]
    merged = 2 * 8 * 256 * 256 * 2  # gates and projections of a layer, either model's
    bound = SHARD + found["unit"] + merged
    assert found["anonymous"] <= found["held"] + bound + SLACK
    assert found["experts"] > bound + 2 * SLACK  # they would be found


def bytes_of_experts(folder: Path) -> int:
    """That lie in a checkpoint as matrices of their own."""
    held = [item for path in folder.glob("*.safetensors") for item in load_file(path).items()]
    return sum(value.nbytes for key, value in held if re.search(r"\.experts\.\d+\.", key))
