"""``zo-offload config new``: a JSON to begin with, from the plan and from what learnt most.

What moves, eps, probes and lr are those of a run without a JSON (``run_defaults``); the plan says
where weights rest, and how many examples and forwards fit. Only keys that matter are written.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zo_offload.errors import ConfigError, StoreError
from zo_offload.offload.disk import errors_of
from zo_offload.plan.advice import nearest
from zo_offload.plan.command import in_bytes
from zo_offload.plan.rates import Rates
from zo_offload.plan.report import DEVICES, refusal
from zo_offload.plan.request import Budgets, Request, request_of
from zo_offload.plan.search import Layouts, Planned, plan
from zo_offload.plan.shapes import config_of
from zo_offload.plan.shortage import Machine, this_machine
from zo_offload.run_defaults import default_config
from zo_offload.wording import as_bytes

DEFAULT_LENGTH = 512  # tokens; what most tasks stay below
CHUNK_ROWS = 8192  # of a head whose logits do not fit
MANY_PROBES, LAG = 8, 8  # where a disk bounds a step: docs/choosing.md
KIB = 2**10


@dataclass(frozen=True)
class NewOptions:
    """The command's options; None where one is not given.

    Attributes:
        model: A ready shape, directory or model id.
        device_gb: GiB of the device.
        host_gb: GiB of host memory.
        nvme_path: A directory on a disk that may hold weights.
        task_length: Tokens of the longest example.
        output: The file to write.
    """

    model: str
    device_gb: float | None
    host_gb: float | None
    nvme_path: str | None
    task_length: int | None
    output: str


def begin(options: NewOptions) -> list[str]:
    """Write the JSON; gives a line for each decision.

    Raises:
        ConfigError: The file exists.
        StoreError: The model fits no way, or the file cannot be written.
        ModelError: There is no such model.
    """
    if Path(options.output).exists():
        raise ConfigError(f"--output {options.output}: exists already; name a new file")
    config, said = made(options, this_machine())
    path = Path(options.output)
    with errors_of(path, "write it"), path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")
    return [f"{path}: written", *(f"  {line}" for line in said)]


def made(options: NewOptions, machine: Machine) -> tuple[dict[str, Any], list[str]]:
    """The JSON, and why it is so; see :func:`begin`."""
    shape, dtype = config_of(options.model)
    layouts = Layouts(shape, dtype)
    length = options.task_length or min(DEFAULT_LENGTH, layouts.most_length or DEFAULT_LENGTH)
    start = deepcopy(default_config(options.model))
    start["zeroth_order"].pop("offload_param")  # the plan's to say
    request = replace(request_of(start)[0], length=length)
    budgets, lowest = _budgets(options, machine)
    planned = _fitting(options.model, layouts, replace(request, lowest=lowest), budgets)
    config = _written(start, planned, options.nvme_path, dtype)
    return config, list(_reasons(options, planned, config, dtype))


def _budgets(options: NewOptions, machine: Machine) -> tuple[Budgets, str]:
    """What there is, and the furthest tier; a CPU's weights are in host memory wherever they are.

    Where forwards run on the CPU and there is a disk, a half is for them and a half for staging.
    """
    host = machine.host if options.host_gb is None else in_bytes("host", options.host_gb)
    device = machine.device if options.device_gb is None else in_bytes("device", options.device_gb)
    if device is not None:
        return Budgets(device=device, host=host), "nvme" if options.nvme_path else "host"
    if options.nvme_path is None:
        return Budgets(device=host), "device"
    return Budgets(device=host // 2, host=host // 2), "nvme"


def _fitting(model: str, layouts: Layouts, request: Request, budgets: Budgets) -> Planned:
    """The largest micro-batch that fits; then with a head in chunks."""
    whole, tried = request.batch_size * request.micro_batches, request
    chunks = [None, CHUNK_ROWS] if layouts.has_head and layouts.vocabulary > CHUNK_ROWS else [None]
    for rows in chunks:
        for micro in (size for size in (16, 8, 4, 2, 1) if size <= whole):
            tried = replace(
                request, head_chunk=rows, batch_size=micro, micro_batches=whole // micro
            )
            planned = plan(layouts, tried, budgets, Rates())
            if planned.fits:
                return _unhurried(layouts, planned, budgets)
    last = plan(layouts, tried, budgets, Rates())
    raise StoreError(refusal(model, last, nearest(layouts, tried, budgets, Rates())))


def _unhurried(layouts: Layouts, planned: Planned, budgets: Budgets) -> Planned:
    """With more forwards a visit and fewer writes, where a disk bounds the step."""
    if planned.step.bound_by != "disk":
        return planned
    slower = replace(planned.request, probes=MANY_PROBES, lag=LAG, live_lanes=None)
    other = plan(layouts, slower, budgets, Rates())
    return other if other.fits else planned


def _written(
    config: dict[str, Any], planned: Planned, nvme_path: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What was decided, as keys; those that say what is so anyway are left out."""
    request, tiers, block = planned.request, planned.tiers, config["zeroth_order"]
    config = {"train_batch_size": config["train_batch_size"], **config}
    if request.batch_size < config["train_batch_size"]:  # else ranks could not share a batch
        config["train_micro_batch_size_per_gpu"] = request.batch_size
    for key, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if dtype == kind:
            config[key] = {"enabled": True}
    block["probes"] = request.probes
    held = [tier for tier, count in zip(DEVICES, tiers.residents, strict=True) if count]
    if held[-1] != "device":
        block["offload_param"] = {"device": DEVICES[held[-1]]}
        block["device_budget"] = _room(planned, "device")
    if held[-1] == "nvme":
        block["offload_param"]["nvme_path"] = nvme_path
        block["host_budget"] = _room(planned, "host")
    if request.unit != "block":
        block["unit"] = request.unit
    if request.lag:
        block["update"] = {"lag": request.lag}
    if (request.live_lanes or request.lanes) < min(request.lanes, 64):
        block["live_lanes"] = request.live_lanes
    if request.head_chunk is not None:
        block["head_chunk"] = request.head_chunk
    return config


