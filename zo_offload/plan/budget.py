"""Where every byte lies: the tiers of one request, whose open choices have been made.

Access to units is a cycle, so that a fixed resident set beats any replacement: units fill the
device first, then host memory, then the disk, in order of the model.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zo_offload.exact_head import OTHER_CHUNK_BYTES
from zo_offload.offload.packing import NUM_BUFFERS
from zo_offload.offload.planner import disk_bytes
from zo_offload.offload.slot import slot_bytes
from zo_offload.ops import layout_of
from zo_offload.ops.layout import GROUPS
from zo_offload.plan.formats import packs, rest_bytes, room_bytes, wire_bytes
from zo_offload.plan.layout import Counts, Layout
from zo_offload.plan.request import Budgets, Request

ADAPTER_RANK = 8  # of an adapter on every matrix
VALUE_BYTES = 4  # of what moves over a frozen base, fp32
CHOSEN_BYTES = 8  # of one and its 32-bit place
SUMS_BYTES = 64  # a token, of a loss that is computed in chunks


@dataclass(frozen=True)
class Sizes:
    """Bytes of every unit under a request.

    Attributes:
        travels: What crosses the bus.
        slot: The most that may, which a slot has room for.
        wire: What rests of it, packed only where it is frozen.
        rest: What stays with the masters.
        plain: What the forward reads.
        trained: Of the masters (wire and rest) that a step moves.
    """

    travels: Counts
    slot: Counts
    wire: Counts
    rest: Counts
    plain: Counts
    trained: Counts


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


def sizes_of(layout: Layout, request: Request) -> Sizes:
    """Bytes of every unit."""
    dtype = layout.dtype

    def matrices(bytes_each: float) -> Counts:
        return np.ceil(layout.matrices * bytes_each).astype(np.int64)

    plain = matrices(dtype.itemsize) + layout.others_wire
    packed = matrices(wire_bytes(request.wire, dtype)) + layout.others_wire
    room = _packed(layout, request)
    if request.trainable == "full":
        rest = matrices(rest_bytes(dtype, request.master)) + layout.others_rest
        if request.where == "device":  # masters travel as they are
            packed, room = plain, np.maximum(plain, room)
        return Sizes(packed, room, plain, rest, plain, plain + rest)
    nothing = np.zeros_like(room)
    if request.trainable in ("sparse", "scales"):
        return Sizes(packed, room, room, nothing, plain, nothing)
    adapters = layout.edges * ADAPTER_RANK * dtype.itemsize
    rest = layout.edges * ADAPTER_RANK * rest_bytes(dtype, request.master)
    room += adapters
    return Sizes(packed + adapters, room, room, rest, plain + adapters, adapters + rest)


def _packed(layout: Layout, request: Request) -> Counts:
    """The most bytes of every unit whose matrices are packed."""
    each = room_bytes(request.wire, layout.dtype)
    return np.ceil(layout.matrices * each).astype(np.int64) + layout.others_wire


def _packing(layout: Layout, request: Request, first: int = 0) -> int:
    """Where a unit from ``first`` on is packed each time that it travels, or would."""
    if request.trainable != "full" or not packs(request.wire, layout.dtype):
        return 0
    return int(_packed(layout, request)[first:].max(initial=0))


def _packing_of_residents(layout: Layout, request: Request) -> int:
    """What the first unit that rests on the device adds there, unless it is there anyway."""
    return 0 if request.where == "device" else _packing(layout, request)


def chosen_of(layout: Layout, request: Request) -> int:
    """Weights that a mask chooses."""
    return int(layout.matrices.sum() * request.share) if request.trainable == "sparse" else 0


def place(layout: Layout, request: Request, budgets: Budgets) -> Tiers:
    """Rest everything as near to the device as the budgets allow."""
    sizes = sizes_of(layout, request)
    device = _whole_on_device(layout, request, sizes)
    short = _short_on_device(device, budgets)
    if request.lowest == "device" or not (short or request.only):
        return Tiers(device, {}, 0, (len(layout.names), 0, 0), sizes, short)
    device = _on_device(layout, request, sizes)
    if not request.only:
        room = _room(device, budgets)
    elif budgets.device_weights is None:
        room = 0
    else:
        room = _room(device, Budgets(device_weights=budgets.device_weights))
    packed_there = _packing_of_residents(layout, request)
    if room is not None:
        room = max(0, room - packed_there)
    first = _how_many(sizes.wire + sizes.rest, room)
    device["scratch"] += packed_there if first else 0
    device["resident"] = int((sizes.wire + sizes.rest)[:first].sum())
    device["slots"] = device["slots"] if first < len(layout.names) else 0
    host, second = _in_host_memory(layout, request, sizes, budgets, first)
    third = len(layout.names) - first - second
    nvme = _on_disk(sizes, first + second)
    short = _short_on_device(device, budgets)
    for tier, held, budget in (
        ("host", sum(host.values()), budgets.in_host_memory),
        ("nvme", nvme, budgets.nvme),
    ):
        if budget is not None and held > budget:
            short[tier] = held - budget
    return Tiers(device, host, nvme, (first, second, third), sizes, short)


def _on_device(layout: Layout, request: Request, sizes: Sizes) -> dict[str, int]:
    """With every unit elsewhere."""
    slot, at_hand = int(sizes.slot.max()), request.where == "device"
    if at_hand and sizes.rest.any():
        slot += int(sizes.rest.max())
    frozen = request.trainable != "full"
    sparse = chosen_of(layout, request) * CHOSEN_BYTES
    if sparse:  # the values of a unit, perturbed
        sparse += int(layout.matrices.max() * request.share) * VALUE_BYTES
    copies = layout.copies_bytes(request.draws, request.head_chunk)
    activations, logits = _of_lanes(layout, request)
    return {
        "slots": min(request.num_slots, len(layout.names)) * slot,
        "scratch": int(sizes.plain.max()) + (_packing(layout, request) if at_hand else 0),
        "ambient": layout.ambient_wire,
        "ambient_copies": 0 if frozen else copies,
        "resident": 0,
        "sparse": sparse,
        "scales": _scales(int(layout.matrices.sum() + layout.matrices.max()), request),  # as well
        "activations": activations,
        "logits": logits,
    }


def _scales(elements: int, request: Request) -> int:
    """Of so many elements of matrices, where they move."""
    if request.trainable != "scales":
        return 0
    return elements // (layout_of(request.wire).group or GROUPS[-1]) * VALUE_BYTES


def _whole_on_device(layout: Layout, request: Request, sizes: Sizes) -> dict[str, int]:
    """With every unit there, its masters and those of the ambient parameters."""
    device = _on_device(layout, request, sizes)
    device["slots"] = 0
    device["scratch"] += _packing_of_residents(layout, request)
    rest = layout.ambient_rest if request.trainable == "full" else 0
    spare = max(int(sizes.rest.max()), rest) if request.lag else 0
    device["resident"] = int((sizes.wire + sizes.rest).sum()) + rest + spare
    return device


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


def _in_host_memory(
    layout: Layout, request: Request, sizes: Sizes, budgets: Budgets, first: int
) -> tuple[dict[str, int], int]:
    """What lies there, and how many of the units behind the first ones."""
    full = request.trainable == "full"
    bytes_each = (sizes.wire + sizes.rest)[first:]
    ambient = layout.ambient_wire + (layout.ambient_rest if full else 0)
    ambient += chosen_of(layout, request) * VALUE_BYTES
    ambient += _scales(int(layout.matrices.sum()), request)
    host = {"ambient": ambient, "units": int(bytes_each.sum()), "staging": 0, "spare": 0}
    if request.where != "device":
        host["packing"] = NUM_BUFFERS * _packing(layout, request, first)
    if request.lag and request.where != "device" and sizes.trained.any():
        rest = layout.ambient_rest if full else 0
        host["spare"] = max(int(sizes.wire.max()), layout.ambient_wire)
        host["spare"] += max(int(sizes.rest.max()), rest)
    only_disk = request.only and request.lowest == "nvme"
    budget = budgets.host_weights or 0 if only_disk else budgets.in_host_memory
    on_disk = request.lowest == "nvme" and len(bytes_each)
    if not on_disk or budget is None or sum(host.values()) <= budget:
        return host, len(bytes_each)
    host["staging"] = (request.num_slots + 2) * _record(sizes)
    host["units"] = 0
    second = _how_many(bytes_each, max(0, budget - sum(host.values())))
    host["units"] = int(bytes_each[:second].sum())
    return host, second


def _how_many(bytes_each: Counts, room: int | None) -> int:
    """How many of the first ones fit."""
    if room is None:
        return len(bytes_each)
    return int(np.searchsorted(np.cumsum(bytes_each), room, side="right"))


def _record(sizes: Sizes, first: int = 0) -> int:
    """Bytes on disk of the largest unit from ``first`` on."""
    parts = zip(sizes.wire[first:].tolist(), sizes.rest[first:].tolist(), strict=True)
    return max((slot_bytes(*pair) for pair in set(parts)), default=0)


def _on_disk(sizes: Sizes, first: int) -> int:
    """Files that hold the units from ``first`` on."""
    return disk_bytes(len(sizes.wire) - first, _record(sizes, first))
