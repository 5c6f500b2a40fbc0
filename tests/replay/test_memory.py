"""Memory does not grow with the model: a piece at a time, whatever there is of them."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from models.table import of

from replay.ways import Run
from zo_offload.config import ZOConfig
from zo_offload.integrations.hf import load_model
from zo_offload.journal import Journal, Probe, Record
from zo_offload.step import Stepper

SLACK = 8 << 20  # allocators, module objects
PROGRAM = """
import gc, json, re, sys, threading, time
import torch
from zo_offload.replay import command, pieces

pieces.PIECE = 1 << 16
torch.set_num_threads(1)

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def sample():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)

most = [0]
threading.Thread(target=sample, daemon=True).start()
tiny, large = (command.ReplayOptions(*given) for given in json.loads(sys.argv[1]))
command.replay(tiny)  # what a first use imports
gc.collect()
before = most[0] = anonymous()
command.replay(large)
print(most[0] - before)
"""


def made_up(folder: Path, width: int, layers: int) -> Run:
    """A model, and a journal of one made-up step."""
    folder.mkdir()
    own = {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "vocab_size": 96}
    settings = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    model: Any = of("OPTForCausalLM", **own, **settings)()
    model.to(torch.bfloat16).save_pretrained(str(folder / "base"))
    with closing(Stepper(load_model(folder / "base"), ZOConfig())) as stepper:
        header = stepper.bit_header()
    with Journal.create(folder / "run.journal", header) as journal:
        journal.append(Record(0, (Probe(0, 1.0, 1e-3),), (0.0, 0.0), eps=1e-3, lr=1e-3))
    return Run(folder / "base", folder / "run.journal", folder, {})


def test_memory_is_of_pieces_not_of_the_model(tmp_path: Path):
    runs = [made_up(tmp_path / "tiny", 32, 1), made_up(tmp_path / "large", 256, 20)]
    given = [[str(run.base), str(run.journal), f"{run.base}-out"] for run in runs]
    model_bytes = (runs[1].base / "model.safetensors").stat().st_size
    assert model_bytes > 3 * SLACK
    program = [sys.executable, "-c", PROGRAM, json.dumps(given)]
    # glibc maps what is large: memory that was freed is not counted
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < SLACK
