"""A plan as one line of JSON, as a table, and as a refusal."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from zo_offload.config import parse_config
from zo_offload.config_update import DRAW_NS
from zo_offload.errors import ConfigError
from zo_offload.plan.advice import Advice
from zo_offload.plan.rates import Rates
from zo_offload.plan.request import Request
from zo_offload.plan.search import Planned
from zo_offload.wording import as_bytes, as_traffic

DEVICES = {"device": "none", "host": "cpu", "nvme": "nvme"}


def exact(count: float) -> str:
    """Bytes with a unit, and as they are.

    Example:
        >>> exact(3 * 2**29)
        '1.5 GiB (1,610,612,736 bytes)'
    """
    return f"{as_bytes(count)} ({count:,.0f} bytes)"


def block_of(planned: Planned) -> dict[str, Any]:
    """The ``zeroth_order`` block that asks for this plan."""
    request = planned.request
    lowest = [tier for tier, count in zip(DEVICES, planned.tiers.residents, strict=True) if count]
    block: dict[str, Any] = {
        "probes": request.probes,
        "trainable": request.moves,
        "update": {"where": request.where, "lag": request.lag},
        "offload_param": {"device": DEVICES[lowest[-1]], "buffer_count": request.num_slots},
        "unit": request.unit,
        "live_lanes": request.live_lanes,
        "head_chunk": request.head_chunk,
        "joined_rows": request.joined_rows,
        "wire": request.wire,
        "master": request.master,
    }
    if lowest[-1] == "device":
        block["update"]["where"] = None
    if lowest[-1] == "nvme":
        block["offload_param"]["nvme_path"] = "/path/on/the/disk"
    return block


def notes(planned: Planned) -> list[str]:
    """What a reader must know before relying on the numbers."""
    found = []
    try:
        parse_config({"zeroth_order": block_of(planned)})
    except ConfigError as error:
        found.append(f"training does not take this yet: {error}")
    mixed = [
        f"{n} on {tier}" for tier, n in zip(DEVICES, planned.tiers.residents, strict=True) if n
    ]
    if len(mixed) > 1:
        found.append(
            f"units rest in several tiers ({', '.join(mixed)}): training divides them by "
            "device_budget and host_budget, which are of weights alone"
        )
    if planned.request.trainable == "sparse":
        share = planned.request.share
        found.append(f"sparse: {share:.2%} of the matrices' weights, fp32, on the device")
    if planned.request.trainable == "scales":
        found.append("scales: an fp32 number a group of the matrices' weights, on the device")
    if planned.request.trainable == "peft":
        words = planned.request.moves
        said = words.get("adapter") or json.dumps(words.get("peft_config"))
        found.append(f"peft: {said}, on the device")
    window = planned.request.window
    if window > 1:
        found.append(
            f"not in these numbers: with momentum an update draws each weight's noise {window} "
            f"times, some {window * DRAW_NS:.1f} ns a weight, probe and step on a core of the host"
        )
    return [*found, "not in these numbers: the accelerator's context, some 0.5 GiB on CUDA"]


def as_json(model: str, planned: Planned, rates: Rates, advice: list[Advice]) -> str:
    """One line."""
    tiers, step, request = planned.tiers, planned.step, planned.request
    return json.dumps(
        {
            "fits": planned.fits,
            "device_bytes": tiers.device_bytes,
            "host_bytes": tiers.host_bytes,
            "nvme_bytes": tiers.nvme_bytes,
            "step_seconds": step.step_seconds,
            "bound_by": step.bound_by,
            "model": model,
            "parameters": planned.layout.num_parameters,
            "unit": request.unit,
            "units": dict(zip(DEVICES, tiers.residents, strict=True)),
            "unit_bytes": _largest(planned),
            "device": tiers.device,
            "host": tiers.host,
            "short_bytes": tiers.short,
            "lanes": request.lanes,
            "request": asdict(request),
            "zeroth_order": block_of(planned),
            "step": asdict(step),
            "rates": asdict(rates),
            "advice": [asdict(each) for each in advice],
            "notes": notes(planned),
        }
    )


def as_table(model: str, planned: Planned, rates: Rates, advice: list[Advice]) -> str:
    """Lines for a reader."""
    return "\n".join(
        [
            *_heading(model, planned),
            "",
            *_memory(planned),
            "",
            *_step(planned, rates),
            "",
            "what would help most, by forward and token:",
            *(f"  {each.gain:5.2f} x  {each.change}" for each in advice[:5]),
            *([] if advice else [f"  nothing here; {planned.step.bound_by} bounds it"]),
            "",
            f'in the JSON: "zeroth_order": {json.dumps(block_of(planned))}',
            *(f"note: {note}" for note in notes(planned)),
        ]
    )


def refusal(model: str, planned: Planned, fitting: tuple[str, Planned] | None) -> str:
    """Why it does not fit, with the numbers, and what would."""
    tiers = planned.tiers
    held = {"device": tiers.device_bytes, "host": tiers.host_bytes, "nvme": tiers.nvme_bytes}
    lacks = "; ".join(
        f"{tier} needs {exact(held[tier])}, {exact(count)} more than there are"
        for tier, count in tiers.short.items()
    )
    parts = {**tiers.device} if "device" in tiers.short else {**tiers.host}
    inside = ", ".join(f"{name} {as_bytes(count)}" for name, count in parts.items() if count)
    if fitting is None:
        mend = "no change of the settings fits: give more memory"
    else:
        words, other = fitting
        mend = (
            f"it would fit with {words}: device {as_bytes(other.tiers.device_bytes)}, host "
            f"{as_bytes(other.tiers.host_bytes)}, nvme {as_bytes(other.tiers.nvme_bytes)}"
        )
    return f"{model} does not fit by units of {_units(planned.request)}: {lacks} ({inside}); {mend}"


def _largest(planned: Planned) -> int:
    """Bytes on the wire of the largest unit."""
    return int(planned.tiers.sizes.travels(planned.request.where == "device").max())


def _units(request: Request) -> str:
    return {"block": "a block", "sublayer": "a sublayer", "linear": "a linear layer"}[
        request.unit or "block"
    ]


def _heading(model: str, planned: Planned) -> Iterator[str]:
    request, layout = planned.request, planned.layout
    yield f"{model}: {layout.num_parameters:,} parameters, {str(layout.dtype)[6:]}"
    yield (
        f"unit: {request.unit}, {len(layout.names)} of them, the largest "
        f"{exact(_largest(planned))} on the wire ({request.wire})"
    )
    where = request.where if any(planned.tiers.residents[1:]) else "device"
    yield (
        f"trainable: {request.trainable}, master {request.master}, lag {request.lag}, updates on "
        f"the {where}"
    )
    yield (
        f"lanes: {request.lanes} a step ({request.probes} probes, {request.micro_batches} "
        f"micro-batches of {request.batch_size} x {request.length} tokens), "
        f"{request.live_lanes} alive at once, {planned.step.visits} visits"
    )


def _memory(planned: Planned) -> Iterator[str]:
    tiers, names = planned.tiers, planned.layout.names
    yield f"device  {exact(tiers.device_bytes)}"
    yield from (f"  {name:<16}{exact(n)}" for name, n in tiers.device.items() if n)
    yield f"host    {exact(tiers.host_bytes)}"
    yield from (f"  {name:<16}{exact(n)}" for name, n in tiers.host.items() if n)
    yield f"nvme    {exact(tiers.nvme_bytes)}"
    position = 0
    for tier, group in groupby(tiers.residency()):
        count = len(list(group))
        yield f"  {count} units on {tier}: {names[position]} to {names[position + count - 1]}"
        position += count


def _step(planned: Planned, rates: Rates) -> Iterator[str]:
    step = planned.step
    yield f"step    {step.step_seconds:.3g} s, bound by {step.bound_by}"
    given = {
        "compute": f"{step.flops:.3g} FLOPs at {rates.tflops:g} TFLOP/s",
        "bus": f"{as_traffic(step.bus_up)} up, {as_traffic(step.bus_down)} down at "
        f"{rates.pcie_gbps:g} GB/s",
        "disk": f"{as_traffic(step.disk_read)} read, {as_traffic(step.disk_written)} written at "
        f"{rates.nvme_gbps:g} GB/s",
        "host": f"{as_traffic(step.host_kernel)} of masters at {rates.host_gbps:g} GB/s",
    }
    for name, seconds in step.seconds.items():
        yield f"  {name:<16}{seconds:9.3g} s  {given[name]}"
