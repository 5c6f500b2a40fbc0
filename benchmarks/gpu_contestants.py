"""What takes steps in a GPU benchmark: bare forwards, MeZO, and ours in any setting."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from gpu_machine import synchronize
from gpu_shapes import DTYPE, Shape, random_model
from mezo import step as mezo_step

from zo_offload import Stepper
from zo_offload.config import ZOConfig
from zo_offload.offload.residency import DEVICE
from zo_offload.plan.budget import place
from zo_offload.plan.request import Budgets, Request
from zo_offload.plan.search import Layouts
from zo_offload.telemetry import Reading, reading
from zo_offload.units import IDENTITY

LR = 1e-7
MASTERS = {"fp32": 4, "bf16+8": 3, "bf16_sr": 2}  # bytes a weight, with what travels
TIERS = {"none": "device", "cpu": "host"}
EXACT = ("identity", "lossless12", "bf16")  # wires that leave a bfloat16 as it is
SPARE_BYTES = 3 * 10**9  # libraries' workspaces, what allocators lose, and what a process is
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """How ours is to run.

    Attributes:
        offload: ``none`` or ``cpu``.
        wire: How blocks cross the bus.
        lag: Steps that masters may be behind.
        where: What updates masters in host memory.
        head_chunk: Rows of the head at a time.
    """

    offload: str = "none"
    wire: str = IDENTITY
    lag: int = 0
    where: str = "host"
    head_chunk: int | None = None

    @property
    def name(self) -> str:
        """For tables."""
        if self.offload == "none":
            return "ours, in memory"
        words = [f"ours, {self.wire}", f"lag {self.lag}"]
        words += ["updated on the device"] if self.where == "device" else []
        words += [f"head by {self.head_chunk}"] if self.head_chunk else []
        return ", ".join(words)

    def block(self, master: str, **others: Any) -> dict[str, Any]:
        """As a JSON has it."""
        where = {"where": self.where} if self.offload == "cpu" else {}
        return {
            "eps": 1e-3,
            "unit": "block",
            "wire": self.wire,
            "master": master,
            "head_chunk": self.head_chunk,
            "offload_param": {"device": self.offload},
            "update": {"lag": self.lag, **where},
            **others,
        }


@dataclass
class Contestant:
    """Takes turns.

    Attributes:
        name: For tables.
        run: A turn.
        steps: Of a turn.
        peak: Most bytes that its turns held on the device, beyond what ``others`` hold.
        others: Bytes that are there for other contestants.
    """

    name: str
    run: Callable[[], object]
    steps: int = 1
    peak: int | None = None
    others: int = 0

    def turn(self, device: torch.device) -> None:
        """Until the device has done it."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.run()
        synchronize(device)
        if device.type == "cuda":
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(device) - self.others)


