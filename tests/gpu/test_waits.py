"""Stores are page-locked, copies go on while the host does, and nobody waits for the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpu.common import IMPLEMENTATIONS, LR, net, offloaded, served_by, trained, vectors
from gpu.test_races import SLEEP_CYCLES, sleeping_before_copies
from zo_offload.config import ZOConfig
from zo_offload.lanes import Lanes
from zo_offload.offload import memory
from zo_offload.offload.streamer import Streamer
from zo_offload.ops import Draw, Segment, Span, perturb, perturb_rows
from zo_offload.step import Stepper

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def stepper_of(device: torch.device, model: nn.Module | None = None, **block: Any) -> Stepper:
    config = ZOConfig.model_validate({"eps": 1e-2, **block})
    return Stepper(model or net(6, 256), config, device, BF16)


# -- page-locked --


@pytest.mark.parametrize("num_bytes", [1, 5000, (1 << 25) + 3])
def test_host_memory_is_page_locked(cuda: torch.device, num_bytes: int):
    buffer = memory.host_buffer(num_bytes, pin_memory=True)
    assert buffer.is_pinned()
    assert not buffer.any()
    assert memory.passing_buffer(num_bytes).is_pinned()
    assert not memory.host_buffer(num_bytes, pin_memory=False).is_pinned()
    del buffer
    assert not torch.empty(num_bytes, dtype=torch.uint8).is_pinned()


def test_memory_of_others_is_page_locked_and_unlocked(cuda: torch.device):
    others = [torch.zeros(1 << 22, dtype=torch.uint8) for _ in range(3)]
    locked = memory.page_lock(others)
    assert [each.is_pinned() for each in others] == [True] * 3
    memory.page_unlock(locked)
    assert [each.is_pinned() for each in others] == [False] * 3


def test_a_refusal_is_not_blamed_on_what_follows(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Locked memory is refused a second time, and CUDA remembers it until somebody asks."""
    monkeypatch.setattr(memory, "_refused", set())
    buffer = torch.zeros(1 << 22, dtype=torch.uint8)
    locked = memory.page_lock([buffer])
    assert memory.page_lock([buffer]) == []
    assert "cudaHostRegister" in caplog.text
    torch.ones(8, device=cuda).add_(1)
    memory.page_unlock(locked)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_stores_are_page_locked(cuda: torch.device, tier: str, tmp_path: Path):
    """And so is where units are packed, and where those of a disk pass through."""
    block = {**offloaded(tier, tmp_path), "update": {"where": "host"}, "wire": "int8"}
    block = block if tier == "cpu" else {**block, "update": {}}
    with closing(stepper_of(cuda, **block)) as stepper:
        stepper.train_step([vectors(2, BF16)], LR)
        weights = stepper.weights
        assert weights._packer is not None
        assert all(each.is_pinned() for each in weights._packer._buffers)
        for unit in weights.map.units:
            with weights.lent(unit) as lease:
                assert lease.wire.is_pinned(), unit.name
                assert lease.rest.is_pinned(), unit.name


# -- copies --


def test_a_copy_goes_on_while_the_host_does(cuda: torch.device):
    """The event of a copy that has been asked for, on a bus that is late, has not come yet."""
    still = []
    acquire = Streamer.acquire

    def watched(self: Streamer, *given: Any) -> Any:
        slot = acquire(self, *given)
        assert slot.arrival is not None
        event = slot.arrival.result()
        assert event is not None
        still.append(not event.query())
        return slot

    with pytest.MonkeyPatch.context() as patch, sleeping_before_copies(100 * SLEEP_CYCLES):
        patch.setattr(Streamer, "acquire", watched)
        trained(net(6, 256), cuda, vectors(2, BF16), steps=1, looks=False,
                **offloaded("cpu"), update={"where": "host"})  # fmt: skip
    assert any(still)


def test_both_directions_go_on_at_once(cuda: torch.device):
    with closing(stepper_of(cuda, **offloaded("cpu"), update={"where": "device"})) as stepper:
        pipeline = stepper.weights.pipeline
        assert pipeline is not None
        assert pipeline._up is not None
        assert pipeline._up != pipeline._back
        torch.cuda.synchronize(cuda)
        with torch.cuda.stream(pipeline._up):
            torch.cuda._sleep(50 * SLEEP_CYCLES)
        with torch.cuda.stream(pipeline._back):
            back = torch.cuda.Event()
            back.record()
        back.synchronize()
        assert not pipeline._up.query()


# -- waits --


@contextmanager
def not_waiting(owner: Any, name: str) -> Iterator[list[str]]:
    """Inside calls of a method torch refuses whatever would wait for the device."""
    method: Callable[..., Any] = getattr(owner, name)
    calls: list[str] = []

    def watched(*given: Any, **named: Any) -> Any:
        calls.append(name)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return method(*given, **named)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield calls


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
@pytest.mark.parametrize(
    "block",
    [
        {},
        {**offloaded("cpu"), "update": {"where": "host", "lag": 2}},
        {**offloaded("cpu"), "update": {"where": "device", "lag": 2}},
        {**offloaded("cpu"), "update": {"where": "host"}, "wire": "nf4"},
        {**offloaded("cpu"), "update": {"where": "device"}, "wire": "int8"},
        {"trainable": {"mode": "low_rank"}},
    ],
    ids=str,
)
def test_no_lane_waits_for_the_device(
    cuda: torch.device, implementation: str, direction: str, block: dict[str, Any]
):
    """Losses are asked for when all lanes are through."""
    with (
        served_by(implementation, cuda),
        closing(stepper_of(cuda, direction=direction, **block)) as stepper,
    ):
        for _ in range(3):  # compiled, and small tables are there
            stepper.train_step([vectors(2, BF16)], LR)
        with not_waiting(Lanes, "_run_together") as calls:
            for _ in range(3):
                stepper.train_step([vectors(2, BF16)], LR)
        assert len(calls) == 3


def spans() -> Sequence[Span]:
    segments = (Segment("a", 3, (40, 128), 0), Segment("b", 4, (300,), 40 * 128, 0.37))
    return [Span(dtype, segments, 0, 0) for dtype in (torch.float32, BF16, torch.float16)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_work_is_launched_where_the_tensors_are(implementation: str, cuda: torch.device):
    """Whichever device is the thread's."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: there is no other")
    other = torch.device("cuda", 1)
    draw, rows = Draw(1, 2, 3, 0.1), torch.tensor([3, 0])
    for span in spans():
        wire, found = torch.randn(span.elements).to(span.dtype), []
        for device in (torch.device("cpu"), other):
            here = wire.to(device)
            with served_by(implementation, cuda):
                some = perturb_rows(span, span.segments[0], here, rows.to(device), "gaussian", draw)
                perturb(span, here, here, "rademacher", draw)
            found.append((here.cpu(), some.cpu()))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
