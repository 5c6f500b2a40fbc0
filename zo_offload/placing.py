"""What a config makes of a model before anything is allocated: its units, and where each rests."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from zo_offload.ambient import chunked_head, surely_gathered
from zo_offload.config import ZOConfig
from zo_offload.converted import Base, converted_of
from zo_offload.errors import ConfigError, ModelError
from zo_offload.granularity import GRANULARITIES
from zo_offload.low_rank_reads import read_otherwise
from zo_offload.offload.aio import Aio
from zo_offload.offload.planner import Needs
from zo_offload.offload.residency import DEVICE, HOST, NVME
from zo_offload.offload.run_files import Disk
from zo_offload.placement import Placement
from zo_offload.trainable.moving import ALWAYS, Moving
from zo_offload.units import AMBIENT, IDENTITY, ModelMap, map_model

DEFAULT_SLOTS = 2


@dataclass(frozen=True)
class Placing:
    """A model and what is asked of it.

    Attributes:
        model: Its shapes decide, not its values.
        config: The ``zeroth_order`` block.
        device: Where forwards run.
        dtype: What they compute in (None: as the model is).
        scales: Factor on z by parameter name.
        moving: What stays on the device, and what takes turns.
    """

    model: nn.Module
    config: ZOConfig
    device: torch.device
    dtype: torch.dtype | None
    scales: Mapping[str, float]
    moving: Moving = ALWAYS

    def map(self) -> ModelMap:
        """The model's units; where the config leaves them open, the coarsest that fit.

        Raises:
            ConfigError: The config asks for what no parameter can be.
        """
        config, converted = self.config, converted_of(self.model)
        choices = GRANULARITIES if config.unit is None and config.device_budget else (config.unit,)
        if config.unit is None and converted is not None:
            choices = (converted.record.unit,)
        maps = [
            map_model(
                self.model, unit, self.scales, self.dtype, config.master, self.wire, self.moving
            )
            for unit in choices
        ]
        needed = [self.needs(each).least(self.tier).device_bytes for each in maps]
        fitting = [i for i, count in enumerate(needed) if count <= (config.device_budget or count)]
        chosen = maps[fitting[0] if fitting else needed.index(min(needed))]
        self._check_master(chosen)
        self._check_head(chosen)
        self._check_experts(chosen)
        _check_overlays(chosen)
        return chosen

    def needs(self, model_map: ModelMap, copied: Collection[str] = ()) -> Needs:
        """Bytes of weights, by purpose; ``copied`` are tables that turned out to be read whole."""
        gathered = surely_gathered(self.model, model_map.ambient.segments)
        head = chunked_head(self.model, model_map.ambient.segments)
        copied = set(copied)
        if model_map.low_rank is not None:
            otherwise = read_otherwise(self.model, model_map)
            low_rank = {s.name for s in model_map.low_rank_segments(model_map.ambient)}
            gathered, copied = gathered | (low_rank - otherwise), copied | otherwise
        on_device = self.updates_on_device
        return Needs(
            model_map,
            self.config.offload_param.buffer_count or DEFAULT_SLOTS,
            self.num_draws,
            gathered.difference(copied),
            lags=self.config.update.lag > 0 or model_map.low_rank is not None,
            whole_slots=on_device is not False,
            host_moves=on_device is not True,
            head=head,
            head_chunk=self.config.head_chunk,
            copied=copied,
            num_paths=len(self.config.offload_param.nvme_path or ()) or 1,
            stripe_bytes=self.aio.block_size,
        )

    def place(self, model_map: ModelMap, disk: Disk | None) -> Placement:
        """Where weights are to rest, as far as budgets go.

        Raises:
            StoreError: They do not go far enough.
        """
        config, needs = self.config, self.needs(model_map)
        tiers = needs.divide(self.tier, config.device_budget, config.host_budget)
        needs.plan(tiers).check(config.device_budget, config.host_budget)
        return Placement(
            device=self.device,
            tiers=tiers,
            num_slots=needs.num_slots,
            pin_memory=config.offload_param.pin_memory,
            device_budget=config.device_budget,
            updates_on_device=self.updates_on_device,
            disk=disk,
        )

    def base(self, model_map: ModelMap) -> Base | None:
        """The opened files of a converted model; None where the model holds its values."""
        converted = converted_of(self.model)
        if converted is None:
            return None
        return converted.open(model_map, self.config.master, self.aio)

    @property
    def num_draws(self) -> int:
        """Directions and signs of a step that this rank runs."""
        return self.config.num_lanes // self.config.replica.probe_parallel

    @property
    def wire(self) -> str:
        """How units are packed where they cross the bus."""
        return self.config.wire or IDENTITY

    @property
    def tier(self) -> str:
        """Where units rest that no budget keeps nearer."""
        return {"none": DEVICE, "cpu": HOST, "nvme": NVME}[self.config.offload_param.device]

    @property
    def aio(self) -> Aio:
        """How disks are asked."""
        aio = self.config.aio
        return Aio(aio.block_size, aio.queue_depth, aio.intra_op_parallelism)

    @property
    def updates_on_device(self) -> bool | None:
        """None: to be measured, where host and device have memories of their own."""
        if self.tier in (DEVICE, NVME):
            return False
        merges = self.moving.low_rank is not None  # once an interval: nothing to be measured
        if self.config.update.where is None and self.device.type != "cpu" and not merges:
            return None
        return self.config.update.where == "device"

    def _check_master(self, model_map: ModelMap) -> None:
        spans = [span for unit in model_map.everything for span in unit.spans if span.trainable]
        if self.config.master != "fp32" and all(span.dtype != torch.bfloat16 for span in spans):
            raise ConfigError(
                f'zeroth_order.master: "{self.config.master}" is for forwards in bfloat16, and no '
                'trainable parameter is; write "bf16": {"enabled": true}, or "master": "fp32"'
            )

    def _check_experts(self, model_map: ModelMap) -> None:
        """Whether matrices that move by small factors are whole."""
        if self.moving.low_rank is not None and model_map.divided:
            raise ModelError(
                f"{next(iter(model_map.divided))}: its experts would move in groups, and low-rank "
                'directions are of all of them; keep them together: "unit": "sublayer"'
            )

    def _check_head(self, model_map: ModelMap) -> None:
        """Whether there is one to be perturbed in chunks."""
        chunk = self.config.head_chunk
        if chunk is not None and chunked_head(self.model, model_map.ambient.segments) is None:
            raise ConfigError(
                f"zeroth_order.head_chunk: {chunk} rows of the head at a time, and "
                f"{type(self.model).__name__} names no output embedding outside its units "
                '(get_output_embeddings()); write "head_chunk": null'
            )


def _check_overlays(model_map: ModelMap) -> None:
    """Whether each lies over what travels with a unit: nobody would write it into anything else."""
    outside = [
        matrix for matrix in model_map.overlays if model_map.places[matrix][0][0].index == AMBIENT
    ]
    if outside:
        raise ConfigError(
            f"zeroth_order.unit: {outside[0]} is to move over a base that rests with its unit, and "
            f'where units are {model_map.division} it is in none; write "unit": "block", or leave '
            "it out of what moves"
        )
