"""One whole step of a model of OPT-175B's shape, all blocks, over a base of four bits.

A LoRA adapter moves on nf4 blocks that rest in host memory, some 90 GB. The base is made and packed
block by block: no more than one is ever there in sixteen bits.
"""

from dataclasses import replace
from typing import Any

import psutil
import torch
from gpu_contestants import Ours, Setting, held_on, planned
from gpu_machine import synchronize, watched
from gpu_results import Results
from gpu_shapes import TINY, WHOLE, Shape, batch_of
from timing import alternating

from zo_offload.units import AMBIENT

LIMIT = 18 * 10**9  # bytes of the device
ADAPTER = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
SETTING = Setting("cpu", "nf4", head_chunk=8192)
SPARE_BYTES = 8 * 10**9  # of the host: the block that is being packed, libraries
STEPS = 2  # that count


def whole_step(device: torch.device, results: Results, tiny: bool) -> None:
    """Build, step, and write what was held and how long it took."""
    shape = TINY if tiny else WHOLE
    batch = shape.batches[0]
    needed = planned(shape, SETTING, "fp32", batch, trainable="peft")
    available = psutil.virtual_memory().available
    if needed["host"] + SPARE_BYTES > available:
        said = f"needs {needed['host']:,} bytes of host memory, {available:,} are free"
        results.add("left out", name=f"whole {shape.name}", why=said)
        return
    before = held_on(device)
    with watched() as held:
        trains = {"trainable": {"mode": "peft", "peft_config": ADAPTER}}
        ours = Ours(shape, SETTING, "fp32", device, trains)
        contestant = ours.contestant(batch_of(shape, *batch, device), before)
        began = ours.reading()
        times = alternating({"step": lambda: contestant.turn(device)}, STEPS)["step"]
        steps, now = ours.reading()
        since, taken = now.since(began[1]), steps - began[0]
        found = _figures(shape, ours, contestant.peak, times.seconds, batch)
        found |= {
            "host_peak_bytes": held.as_json(),
            "planned_bytes": {**ours.planned, **needed},
            "bus_bytes": since.bytes["bus"] / taken,
            "step_seconds": {part: value / taken for part, value in since.seconds.items()},
        }
        bus = results.last("rates").get("bus_up_gbps")
        found["bus_gbps"] = found["bus_bytes"] / found["seconds"] / 1e9 if bus else None
        found["bus_share"] = found["bus_gbps"] / bus if bus else None
        ours.close()
    synchronize(device)
    results.add("whole", **found)


def _figures(
    shape: Shape, ours: Ours, peak: int | None, seconds: tuple[float, ...], batch: tuple[int, int]
) -> dict[str, Any]:
    weights = ours.stepper.weights
    units = weights.map.units
    return {
        "shape": replace(shape, layers=None).model if shape is WHOLE else shape.name,
        "batch": list(batch),
        "parameters": shape.num_parameters,
        "blocks": len(units),
        "adapter_parameters": sum(
            segment.numel
            for unit in (*units, weights.map.ambient)
            for span, segment in unit.segments
            if span.trainable
        ),
        "ambient_on": weights.tiers[AMBIENT],
        "build_seconds": ours.build_seconds,
        "seconds": min(seconds),
        "tokens_per_second": batch[0] * batch[1] / min(seconds),
        "device_peak_bytes": peak,
        "under_18_gb": peak < LIMIT if peak is not None else None,
        "loss": ours.loss(batch_of(shape, *batch, ours.device)),
    }
