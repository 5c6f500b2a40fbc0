"""What is asked of a plan: a choice of everything that matters, some of it open."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zo_offload.config import BLOCK, ZOConfig, load_json, parse_config
from zo_offload.config_update import momentum_of
from zo_offload.errors import ConfigError
from zo_offload.mask import read_mask
from zo_offload.offload.aio import Aio

TIERS = ("device", "host", "nvme")
"""From fast to large."""
LOWEST_TIERS = {"none": "device", "cpu": "host", "nvme": "nvme"}
TRAINABLES = ("full", "low_rank", "sparse", "peft", "scales")
FROZEN = TRAINABLES[2:]
"""Modes whose base rests in its wire format."""
SAYS: dict[str, dict[str, Any]] = {
    "sparse": {"mask": "mask.safetensors"},
    "peft": {"peft_config": {"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}},
}
"""What a JSON has to say beside a mode, where nothing is said."""
GIB = 2**30
DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Budgets:
    """Bytes that may be held, or None for any number.

    Attributes:
        device: By weights, activations and logits.
        device_weights: By weights alone (``device_budget`` of the JSON).
        host: In host memory.
        host_weights: The same (``host_budget`` of the JSON); what a run fills.
        nvme: On disk.
    """

    device: int | None = None
    device_weights: int | None = None
    host: int | None = None
    host_weights: int | None = None
    nvme: int | None = None

    @property
    def in_host_memory(self) -> int | None:
        """The smaller of two."""
        said = [budget for budget in (self.host, self.host_weights) if budget is not None]
        return min(said, default=None)


@dataclass(frozen=True)
class Request:
    """A run to be planned. None where the plan is to choose.

    Attributes:
        unit: Granularity of units.
        wire: Wire format of matrices.
        master: What updates accumulate in.
        trainable: ``full``; ``low_rank``: matrices by small factors; ``sparse``: a static mask of
            the base, which is frozen; ``peft``: adapters beside a frozen base; ``scales``: its
            group scales. A frozen base rests in its wire format.
        choice: What the JSON says of a mode (``zeroth_order.trainable``).
        share: Of the matrices' weights, that a mask chooses which is not there.
        where: Where masters in host memory are updated.
        lag: Steps that masters may be behind.
        window: Steps whose directions each update draws.
        probes: Directions a step.
        signs: Forwards of a micro-batch along a direction.
        probe_parallel: Ranks that share the lanes of a micro-batch.
        micro_batches: A step.
        batch_size: Examples of a micro-batch.
        length: Tokens of an example.
        live_lanes: Most forwards alive at once.
        head_chunk: Rows of the head at a time (None: all).
        joined_rows: Tokens of a forward up to which lanes share products (None: they do not).
        num_slots: Units in flight on the device.
        num_paths: Disks that units are striped over.
        stripe_bytes: Of each stripe.
        lowest: Furthest tier that units may rest in.
        only: Whether the JSON says so: then they rest nearer only as far as its own budgets say.
    """

    unit: str | None = None
    wire: str = "identity"
    master: str = "fp32"
    trainable: str = "full"
    choice: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1e-3
    where: str | None = None
    lag: int = 0
    window: int = 1
    probes: int = 1
    signs: int = 2
    probe_parallel: int = 1
    micro_batches: int = 1
    batch_size: int = 1
    length: int = DEFAULT_LENGTH
    live_lanes: int | None = None
    head_chunk: int | None = None
    joined_rows: int | None = None
    num_slots: int = 2
    num_paths: int = 1
    stripe_bytes: int = Aio.block_size
    lowest: str = "nvme"
    only: bool = False

    @property
    def moves(self) -> dict[str, Any]:
        """``zeroth_order.trainable``, of this mode."""
        mode, said = self.trainable, dict(self.choice)
        if said.pop("mode", TRAINABLES[0]) != mode:  # another one is asked for
            said = {}
        if not {"mask", "adapter", "peft_config"} & said.keys():
            said |= SAYS.get(mode, {})
        return {"mode": mode, **said}

    @property
    def has_mask(self) -> bool:
        """Whether there is a file that says which weights move."""
        mask = self.choice.get("mask")
        return mask is not None and Path(mask).exists()

    @property
    def draws(self) -> int:
        """Directions and signs of a step that this rank runs."""
        return self.signs * self.probes // self.probe_parallel

    @property
    def lanes(self) -> int:
        """Forwards of a step on this rank."""
        return self.draws * self.micro_batches

    @property
    def tokens(self) -> int:
        """Of one forward."""
        return self.batch_size * self.length

    @property
    def joins(self) -> bool:
        """Whether lanes share products, and so are inside a block together."""
        few = self.joined_rows is not None and self.tokens <= self.joined_rows
        return few and self.trainable == "peft"


def read_json(path: str | Path) -> tuple[Request, Budgets, torch.dtype | None]:
    """:func:`request_of` a file."""
    return request_of(load_json(path))


def request_of(config: Mapping[str, Any]) -> tuple[Request, Budgets, torch.dtype | None]:
    """What a DeepSpeed JSON says of a run on one rank; its dtype is None for the model's own.

    Raises:
        ConfigError: On the first mistake; or units are named by class, which a plan cannot vary.
    """
    from zo_offload.deepspeed_keys import check_keys  # imports DeepSpeed

    check_keys(config)
    block = parse_config(config)
    if isinstance(block.unit, tuple):
        raise ConfigError(
            f'{BLOCK}.unit: a plan divides blocks itself; write "block", "sublayer", "linear" or '
            f"null, found {list(block.unit)}"
        )
    micro, accumulated = _batches(config)
    momentum = momentum_of(block.update, block.trainable.mode)
    said = "offload_param" in block.model_fields_set
    request = Request(
        unit=block.unit,
        wire=block.wire or "identity",
        master=block.master,
        trainable=block.trainable.mode,
        choice=block.trainable.model_dump(exclude_none=True, mode="json"),
        share=_share(block.trainable.mask),
        where=block.update.where,
        lag=block.update.lag,
        window=momentum.window if momentum is not None else 1,
        probes=block.probes,
        signs=len(block.signs),
        probe_parallel=block.replica.probe_parallel,
        micro_batches=accumulated,
        batch_size=micro,
        live_lanes=block.live_lanes,
        head_chunk=block.head_chunk,
        joined_rows=block.joined_rows,
        num_slots=block.offload_param.buffer_count or 2,
        num_paths=len(block.offload_param.nvme_path or ()) or 1,
        stripe_bytes=block.aio.block_size,
        lowest=LOWEST_TIERS[block.offload_param.device] if said else "nvme",
        only=said,
    )
    return request, _budgets(block), _dtype(config)


def with_options(request: Request, options: Mapping[str, Any]) -> Request:
    """The request with those options that are not None; a share is of a mask yet to be made."""
    said = {key: value for key, value in options.items() if value is not None}
    if "share" in said:
        said["choice"] = {k: v for k, v in request.choice.items() if k != "mask"}
    return replace(request, **said)


def _share(mask: str | None) -> float:
    """Of the weights that could be chosen; the default of what is yet to be made."""
    if mask is None or not Path(mask).exists():
        return Request.share
    found = read_mask(Path(mask))
    return found.num_chosen / max(found.origin.candidates, found.num_chosen, 1)


def _budgets(block: ZOConfig) -> Budgets:
    return Budgets(device_weights=block.device_budget, host_weights=block.host_budget)


def _dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(key) or {}).get("enabled") is True:
            return dtype
    return None


def _batches(config: Mapping[str, Any]) -> tuple[int, int]:
    """Examples of a micro-batch, and micro-batches of a step, on one rank."""
    whole, micro, accumulated = (
        _count(config, key)
        for key in (
            "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        )
    )  # fmt: skip
    if micro is None:
        micro = max(1, (whole or 1) // (accumulated or 1))
    if accumulated is None:
        accumulated = max(1, (whole or micro) // micro)
    return micro, accumulated


def _count(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}: expected a whole number of at least 1, found {value!r}")
    return value
