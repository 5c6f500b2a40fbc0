"""Where page-locking is refused, pageable memory serves, and that is said once."""

from typing import Any

import pytest
import torch

from zo_offload.errors import StoreError
from zo_offload.offload import memory
from zo_offload.offload.disk import aligned
from zo_offload.offload.packing import Packer
from zo_offload.offload.store import HostStore
from zo_offload.ops import Segment, Span
from zo_offload.units import Unit

REASON = "CUDA error: out of memory"


class Code:
    """As CUDA's enumeration: true whatever it says."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


class Runtime:
    """Of CUDA, the part that locks pages."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> Code:  # noqa: N802
        if not self.code:
            self.locked[address] = num_bytes
        return Code(self.code)

    def cudaHostUnregister(self, address: int) -> Code:  # noqa: N802
        del self.locked[address]
        return Code(0)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(memory, "_refused", set())
    return found


@pytest.fixture
def refusing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    ones, empty = torch.ones, torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError(f"{REASON}\nCUDA kernel errors might be reported elsewhere")
        return empty(*args, **more)

    def launch(*args: Any, device: str = "cpu", **more: Any) -> torch.Tensor:
        if device == "cuda":
            raise RuntimeError("of the registration before")
        return ones(*args, **more)

    runtime.code = 2
    monkeypatch.setattr(torch, "ones", launch)
    monkeypatch.setattr(torch, "empty", refuse)


def test_pageable_memory_takes_its_place(refusing: None, caplog: pytest.LogCaptureFixture):
    span = Span(torch.bfloat16, (Segment("w", 0, (128,), 0),), 0, 0)
    unit = Unit(0, "block", (span,), span.wire_bytes, span.rest_bytes)
    store = HostStore(pin_memory=True)
    store.add(unit)
    assert store.lend(unit).wire.tolist() == [0] * 256
    assert store.lend(unit).spare_wire().nbytes == 256
    assert Packer(64, pin_memory=True).held_bytes == 128
    assert aligned(5000, pin_memory=True).data_ptr() % 4096 == 0
    assert memory.page_lock([torch.zeros(10)]) == []
    at_rest, passing = caplog.messages
    assert at_rest.startswith(
        "host memory cannot be page-locked (cudaHostRegister: 2); pageable memory"
    )
    assert passing.startswith(f"host memory cannot be page-locked ({REASON}); pageable memory")


def test_pages_are_locked_as_long_as_somebody_has_them(runtime: Runtime):
    buffer = memory.host_buffer(10_000, pin_memory=True)
    part = buffer[100:200]
    assert runtime.locked == {buffer.data_ptr(): 10_000}  # no byte more than was asked for
    assert buffer.data_ptr() % 4096 == 0
    assert not buffer.any()
    del buffer
    assert len(runtime.locked) == 1
    part.fill_(7)
    del part
    assert runtime.locked == {}


def test_memory_of_others_is_locked_and_unlocked(runtime: Runtime):
    others = [torch.zeros(10), torch.zeros(0), torch.zeros(20)]
    locked = memory.page_lock(others)
    assert runtime.locked == {others[0].data_ptr(): 40, others[2].data_ptr(): 80}
    memory.page_unlock(locked)
    assert runtime.locked == {}


def test_no_memory_at_all_is_refused(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("can't allocate memory: you tried to allocate 512 bytes")

    span = Span(torch.bfloat16, (Segment("w", 0, (128,), 0),), 0, 0)
    unit = Unit(0, "block", (span,), span.wire_bytes, span.rest_bytes)
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(StoreError, match=r"host memory: no 256 bytes for unit block beside 0 held"):
        HostStore(pin_memory=False).add(unit)
