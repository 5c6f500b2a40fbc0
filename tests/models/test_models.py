"""Every model of the table, in every forward dtype: streamed, against plain copies, read back."""

from contextlib import closing

import pytest
import torch

from models.perturbed import assert_equals_plain_forwards, rounded
from models.table import DTYPES, ROWS, Row
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.offload import planner
from zo_offload.step import Stepper
from zo_offload.window import Means

STREAMED = OffloadConfig(device="cpu")
LENGTHS = (5, 8)  # of the micro-batches of a step


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=name_of),
    pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys()),
]


def trained(
    row: Row, dtype: torch.dtype, offload: OffloadConfig
) -> tuple[list, dict[str, torch.Tensor]]:
    """Lane losses of three steps, and the masters after them."""
    config = ZOConfig(probes=2, offload_param=offload)
    with closing(Stepper(row.build(), config, dtype=dtype)) as stepper:
        stepper.weights.poison = True
        batches = [row.inputs(length, dtype) for length in LENGTHS]
        losses = [stepper.train_step(batches, lr=1e-3).lane_losses for _ in range(3)]
        assert stepper.weights.arena.peak_bytes <= stepper.plan.device_bytes
        return losses, dict(stepper.weights.masters())


@pytest.mark.sampled(26)
def test_streamed_equals_resident(row: Row, dtype: torch.dtype):
    resident_losses, resident = trained(row, dtype, OffloadConfig())
    streamed_losses, streamed = trained(row, dtype, STREAMED)
    assert streamed_losses == resident_losses
    assert streamed.keys() == resident.keys()
    different = [name for name in resident if not same_bits(streamed[name], resident[name])]
    assert different == []


@pytest.mark.sampled(32)
def test_no_plan_is_exceeded(row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Nor where every table counts as a large one."""
    monkeypatch.setattr(planner, "SMALL_BYTES", 0)
    with closing(Stepper(row.build(), ZOConfig(offload_param=STREAMED), dtype=dtype)) as stepper:
        planned = stepper.plan.device_bytes
        stepper.train_step([row.inputs(6, dtype)], lr=1e-3)
        assert stepper.weights.arena.peak_bytes <= planned == stepper.plan.device_bytes


@pytest.mark.sampled(32)
def test_lanes_equal_plain_forwards(row: Row, dtype: torch.dtype):
    assert_equals_plain_forwards(row.build(), [row.inputs(6, dtype)], dtype)


@pytest.mark.sampled(24)
def test_micro_batches_of_a_draw_share_its_copies(row: Row, dtype: torch.dtype):
    """Without poison, which makes every lane's copy anew."""
    batches = [row.inputs(6, dtype), row.inputs(4, dtype)]
    assert_equals_plain_forwards(row.build(), batches, dtype, poison=False)


@pytest.mark.sampled(32)
def test_state_dict_is_that_of_an_untouched_model(row: Row, dtype: torch.dtype):
    untouched = row.build(dtype).state_dict()
    with closing(Stepper(row.build(dtype))) as stepper:
        served = stepper.model.state_dict()
    assert list(served) == list(untouched)
    assert [n for n in served if not same_bits(served[n], untouched[n])] == []
    assert storages(served) == storages(untouched)
    assert vars(served).keys() == vars(untouched).keys()


@pytest.mark.sampled(32)
def test_state_dict_follows_the_masters(row: Row, dtype: torch.dtype):
    config = ZOConfig(offload_param=STREAMED)
    with closing(Stepper(row.build(), config, dtype=dtype)) as stepper:
        before, parameters = stepper.model.state_dict(), stepper.weights.map.parameters
        stepper.descend(Means({(0, 1): 2.0, (0, -1): 1.0}), lr=1e-3)
        after, masters = stepper.model.state_dict(), dict(stepper.weights.masters())
    for name, master in masters.items():
        assert same_bits(after[name], rounded(master, after[name].dtype)), name
        assert same_bits(after[name], before[name]) != parameters[name].requires_grad, name


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (-0.0 is not 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def storages(state: dict[str, torch.Tensor]) -> list[int]:
    """For each entry the position of the first one that shares its storage."""
    pointers = [value.untyped_storage().data_ptr() for value in state.values()]
    return [pointers.index(pointer) for pointer in pointers]
