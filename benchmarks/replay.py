"""A replay of many steps beside the update kernel alone: speed, memory, and equality to the bit.

A random Llama of 98 million parameters in bfloat16 with fp32 masters, and a journal of made-up
projected gradients. In each round, in turns: the kernel takes the same steps on data that stays in
cache, and on a buffer far larger; then ``zo-offload replay`` rebuilds the model in a process of its
own, whose seconds from the command's begin to its end count, and whose peak of anonymous memory is
polled. The weights are compared with those of a stepper that has taken the steps of the journal.

Before that a real training of a small model, whose export and replay are compared.

    python benchmarks/replay.py [--steps 1000] [--rounds 3] [--threads 2] [--layers 7]

The last line is JSON. ``replay_vs_kernel`` is the rate of the whole command, in elements times
steps a second, over that of the kernel on the large buffer: loading, the digest of the base and
the export are in it.
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

IN_CACHE, LARGE = 1 << 17, 1 << 24  # elements, of 4 bytes
CALLS = 16  # on what stays in cache
LR = 1e-6
RUN = "from zo_offload.cli import main; main()"


def make_model(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """Save a random model; gives its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, vocab_size=vocabulary,
        intermediate_size=width * 11 // 4, num_attention_heads=8, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
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


def replay(base: Path, journal: Path, out: Path, threads: int) -> tuple[float, int]:
    """Seconds of the command, as it says, and its peak of anonymous memory in bytes."""
    command = ["replay", "--base", base, "--journal", journal, "--out", out, "--threads", threads]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, command)], stdout=subprocess.PIPE, text=True
    )
    peak = [0]
    poll = threading.Thread(target=_poll, args=(process, peak))
    poll.start()
    said, _ = process.communicate()
    poll.join()
    assert process.returncode == 0, said
    return float(re.findall(r"in ([\d.]+) s", said)[-1]), peak[0]


def _poll(process: subprocess.Popen, peak: list[int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        peak[0] = max(peak[0], 1024 * int(found[1]) if found else 0)
        time.sleep(0.01)


def kernel_rate(elements: int, updates: list[StepUpdate], calls: int = 1) -> float:
    """Elements times steps a second of calls on as many elements."""
    span = Span(torch.bfloat16, (Segment("w", 0, (elements,), 0),), 0, 0)
    wire = torch.zeros(elements, dtype=torch.bfloat16)
    rest = torch.zeros(elements, dtype=torch.int16)
    ops.update(span, wire, rest, "rademacher", updates[:10])
    began = time.perf_counter()
    for _ in range(calls):
        ops.update(span, wire, rest, "rademacher", updates)
    return calls * elements * len(updates) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
            cached = kernel_rate(IN_CACHE, updates, CALLS)
            large = kernel_rate(LARGE, updates)
            out = folder / f"out-{number}"
            took, peak = replay(folder / "base", journal, out, chosen.threads)
            rate = count * chosen.steps / took
            rows.append(
                {"cached": cached, "large": large, "rate": rate, "took": took, "peak": peak}
            )
            print(
                f"round {number}: kernel {cached / 1e9:.2f} in cache, {large / 1e9:.2f} on a large "
                f"buffer, replay {rate / 1e9:.2f} G elements x steps/s; {took:.1f} s, "
                f"{peak / 2**20:.0f} MiB"
            )
            same = same and equal(folder / "export", out)
    found = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": chosen.threads,
        "parameters": count,
        "steps": chosen.steps,
        "seconds": round(median(row["took"] for row in rows), 2),
        "rate": round(median(row["rate"] for row in rows)),
        "kernel_in_cache": round(median(row["cached"] for row in rows)),
        "kernel_large": round(median(row["large"] for row in rows)),
        "replay_vs_kernel": round(median(row["rate"] / row["large"] for row in rows), 3),
        "peak_bytes": round(max(row["peak"] for row in rows)),
        "equal": same,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
