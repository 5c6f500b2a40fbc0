"""Where every byte lies: the tiers of one request, whose open choices have been made.

Access to units is a cycle, so that a fixed resident set beats any replacement: units fill the
device first, then host memory, then the disk, in order of the model.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zo_offload.exact_head import OTHER_CHUNK_BYTES
from zo_offload.offload.planner import Counts, Plan
from zo_offload.plan.layout import Layout, Sizes
from zo_offload.plan.request import Budgets, Request

SUMS_BYTES = 64  # a token, of a loss that is computed in chunks


@dataclass(frozen=True)
class Tiers:
    """Bytes by tier and purpose.

    Attributes:
        device: By purpose.
        host: By purpose.
        nvme_bytes: Of the files there.
        residents: Units on the device, in host memory, on disk; in order of the model.
        sizes: Of units.
        short: Bytes that a tier lacks, by tier; empty when everything fits.
    """

    device: dict[str, int]
    host: dict[str, int]
    nvme_bytes: int
    residents: tuple[int, int, int]
    sizes: Sizes
    short: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All that rests in host memory."""
        return sum(self.host.values())

    def residency(self) -> npt.NDArray[np.str_]:
        """The tier of every unit."""
        return np.repeat(np.array(["device", "host", "nvme"]), self.residents)


def place(layout: Layout, request: Request, budgets: Budgets) -> Tiers:
    """Rest everything as near to the device as the budgets allow."""
    needs, sizes = layout.needs_of(request), layout.sizes(request.wire)
    count = len(layout.names)
    device = _on_device(layout, request, needs.count(_tiers(count, 0, 0, ambient=0)))
    short = _short_on_device(device, budgets)
    if request.lowest == "device" or not (short or request.only):
        return Tiers(device, {}, 0, (count, 0, 0), sizes, short)
    first = _how_many_on_device(layout, request, budgets)
    second = _how_many_on_host(layout, request, budgets, first)
    plan = needs.count(_tiers(first, second, count - first - second))
    device, host = _on_device(layout, request, plan), _on_host(plan)
    short = _short_on_device(device, budgets)
    for tier, held, budget in (
        ("host", plan.host_bytes, budgets.in_host_memory),
        ("nvme", plan.nvme_bytes, budgets.nvme),
    ):
        if budget is not None and held > budget:
            short[tier] = held - budget
    residents = first, second, count - first - second
    return Tiers(device, host, plan.nvme_bytes, residents, sizes, short)


def _tiers(*residents: int, ambient: int = 1) -> Counts:
    """Of the ambient parameters, then of units: places in the planner's ``TIERS``."""
    return np.concatenate([[ambient], np.repeat(np.arange(3), residents)])


def _on_device(layout: Layout, request: Request, plan: Plan) -> dict[str, int]:
    """By purpose; what lies over a base is told apart."""
    activations, logits = _of_lanes(layout, request)
    values = layout.values_bytes
    laid_over = dict.fromkeys(("sparse", "scales"), 0)
    if request.trainable in laid_over:
        laid_over[request.trainable] = values + plan.overlays
    return {
        "slots": plan.slots,
        "scratch": plan.scratch,
        "ambient": plan.ambient - values,
        "ambient_copies": plan.ambient_copies,
        "resident": plan.resident,
        **laid_over,
        "factors": plan.factors,
        "unit_copies": plan.unit_copies,
        "activations": activations,
        "logits": logits,
    }


def _on_host(plan: Plan) -> dict[str, int]:
    """By purpose."""
    return {
        "ambient": plan.host_ambient,
        "units": plan.host_units,
        "staging": plan.staging,
        "spare": plan.spare,
        "packing": plan.packing,
    }


def _of_lanes(layout: Layout, request: Request) -> tuple[int, int]:
    """Activations of all lanes alive, and the logits of one.

    Lanes wait at unit boundaries, one of them runs: inside a block (all, where they share its
    products), or in the head, where it holds fp32 logits, their log-softmax, fp32 inputs and a
    converted part of the head. With a chunked head: logits of so many rows, the next ones, inputs
    as they are beside those in fp32, sums.
    """
    dims, tokens = layout.dims, request.tokens
    live = min(request.live_lanes or request.lanes, request.lanes)
    waits = dims.hidden if layout.granularity == "block" else min(dims.boundary, dims.inner)
    held = live * waits * tokens * layout.dtype.itemsize
    inside = (dims.inner - waits) * tokens * layout.dtype.itemsize * (live if request.joins else 1)
    rows = min(request.head_chunk or dims.vocabulary, dims.vocabulary)
    head = 2 * tokens * rows * 4 + tokens * dims.hidden * 4 + OTHER_CHUNK_BYTES
    if request.head_chunk is not None:
        head += tokens * (dims.hidden * layout.dtype.itemsize + SUMS_BYTES)
        head -= max(0, OTHER_CHUNK_BYTES - rows * dims.hidden * 4)
    return held + max(inside - head, 0), head


def _short_on_device(device: dict[str, int], budgets: Budgets) -> dict[str, int]:
    total = sum(device.values())
    weights = total - device["activations"] - device["logits"]
    lacks = max(
        0 if budgets.device is None else total - budgets.device,
        0 if budgets.device_weights is None else weights - budgets.device_weights,
    )
    return {"device": lacks} if lacks > 0 else {}


def _room(device: dict[str, int], budgets: Budgets) -> int | None:
    """Bytes that are free for resident units; None for any number."""
    total = sum(device.values())
    weights = total - device["activations"] - device["logits"]
    rooms = [
        budget - held
        for budget, held in ((budgets.device, total), (budgets.device_weights, weights))
        if budget is not None
    ]
    return max(0, min(rooms)) if rooms else None


def _how_many_on_device(layout: Layout, request: Request, budgets: Budgets) -> int:
    """Units that rest there beside slots for any of them."""
    if request.only:
        if budgets.device_weights is None:
            return 0
        budgets = Budgets(device_weights=budgets.device_weights)
    needs, sizes = layout.needs_of(request), layout.sizes(request.wire)
    count = len(layout.names)
    elsewhere, there = (needs.count(_tiers(n, count - n, 0)) for n in (0, count))
    device = _on_device(layout, request, elsewhere)
    resident = there.resident - int((sizes.wire + sizes.rest).sum())  # for a copy of one
    device["resident"] += resident + there.scratch - elsewhere.scratch
    return _how_many(sizes.wire + sizes.rest, _room(device, budgets))


def _how_many_on_host(layout: Layout, request: Request, budgets: Budgets, first: int) -> int:
    """Of the units behind the first ones: all, if they fit; else those beside staging."""
    needs, sizes = layout.needs_of(request), layout.sizes(request.wire)
    bytes_each = (sizes.wire + sizes.rest)[first:]
    count = len(bytes_each)
    only_disk = request.only and request.lowest == "nvme"
    budget = budgets.host_weights or 0 if only_disk else budgets.in_host_memory
    there = needs.count(_tiers(first, count, 0))
    fits = budget is None or there.host_bytes <= budget
    if fits or request.lowest != "nvme" or not count:
        return count
    elsewhere = needs.count(_tiers(first, 0, count))
    beside = there.host_bytes - there.host_units + elsewhere.staging
    return _how_many(bytes_each, max(0, (budget or 0) - beside))


def _how_many(bytes_each: Counts, room: int | None) -> int:
    """How many of the first ones fit."""
    if room is None:
        return len(bytes_each)
    return int(np.searchsorted(np.cumsum(bytes_each), room, side="right"))
