"""Windows in which a missing wait would show, held open: the losses stay those of memory.

Copies are far longer than what is computed, or far shorter; or one of the streams sleeps before
each copy or each unit, for much longer than the other's work takes. A slot that is overwritten
while it is read, or read before it has arrived, a buffer that is packed anew or read from a disk
while a copy leaves it, and masters that are fetched before they are back would each change a loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import Plain

from gpu.common import LR, Ended, assert_equal, net, offloaded, trained, vectors
from zo_offload.config import ZOConfig
from zo_offload.offload.streamer import Streamer
from zo_offload.step import Stepper

pytestmark = pytest.mark.gpu
REPEATED = 50
SLEEP_CYCLES = 4_000_000  # some two milliseconds, a hundred times what a small unit takes
BF16 = torch.bfloat16

TIERS: dict[str, dict[str, Any]] = {
    "host": {**offloaded("cpu"), "update": {"where": "host"}},
    "host, one slot": {**offloaded("cpu", buffer_count=1), "update": {"where": "host"}},
    "host, packed": {**offloaded("cpu"), "update": {"where": "host"}, "wire": "int8"},
    "host, pageable": {**offloaded("cpu", pin_memory=False), "update": {"where": "host"}},
    "host, lag": {**offloaded("cpu"), "update": {"where": "host", "lag": 2}},
    "device": {**offloaded("cpu"), "update": {"where": "device"}},
    "device, one slot": {**offloaded("cpu", buffer_count=1), "update": {"where": "device"}},
    "device, lag": {**offloaded("cpu", buffer_count=3), "update": {"where": "device", "lag": 2}},
    "device, packed": {**offloaded("cpu"), "update": {"where": "device"}, "wire": "nf4"},
    "nvme": {"update": {}},
    "nvme, packed": {"update": {"lag": 2}, "wire": "lossless12"},
}


def block_of(tier: str, folder: Path) -> dict[str, Any]:
    nvme = offloaded("nvme", folder) if tier.startswith("nvme") else {}
    return {**nvme, **TIERS[tier]}


def in_memory(make: Callable[[], Plain], tier: str, device: torch.device, **more: Any) -> Ended:
    """What is right."""
    block = TIERS[tier]
    kept = {"update": {"lag": block["update"].get("lag", 0)}, "wire": block.get("wire")}
    return trained(make(), device, vectors(more.pop("rows", 2), BF16), **kept, **more)


# -- shapes --


@pytest.mark.parametrize("tier", ["host", "host, packed", "device", "device, lag", "nvme"])
def test_large_copies_beside_little_work(device: torch.device, tier: str, tmp_path: Path):
    """Eight lanes of two rows on units of 32 MiB; of 2 MiB where a disk is in between."""
    wide = 1024 if tier == "nvme" else 4096
    width, steps = (wide, REPEATED) if device.type == "cuda" else (24, 5)
    large = {"probes": 4, "steps": steps, "looks": False, "lr": 1e-5}
    right = in_memory(lambda: net(4, width), tier, device, **large)
    found = trained(net(4, width), device, vectors(2, BF16), **large, **block_of(tier, tmp_path))
    assert_equal(found, right)


@pytest.mark.parametrize("tier", ["host", "device", "nvme"])
def test_little_copies_beside_much_work(device: torch.device, tier: str, tmp_path: Path):
    """Two lanes of many rows on units of some kilobytes."""
    rows, steps = (1 << 19, REPEATED) if device.type == "cuda" else (64, 5)
    small = {"steps": steps, "looks": False}
    right = in_memory(net, tier, device, rows=rows, **small)
    found = trained(net(), device, vectors(rows, BF16), **small, **block_of(tier, tmp_path))
    assert_equal(found, right)


# -- sleeping streams --


def sleep_before_units(stepper: Stepper) -> None:
    """The device is late with all that it computes; the host goes on, and so do copies."""

    def sleep(*_: Any) -> None:
        torch.cuda._sleep(SLEEP_CYCLES)

    for module in stepper.weights.map.modules:
        module.register_forward_pre_hook(sleep)


@contextmanager
def sleeping_before_copies(cycles: int = SLEEP_CYCLES) -> Iterator[None]:
    """The bus is late, in both directions."""
    copy = Streamer._copy_aside

    def late(self: Streamer, stream: torch.cuda.Stream, *rest: Any) -> Any:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
        return copy(self, stream, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streamer, "_copy_aside", late)
        yield


@pytest.mark.parametrize("tier", TIERS)
def test_a_device_that_is_late(cuda: torch.device, tier: str, tmp_path: Path):
    few = {"steps": 10}
    right = in_memory(lambda: net(6, 256), tier, cuda, **few)
    block = block_of(tier, tmp_path)
    found = trained(net(6, 256), cuda, vectors(2, BF16), at_work=sleep_before_units, **few, **block)
    assert_equal(found, right)


@pytest.mark.parametrize("tier", TIERS)
def test_a_bus_that_is_late(cuda: torch.device, tier: str, tmp_path: Path):
    few = {"steps": 10}
    right = in_memory(lambda: net(6, 256), tier, cuda, **few)
    with sleeping_before_copies():
        found = trained(net(6, 256), cuda, vectors(2, BF16), **few, **block_of(tier, tmp_path))
    assert_equal(found, right)


@pytest.mark.parametrize("tier", ["host", "host, packed", "device, lag", "nvme"])
def test_both_are_late(cuda: torch.device, tier: str, tmp_path: Path):
    few = {"steps": 10, "probes": 3}
    right = in_memory(lambda: net(6, 256), tier, cuda, **few)
    block = block_of(tier, tmp_path)
    with sleeping_before_copies():
        found = trained(
            net(6, 256), cuda, vectors(2, BF16), at_work=sleep_before_units, **few, **block
        )
    assert_equal(found, right)


def test_a_caller_on_a_stream_of_its_own(cuda: torch.device):
    """Whatever the default stream does: nothing here waits for it, or runs there."""
    right = trained(net(6, 256), cuda, vectors(2, BF16))
    stream = torch.cuda.Stream(cuda)
    torch.cuda._sleep(100 * SLEEP_CYCLES)
    with torch.cuda.stream(stream), sleeping_before_copies():
        found = trained(net(6, 256), cuda, vectors(2, BF16), **TIERS["device"])
    assert_equal(found, right)


# -- beginning and end --


def test_slots_are_zeroed_before_anything_is_copied_there(cuda: torch.device):
    """A device that is late with zeroing them would wipe what has arrived."""
    right = trained(net(6, 256), cuda, vectors(2, BF16), steps=2)
    torch.cuda._sleep(200 * SLEEP_CYCLES)
    found = trained(net(6, 256), cuda, vectors(2, BF16), steps=2, **TIERS["host"])
    assert_equal(found, right)


@pytest.mark.parametrize("steps", [0, 2])
def test_memory_that_is_given_back_is_not_written_any_more(cuda: torch.device, steps: int):
    """A run that ends while units are fetched ahead, and another that takes its memory."""
    block = {"eps": 1e-2, **TIERS["host, lag"]}
    with sleeping_before_copies():
        stepper = Stepper(net(6, 256), ZOConfig.model_validate(block), cuda, BF16)
        for _ in range(steps):
            stepper.train_step([vectors(2, BF16)], LR)
        stepper.evaluate(vectors(2, BF16))  # the next one's units are on their way
        stepper.close()
        del stepper
        others = [torch.full((1 << 16,), 7, dtype=torch.uint8, device=cuda) for _ in range(400)]
    torch.cuda.synchronize(cuda)
    assert all(bool((other == 7).all()) for other in others)
