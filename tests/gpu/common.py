"""Runs, and what they end with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models.table import Plain, values
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.ops import kernels
from zo_offload.step import Stepper, StepResult

LR = 1e-4
IMPLEMENTATIONS = (kernels.TORCH, kernels.TRITON)


@contextmanager
def served_by(name: str, device: torch.device) -> Iterator[None]:
    """Meanwhile one implementation serves the device; on a CPU Triton's are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        if name == kernels.TRITON:
            pytest.importorskip("triton", reason="triton is not installed")
            if device.type == "cpu":
                patch.setenv("TRITON_INTERPRET", "1")
        with kernels.using(name):
            yield


def net(num_blocks: int = 6, width: int = 24) -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain(num_blocks, width)


def vectors(count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"x": values(count, 8).to(dtype), "labels": torch.arange(count) % 2}


@dataclass(frozen=True)
class Ended:
    """What a run found and left."""

    results: Sequence[StepResult]
    masters: dict[str, torch.Tensor]


def offloaded(tier: str, folder: Any = None, **more: Any) -> dict[str, Any]:
    """The block's key for a tier: ``none``, ``cpu`` or ``nvme``."""
    path = {"nvme_path": str(folder)} if tier == "nvme" else {}
    return {"offload_param": {"device": tier, **path, **more}}


def trained(
    model: nn.Module,
    device: torch.device,
    batch: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 6,
    lr: float = LR,
    looks: bool = True,
    at_work: Callable[[Stepper], None] = lambda stepper: None,
    **block: Any,
) -> Ended:
    """Take steps with decay, and look at the weights between two of them.

    Args:
        model: Fresh.
        device: Where.
        batch: The same at each step.
        dtype: Of forwards.
        steps: How many.
        lr: Learning rate; so small that no loss overflows.
        looks: Whether an evaluation follows each.
        at_work: Called before the first.
        block: Of the JSON.
    """
    config = ZOConfig.model_validate({"eps": 1e-2, **block})
    with closing(Stepper(model, config, device, dtype)) as stepper:
        at_work(stepper)
        results = []
        for _ in range(steps):
            results.append(stepper.train_step([batch], lr, weight_decay=1e-2))
            if looks:
                stepper.evaluate(batch)
        assert stepper.weights.arena.peak_bytes <= stepper.plan.device_bytes
        return Ended(results, {n: v.clone() for n, v in stepper.weights.masters()})


def assert_equal(found: Ended, right: Ended, what: Any = "") -> None:
    """Losses and masters, bit for bit."""
    for mine, theirs in zip(found.results, right.results, strict=True):
        assert mine.lane_losses == theirs.lane_losses, (what, mine.step)
    assert differing(found.masters, right.masters) == [], what


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that are not equal to the bit."""
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n].view(torch.int32), b[n].view(torch.int32))]
