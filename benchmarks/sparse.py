"""All the memory that a sparse run takes, device and host together, beside what was planned.

A Llama of random weights (Llama 2 7B's shape unless told otherwise) is written in shards, a mask of
0.1 % is made at random, and a process of its own trains over a base of four bits. "Device" and host
are one machine's memory here, so that the peak of anonymous memory is that of both.

    python benchmarks/sparse.py [--folder DIR] [--layers 32] [--width 4096] [--inner 11008]
                                [--wire nf4] [--device none|cpu|nvme] [--tokens 64] [--steps 2]

The last line is JSON: ``planned_bytes`` (``zo-offload plan``: weights, activations, logits; device
and host), ``weights_bytes`` (what the run counted of weights), ``peak_bytes`` (of the process,
beyond what it held before a model was loaded), ``peak_vs_planned``, ``model_bytes`` (parameters x
2) and ``step_seconds``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zo_offload.cli import main
from zo_offload.config import parse_config
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.plan.budget import place
from zo_offload.plan.request import Budgets, read_json
from zo_offload.plan.search import Layouts
from zo_offload.step import Stepper

INTERVAL = 0.01  # seconds between two looks at the process


def write_model(folder: Path, layers: int, width: int, inner: int) -> None:
    """A shard a block: no more than a block is in memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 128, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    files: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        file = f"model-{words[2] if 'layers' in words else 'ambient'}.safetensors"
        files.setdefault(file, []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {}
        for name in names:
            values = torch.empty(shapes[name].shape, dtype=torch.bfloat16)
            tensors[name] = (
                values.fill_(1) if values.ndim < 2 else values.normal_(0, 0.02, generator=generator)
            )
        save_file(tensors, folder / file, {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    index = {name: file for file, names in files.items() for name in names}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def anonymous_bytes() -> int:
    """Of this process, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(peak: list[int]) -> Iterator[None]:
    """Note the most anonymous memory that the process holds meanwhile."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(INTERVAL):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def train(folder: Path, tokens: int, steps: int) -> dict[str, Any]:
    """What a run held, and how long a step took."""
    ids = torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(1))
    block = parse_config(json.loads((folder / "ds.json").read_text()))
    before, peak, times = anonymous_bytes(), [0], []
    with watched(peak):
        model = load_causal_lm(str(folder))
        with Stepper(model, block, dtype=torch.bfloat16) as stepper:
            for _ in range(steps):
                began = time.monotonic()
                stepper.train_step([{"input_ids": ids, "labels": ids}], lr=1e-4)
                times.append(time.monotonic() - began)
            weights = stepper.weights.arena.peak_bytes + stepper.weights.host_bytes
            parameters = stepper.weights.map.num_parameters
    return {
        "weights_bytes": weights,
        "peak_bytes": peak[0] - before,
        "model_bytes": 2 * parameters,
        "step_seconds": min(times),
    }


def planned(folder: Path, tokens: int) -> int:
    """Bytes of device and host."""
    from transformers import AutoConfig

    request, _, _ = read_json(folder / "ds.json")
    changed = {"length": tokens, "unit": "block", "micro_batches": 1, "batch_size": 1}
    request = type(request)(**{**vars(request), **changed})
    layout = Layouts(AutoConfig.from_pretrained(folder), torch.bfloat16).at(request)
    tiers = place(layout, request, Budgets())
    return tiers.device_bytes + tiers.host_bytes


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Model, mask and JSON."""
    began = time.monotonic()
    write_model(folder, options.layers, options.width, options.inner)
    mask = folder / "mask.safetensors"
    ds: dict[str, Any] = {"train_batch_size": 1, "bf16": {"enabled": True}, "zeroth_order": {}}
    offload = {"device": options.device}
    if options.device == "nvme":
        offload["nvme_path"] = str(folder / "units")
    ds["zeroth_order"] = {
        "wire": options.wire,
        "offload_param": offload,
        "trainable": {"mode": "sparse", "mask": str(mask)},
    }
    (folder / "ds.json").write_text(json.dumps(ds))
    scoring = ["--model", folder, "--output", mask, "--method", "random"]
    main([str(each) for each in ("sensitivity", *scoring)], standalone_mode=False)
    print(f"model and mask: {time.monotonic() - began:.0f} s")


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--wire", default="nf4")
    parser.add_argument("--device", default="none", choices=["none", "cpu", "nvme"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        print(json.dumps(train(options.train, options.tokens, options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        prepare(folder, options)
        again = [sys.executable, __file__, "--train", name]
        again += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
        done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        found = json.loads(done.stdout.splitlines()[-1])
        expected = planned(folder, options.tokens)
    ratio = round(found["peak_bytes"] / expected, 3)
    print(json.dumps({"planned_bytes": expected, **found, "peak_vs_planned": ratio}))


if __name__ == "__main__":
    run()
