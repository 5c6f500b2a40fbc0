"""A replay of many steps beside the update kernel alone: speed, memory, and equality to the bit.

A random Llama of 98 million parameters in bfloat16 with fp32 masters, and a journal of made-up
projected gradients. In each round, in turns: the kernel takes the same steps on data that stays in
cache, and on a buffer as large as the model; then ``zo-offload replay`` rebuilds the model in a
process of its own, whose seconds from the command's begin to its end count, and whose peak of
anonymous memory is polled. The weights are compared with those of a stepper that has taken the
steps of the journal.

Before that a real training of a small model, whose export and replay are compared.

    python benchmarks/replay.py [--steps 1000] [--rounds 3] [--threads 2] [--layers 7]

The last line is JSON. ``replay_vs_kernel`` is the rate of the whole command, in elements times
steps a second, over that of the kernel on the large buffer: loading, the digest of the base and
the export are in it; importing is not. ``of_processor_time`` is the same by the seconds that
processors worked, for machines that others use meanwhile.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from zo_offload import Stepper, ops
from zo_offload.config import parse_config
from zo_offload.integrations.hf import load_model
from zo_offload.journal import Journal, Probe, Record
from zo_offload.ops import Draw, Segment, Span, StepUpdate

IN_CACHE = 1 << 17  # elements, of 4 bytes
CALLS = 16  # on what stays in cache
BLOCK = 128  # elements that kernels are called with, or a multiple
LR = 1e-6
RUN = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from zo_offload.replay.command import ReplayOptions, replay

base, journal, out, threads = sys.argv[1:]
began, before = time.perf_counter(), time.process_time()
replay(ReplayOptions(base, journal, out, threads=int(threads)))
print(json.dumps([time.perf_counter() - began, time.process_time() - before]))
"""


def make_model(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """Save a random model; gives its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, vocab_size=vocabulary,
        intermediate_size=width * 11 // 4, num_attention_heads=8, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(str(folder))
    return model.num_parameters()


def stepper_of(base: Path) -> Stepper:
    config = parse_config({"zeroth_order": {"offload_param": {"device": "cpu"}}})
    return Stepper(load_model(base), config)


def make_up(base: Path, path: Path, export: Path, steps: int) -> float:
    """A journal of made-up slopes, and what a stepper makes of it; gives the seconds of that."""
    with closing(stepper_of(base)) as stepper:
        journal = Journal.create(path, stepper.bit_header())
        slopes = torch.randn(steps, generator=torch.Generator().manual_seed(0)).tolist()
        for step, slope in enumerate(slopes):
            probe = Probe(0, slope, LR * slope)
            journal.append(Record(step, (probe,), (0.0, 0.0), eps=1e-3, lr=LR))
        stepper.follow(journal, persists=False)
        began = time.perf_counter()
        stepper.trainable.save(stepper.model, stepper.weights, export)
        return time.perf_counter() - began


def trained(folder: Path) -> bool:
    """Whether a real training's export and its replay are equal."""
    make_model(folder / "base", layers=2, width=128, vocabulary=256)
    with closing(stepper_of(folder / "base")) as stepper:
        stepper.follow(Journal.open(folder / "run.journal", stepper.bit_header()))
        tokens = torch.randint(256, (2, 16))
        for _ in range(20):
            stepper.train_step([{"input_ids": tokens, "labels": tokens}], lr=1e-4)
        stepper.trainable.save(stepper.model, stepper.weights, folder / "export")
    replay(folder / "base", folder / "run.journal", folder / "out", threads=2)
    return equal(folder / "export", folder / "out")


def equal(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    return ours.keys() == theirs.keys() and all(
        ours[name].view(torch.int16).equal(theirs[name].view(torch.int16)) for name in ours
    )


def replay(base: Path, journal: Path, out: Path, threads: int) -> tuple[float, float, int]:
    """Seconds of the command, those of processors, and its peak of anonymous memory in bytes."""
    given = map(str, (base, journal, out, threads))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *given], stdout=subprocess.PIPE, text=True
    )
    peak = [0]
    poll = threading.Thread(target=_poll, args=(process, peak))
    poll.start()
    said, _ = process.communicate()
    poll.join()
    assert process.returncode == 0, said
    wall, busy = json.loads(said.splitlines()[-1])
    return wall, busy, peak[0]


def _poll(process: subprocess.Popen, peak: list[int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        peak[0] = max(peak[0], 1024 * int(found[1]) if found else 0)
        time.sleep(0.01)


def kernel_rates(elements: int, updates: list[StepUpdate], calls: int = 1) -> tuple[float, float]:
    """Elements times steps of calls on as many elements, by seconds and by processors' seconds."""
    span = Span(torch.bfloat16, (Segment("w", 0, (elements,), 0),), 0, 0)
    wire = torch.zeros(elements, dtype=torch.bfloat16)
    rest = torch.zeros(elements, dtype=torch.int16)
    ops.update(span, wire, rest, "rademacher", updates[:10])
    began, before = time.perf_counter(), time.process_time()
    for _ in range(calls):
        ops.update(span, wire, rest, "rademacher", updates)
    done = calls * elements * len(updates)
    return done / (time.perf_counter() - began), done / (time.process_time() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    updates = [StepUpdate(1.0, (Draw(0, step, 0, 1e-6),), 0, step) for step in range(chosen.steps)]
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        same = trained(folder / "small")
        print(f"a real training and its replay are equal: {same}")
        count = make_model(folder / "base", chosen.layers, width=1024, vocabulary=4096)
        journal = folder / "run.journal"
        seconds = make_up(folder / "base", journal, folder / "export", chosen.steps)
        print(f"{count:,} parameters, {chosen.steps} steps; the stepper took {seconds:.1f} s")
        for number in range(chosen.rounds):
            cached, cached_busy = kernel_rates(IN_CACHE, updates, CALLS)
            large, large_busy = kernel_rates(count // BLOCK * BLOCK, updates)
            out = folder / f"out-{number}"
            wall, busy, peak = replay(folder / "base", journal, out, chosen.threads)
            rate = count * chosen.steps / wall
            rows.append(
                {
                    "seconds": wall,
                    "rate": rate,
                    "kernel_in_cache": cached,
                    "kernel_large": large,
                    "replay_vs_kernel": rate / large,
                    "of_processor_time": count * chosen.steps / busy / large_busy,
                    "of_processor_time_in_cache": count * chosen.steps / busy / cached_busy,
                    "peak_bytes": peak,
                }
            )
            print(f"round {number}: {json.dumps(rows[-1])}", flush=True)
            same = same and equal(folder / "export", out)
    found = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": chosen.threads,
        "parameters": count,
        "steps": chosen.steps,
        **{key: round(median(row[key] for row in rows), 3) for key in rows[0]},
        "equal": same,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
