"""A model given by its path: beside the stores no more than a shard and a unit is in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

SHARD = 8 << 20
PROGRAM = """
import json, re, sys
import torch
import zo_offload, zo_offload.engine, transformers.models.opt.modeling_opt

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

config = json.loads(sys.argv[2])
zo_offload.initialize(model=sys.argv[3], config=config)[0].destroy()  # what a first use imports
before = most()
engine, *_ = zo_offload.initialize(model=sys.argv[1], config=config)
weights = engine.stepper.weights
held = weights.host_bytes + weights.arena.peak_bytes
unit = max(unit.wire_bytes + unit.rest_bytes for unit in weights.map.everything)
print(json.dumps({"grown": most() - before, "held": held, "unit": unit}))
engine.destroy()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of 100 MB in shards of 8 MB, and a tiny one."""
    found = []
    for name, width, layers in (("large", 512, 16), ("tiny", 8, 2)):
        config = OPTConfig(
            hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers, vocab_size=512,
            num_attention_heads=4, word_embed_proj_dim=width, max_position_embeddings=64,
        )  # fmt: skip
        model: Any = OPTForCausalLM(config)
        model = model.to(torch.bfloat16)
        found.append(str(tmp_path_factory.mktemp(name)))
        model.save_pretrained(found[-1], max_shard_size=SHARD)
    return found


def test_peak_is_the_stores_a_shard_and_a_unit(folders: list[str], tmp_path: Path):
    config = {
        "train_batch_size": 1,
        "bf16": {"enabled": True},
        "zeroth_order": {"offload_param": {"device": "cpu"}},
    }
    assert len(list(Path(folders[0]).glob("*.safetensors"))) > 5
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folders[0], json.dumps(config), folders[1]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    slack = 8 << 20  # allocators, module objects
    assert found["grown"] <= found["held"] + SHARD + found["unit"] + slack
    assert found["held"] > 200e6
