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


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros

    def refuse(*args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError(f"{REASON}\nCUDA kernel errors might be reported elsewhere")
        return zeros(*args, **more)

    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(memory, "_refused", set())


def test_pageable_memory_takes_its_place(refusing: None, caplog: pytest.LogCaptureFixture):
    span = Span(torch.bfloat16, (Segment("w", 0, (128,), 0),), 0, 0)
    unit = Unit(0, "block", (span,), span.wire_bytes, span.rest_bytes)
    store = HostStore(pin_memory=True)
    store.add(unit)
    assert store.lend(unit).wire.tolist() == [0] * 256
    assert store.lend(unit).spare_wire().nbytes == 256
    assert Packer(64, pin_memory=True).held_bytes == 128
    assert aligned(5000, pin_memory=True).data_ptr() % 4096 == 0
    (warning,) = caplog.messages
    assert warning.startswith(f"host memory cannot be page-locked ({REASON}); pageable memory")


def test_no_memory_at_all_is_refused(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("can't allocate memory: you tried to allocate 512 bytes")

    span = Span(torch.bfloat16, (Segment("w", 0, (128,), 0),), 0, 0)
    unit = Unit(0, "block", (span,), span.wire_bytes, span.rest_bytes)
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(StoreError, match=r"host memory: no 256 bytes for unit block beside 0 held"):
        HostStore(pin_memory=False).add(unit)