def _room(planned: Planned, tier: str) -> str:
    """For weights, as text: what is not taken by activations and logits."""
    tiers, budgets = planned.tiers, planned.budgets
    parts = tiers.device if tier == "device" else tiers.host
    budget = budgets.device if tier == "device" else budgets.in_host_memory
    others = sum(parts.get(name, 0) for name in ("activations", "logits"))
    weights = sum(parts.values()) - others
    there = weights if budget is None else budget - others
    return f"{max(there // KIB, -(-weights // KIB))}KiB"


def _reasons(
    options: NewOptions, planned: Planned, config: dict[str, Any], dtype: torch.dtype
) -> Iterator[str]:
    request, block, step = planned.request, config["zeroth_order"], planned.step
    kinds = block.get("trainable", {}).get("kinds")
    moves = ", ".join(kinds) if kinds else "all that may"
    yield f"moves: {moves}; learnt most from a forward where it was measured (docs/choosing.md)"
    yield (
        f"eps {block['eps']:g}, lr {config['optimizer']['params']['lr']:g}: what zo-offload train "
        "takes; try rates of your own task with --find-lr"
    )
    why = "a disk bounds the step" if request.lag else "as zo-offload train"
    yield f"probes {request.probes}, lag {request.lag}: {why}"
    yield f"forwards in {str(dtype)[6:]}: the model's own"
    yield (
        f"micro-batches of {request.batch_size} of {config['train_batch_size']}: the most that fit "
        f"with examples of {request.length} tokens"
    )
    held = {
        tier: count for tier, count in zip(DEVICES, planned.tiers.residents, strict=True) if count
    }
    rests = ", ".join(f"{count} units on {tier}" for tier, count in held.items())
    tiers = planned.tiers
    yield (
        f"rests: {rests}, by {request.unit}: device {as_bytes(tiers.device_bytes)}, host "
        f"{as_bytes(tiers.host_bytes)}, nvme {as_bytes(tiers.nvme_bytes)}"
    )
    if request.head_chunk is not None:
        yield f"head_chunk {request.head_chunk}: whole logits do not fit"
    yield f"a step: bound by {step.bound_by}; zo-offload plan --config {options.output} says more"
