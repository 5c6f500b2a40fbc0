"""A step of a model that fits neither device nor host memory, against what the hardware allows.

Random OPT weights in bfloat16, fp32 masters, streamed from a disk; "device" and host are one
machine's memory here, counted apart. The bound is the slower of

* two bare forwards in memory, and the kernels' work on all weights, one after the other;
* the bytes that the step reads and writes on the disk, over its bandwidth in direct transfers of
  the same size, as many reads as writes at once.

    python benchmarks/stream.py [--folder DIR] [--layers 28] [--width 2048] [--tokens 1 128]
                                [--device-mb 600] [--host-mb 1000] [--lag 0] [--block-mib 4]
                                [--buffers 2] [--rounds 3]

The last line is JSON: ``step_vs_bound`` (a ratio of times), ``peak_device_bytes``,
``peak_host_bytes``, ``model_bytes`` (parameters x 2).
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As the command line has it: threads that wait do not take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from timing import alternating

from zo_offload.config import ZOConfig
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.offload.aio import Aio
from zo_offload.offload.direct import DirectFile, Piece
from zo_offload.offload.disk import aligned, allocate, padded
from zo_offload.ops import Draw, Point, StepUpdate, update
from zo_offload.step import Stepper
from zo_offload.units import Unit

DISK_BYTES, MOST_PIECES = 1 << 30, 256  # of the reference transfer, each way


def make_model(folder: Path, layers: int, width: int, vocabulary: int = 50_272) -> None:
    """Random weights, saved in shards: training reads them from there."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_attention_heads=width // 64,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = OPTForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(
            float("norm" in name and name.endswith("weight"))
        )
    model.save_pretrained(folder, max_shard_size="500MB")


def forwards(folder: Path, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Two bare forwards of the model in memory."""
    model = load_causal_lm(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # not views of files

    def run() -> None:
        with torch.inference_mode():
            for _ in range(2):
                model(**batch, use_cache=False)

    return run


def kernels(units: list[Unit]) -> Callable[[], None]:
    """The update and both perturbed copies of all units, on memory of one."""
    largest = max(units, key=lambda unit: unit.wire_bytes)
    buffers = [torch.zeros(largest.wire_bytes, dtype=torch.uint8) for _ in range(3)]
    rest = torch.zeros(largest.rest_bytes, dtype=torch.uint8)
    moved = StepUpdate(1.0, (Draw(0, 0, 0, 1e-7),))
    draws = [Draw(0, 1, 0, 1e-3), Draw(0, 1, 0, -1e-3)]

    def run() -> None:
        for unit in units:
            for span in unit.spans:
                wire, *copies = (span.wire(buffer) for buffer in buffers)
                points = [Point(copy, draw) for copy, draw in zip(copies, draws, strict=True)]
                update(span, wire, span.rest(rest), "rademacher", [moved], points)

    return run


def disk(folder: Path, piece_bytes: int, aio: Aio) -> tuple[Callable[[], None], int]:
    """As many reads as writes at once, in pieces; and the bytes that move."""
    path, count = folder / "reference.bin", min(MOST_PIECES, DISK_BYTES // piece_bytes)
    allocate([path], 2 * count * piece_bytes)
    file = DirectFile([path], aio, writable=True)
    pieces = [Piece(i * piece_bytes, aligned(piece_bytes)) for i in range(2 * count)]
    for written in [file.write([piece]) for piece in pieces]:  # reads are of what was written
        written.result()

    def run() -> None:
        reads = [file.read([piece]) for piece in pieces[:count]]
        writes = [file.write([piece]) for piece in pieces[count:]]
        for transfer in (*reads, *writes):
            transfer.result()
        file.sync()

    return run, 2 * count * piece_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs=2, default=(1, 128), metavar=("ROWS", "LENGTH"))
    parser.add_argument("--device-mb", type=float, default=600)
    parser.add_argument("--host-mb", type=float, default=1000)
    parser.add_argument("--lag", type=int, default=0)
    parser.add_argument("--wire", default="identity")
    parser.add_argument("--block-mib", type=int, default=4, help="of a transfer")
    parser.add_argument("--buffers", type=int, default=2, help="units in flight on the device")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    make_model(folder / "model", options.layers, options.width)
    tokens = torch.randint(5, 50_000, tuple(options.tokens), generator=torch.Generator())
    batch = {"input_ids": tokens, "labels": tokens}
    config = ZOConfig.model_validate(
        {
            "offload_param": {
                "device": "nvme",
                "nvme_path": str(folder / "weights"),
                "buffer_count": options.buffers,
            },
            "device_budget": int(options.device_mb * 1e6),
            "host_budget": int(options.host_mb * 1e6),
            "update": {"lag": options.lag},
            "aio": {"block_size": options.block_mib << 20},
            "wire": options.wire,
        }
    )
    with Stepper(load_causal_lm(folder / "model"), config) as stepper:
        weights, files = stepper.weights, stepper.weights.files
        if files is None:
            raise SystemExit("everything fits in memory: lower --device-mb and --host-mb")
        units = list(weights.map.units)
        largest = padded(max(unit.wire_bytes for unit in units))
        transfer, transferred = disk(folder, largest, Aio(options.block_mib << 20))
        contestants: dict[str, Callable[[], object]] = {
            "two bare forwards": forwards(folder / "model", batch),
            "kernels": kernels(units),
            "disk": transfer,
            "ours": lambda: stepper.train_step([batch], lr=1e-7),
        }
        stepper.train_step([batch], lr=1e-7)  # writes every unit for the first time
        moved = files.bytes_read + files.bytes_written
        times = alternating(contestants, options.rounds)
        steps = options.rounds + 1
        a_step = (files.bytes_read + files.bytes_written - moved) / steps
        report(stepper, times, a_step, transferred)


def report(stepper: Stepper, times: dict[str, Any], a_step: float, transferred: int) -> None:
    weights = stepper.weights
    tiers = list(weights.tiers.values())
    compute = times["two bare forwards"].median + times["kernels"].median
    bandwidth = transferred / times["disk"].median
    bound = max(compute, a_step / bandwidth)
    ours = times["ours"].median
    parameters = weights.map.num_parameters
    print(
        f"{parameters / 1e9:.2f} G parameters; units: "
        + ", ".join(f"{tiers.count(tier)} {tier}" for tier in sorted(set(tiers)))
        + f"; {torch.get_num_threads()} threads"
    )
    for name, each in times.items():
        print(f"{name:18} {each.median:7.3f} s, spread {each.spread:.0%}")
    print(
        f"disk: {a_step / 1e9:.2f} GB a step, {bandwidth / 1e9:.2f} GB/s: "
        f"{a_step / bandwidth:.3f} s; compute {compute:.3f} s; ours {ours:.3f} s: "
        f"{ours / bound:.3f} x the slower, "
        f"{(compute + a_step / bandwidth) / ours:.2f} x faster than one after the other"
    )
    found = {
        "step_vs_bound": round(ours / bound, 3),
        "peak_device_bytes": weights.arena.peak_bytes,
        "peak_host_bytes": weights.host_bytes,
        "model_bytes": 2 * parameters,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
