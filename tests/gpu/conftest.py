"""The device that these tests run on."""

import os
from collections.abc import Iterator

import pytest
import torch
from models.conftest import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device, or what ``ZO_GPU_TESTS_ON`` names."""
    if os.environ.get("ZO_GPU_TESTS_ON", "cuda") == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device: torch.device) -> Iterator[torch.device]:
    """For what a CPU has no counterpart of: streams, events, page-locked memory."""
    if device.type != "cuda":
        pytest.skip("no CUDA device, and a CPU has neither streams nor page-locked memory")
    yield device
    torch.cuda.synchronize(device)