class Bare:
    """The model in bfloat16 on the device, and MeZO on its weights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.model = random_model(shape, device, whole=True)
        self._seed = 0

    def loss(self, batch: Batch) -> float:
        """Of a forward."""
        with torch.inference_mode():
            return float(self.model(**batch, use_cache=False).loss)

    def two(self, batch: Batch) -> Contestant:
        """Two forwards: the bound of any step."""
        return Contestant("two bare forwards", lambda: [self.loss(batch) for _ in range(2)])

    def mezo(self, batch: Batch) -> Contestant:
        """As published."""

        def run() -> None:
            self._seed += 1
            parameters = list(self.model.parameters())
            mezo_step(parameters, lambda: self.loss(batch), self._seed, lr=LR)

        return Contestant("MeZO as published", run)


@dataclass
class Ours:
    """A model that trains.

    Args:
        shape: Of the model.
        setting: How.
        master: What updates accumulate in.
        device: Where forwards run.
        others: Further keys of the JSON's block.
        backend: Of ``torch.compile``, where blocks are to be compiled.
    """

    shape: Shape
    setting: Setting
    master: str
    device: torch.device
    others: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None

    def __post_init__(self) -> None:
        began = time.perf_counter()
        on_device = self.setting.offload == "none"
        model = random_model(self.shape, self.device if on_device else torch.device("cpu"))
        if self.backend is not None:
            compile_blocks(model, self.backend)
        config = ZOConfig.model_validate(self.setting.block(self.master, **self.others))
        self.stepper = Stepper(model, config, device=self.device, dtype=DTYPE)
        synchronize(self.device)
        self.build_seconds = time.perf_counter() - began

    def contestant(self, batch: Batch, others: int = 0) -> Contestant:
        """Turns of as many steps as lie between two moves of masters."""
        steps = max(1, self.setting.lag)

        def run() -> None:
            for _ in range(steps):
                self.stepper.train_step([batch], LR)

        return Contestant(self.setting.name, run, steps, others=others)

    def loss(self, batch: Batch) -> float:
        """Of an unperturbed forward."""
        total, weight = self.stepper.evaluate(batch)
        return total / weight

    def reading(self) -> tuple[int, Reading]:
        """Steps taken, and what counters stand at."""
        return self.stepper.step, reading(self.stepper)

    @property
    def host_kernel(self) -> dict[str, float]:
        """What the host does to weights in a step: bytes of masters, and weights packed by wire."""
        weights, where = self.stepper.weights, self.setting.where
        if self.setting.offload == "none" or where == "device":
            return {"master_bytes": 0, "packed_weights": 0}
        ours = [unit for unit in weights.map.units if weights.tiers[unit.index] != DEVICE]
        trained = [span for unit in ours for span in unit.spans if span.trainable]
        ambient = [span for span in weights.map.ambient.spans if span.trainable]
        moved = sum(map(_master_bytes, trained)) / max(1, self.setting.lag)
        moved += sum(map(_master_bytes, ambient))
        packed = sum(span.elements for span in trained if span.codec != IDENTITY)
        return {"master_bytes": 2 * moved, "packed_weights": packed}

    @property
    def planned(self) -> dict[str, int]:
        """Bytes of weights, as the run itself plans them."""
        plan = self.stepper.plan
        return {"device_weights": plan.device_bytes, "host_weights": plan.host_bytes}

    def close(self) -> None:
        """Give everything back."""
        self.stepper.close()
        del self.stepper
        gc.collect()


def planned(
    shape: Shape, setting: Setting, master: str, batch: tuple[int, int], trainable: str = "full"
) -> dict[str, int]:
    """Bytes of everything on device and host, as ``zo-offload plan`` has them."""
    request = Request(
        unit="block",
        wire=setting.wire,
        master=master,
        trainable=trainable,
        where=setting.where,
        lag=setting.lag,
        batch_size=batch[0],
        length=batch[1],
        head_chunk=setting.head_chunk,
        lowest=TIERS[setting.offload],
        only=True,
    )
    tiers = place(_layouts(shape).at(request), request, Budgets())
    return {"device": tiers.device_bytes, "host": tiers.host_bytes}


def master_that_fits(
    shape: Shape, setting: Setting, device_room: int | None, host_room: int
) -> tuple[str | None, dict[str, int]]:
    """The widest that leaves room on device and host, and what it takes; None if none does."""
    needed: dict[str, int] = {}
    for master in MASTERS:
        found = [planned(shape, setting, master, batch) for batch in shape.batches]
        needed = {tier: max(each[tier] for each in found) for tier in ("device", "host")}
        fits = device_room is None or needed["device"] + SPARE_BYTES <= device_room
        if fits and needed["host"] + SPARE_BYTES <= host_room:
            return master, needed
    return None, needed


@lru_cache
def _layouts(shape: Shape) -> Layouts:
    return Layouts(shape.config(), DTYPE)


def held_on(device: torch.device) -> int:
    """Bytes of tensors on the device now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def compile_blocks(model: Any, backend: str) -> None:
    """What each block computes, by itself: hooks, at which lanes stop, stay outside."""
    for block in model.model.decoder.layers:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)


def _master_bytes(span: Any) -> int:
    return span.wire_bytes + span.rest_bytes
