"""Ranks of one machine share the weights that rest in its memory."""

import hashlib
from dataclasses import replace

import torch
from torch import nn

from zo_offload.converted import converted_of
from zo_offload.offload.region import Region
from zo_offload.offload.residency import HOST, NVME
from zo_offload.offload.shared import Shared
from zo_offload.offload.staged import largest, num_staged
from zo_offload.placement import Placement, Together
from zo_offload.replica import Replica
from zo_offload.replica.node import leader_says, node_of
from zo_offload.units import ModelMap, Unit


def shared_by_machine(
    replica: Replica, model: nn.Module, model_map: ModelMap, placement: Placement
) -> Placement:
    """The placement, with memory in which every rank of the machine sees the same units.

    All ranks call this together. Each will write a part of the units from its own model, so models
    are compared first. Where updates are made is not tried out: ranks must do it alike.

    Raises:
        ReplicaError: Models differ, or settings that decide where units rest.
        StoreError: The system does not let ranks share memory.
    """
    if replica.world_size == 1:
        return placement
    units = {tier: _resting_in(tier, model_map, placement) for tier in (HOST, NVME)}
    sizes = [[(unit.name, unit.wire_bytes, unit.rest_bytes) for unit in u] for u in units.values()]
    mend = "use one JSON and one model on every rank"
    replica.refuse_differences(
        "the units off the device", {"SHA-256": _sha256(repr(sizes).encode())}, mend
    )
    if not any(units.values()):
        return placement
    mend = "load the same checkpoint on every rank"
    replica.refuse_differences("the base weights", {"SHA-256": _digest(model)}, mend)
    node = node_of(replica)
    say = leader_says(replica, node)
    buffers = num_staged(placement.num_slots) if units[NVME] else 0

    def share() -> Shared | None:
        if node.size == 1:
            say("")
            return None
        return Shared(
            units[HOST],
            units[NVME],
            [largest(units[NVME]) for _ in range(buffers)],
            node.size,
            lambda num_bytes: Region(num_bytes, node.ranks, node.index, say),
            model_map.is_low_rank,
        )

    shared = replica.all_or_none(share)
    together = Together(node.leads, say, shared)
    on_device = placement.updates_on_device
    return replace(
        placement,
        together=together,
        updates_on_device=on_device if shared is None else bool(on_device),
    )


def _resting_in(tier: str, model_map: ModelMap, placement: Placement) -> list[Unit]:
    return [unit for unit in model_map.everything if placement.tiers[unit.index] == tier]


def _digest(model: nn.Module) -> str:
    """SHA-256 of a model's values, as they are given, and of a converted one's files."""
    converted = converted_of(model)
    total = hashlib.sha256(converted.record.sha256.encode() if converted is not None else b"")
    for name, parameter in model.named_parameters():
        if parameter.untyped_storage().nbytes() < parameter.nbytes:
            continue  # its values are in those files
        total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        values = parameter.detach().contiguous().view(-1)
        total.update(values.view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
