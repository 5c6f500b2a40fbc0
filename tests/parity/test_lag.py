"""Masters that lag behind the steps: against a plain loop, in every tier, looked at and resumed."""

import copy
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from models.perturbed import moved_along, plain_loss, rounded
from models.table import ROWS, Plain, vectors
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.ops import Draw, reference
from zo_offload.placing import Placing
from zo_offload.step import Stepper, StepResult
from zo_offload.window import Means

STEPS = 7
LR = 3e-2  # a step is some of bfloat16's, so that rounding at other steps shows


class PlainRun:
    """Steps in bfloat16 with fp32 masters that lag, read off the definition, slowly.

    Everything is computed anew from the base for every step: masters to the grid, rounded to what
    the forward sees; then the missing steps in fp32; then the perturbation and its rounding.
    """

    def __init__(self, model: nn.Module, units: tuple[str, ...], lag: int) -> None:
        self.base = {name: p.detach().numpy() for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model).bfloat16()
        self.units = units
        self.lag = lag
        self.coefficients: list[float] = []

    def carried(self, name: str) -> int:
        """The largest multiple of the lag not above t - 1; what is in no unit never lags."""
        step = len(self.coefficients)
        if not name.startswith(self.units) or not self.lag:
            return step
        return max(step - 1, 0) // self.lag * self.lag

    def moved(self, value: np.ndarray, index: int, first: int, last: int) -> np.ndarray:
        for step in range(first, last):
            draw = 0, step, 0, index, 0, value.size, self.coefficients[step]
            value = value - reference.rademacher(*draw).reshape(value.shape)
        return value

    def loss(self, batch: Any, eps: float) -> float:
        step = len(self.coefficients)
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            carried = self.carried(name)
            master = torch.from_numpy(self.moved(self.base[name], index, 0, carried))
            seen = rounded(master, torch.bfloat16).float().numpy()
            value = torch.from_numpy(self.moved(seen, index, carried, step))
            draw = Draw(0, step, 0, eps)
            parameter.data = moved_along(value, index, draw, torch.bfloat16)
        return plain_loss(self.model, batch)

    def train_step(self, batch: Any, eps: float) -> list[float]:
        losses = [self.loss(batch, eps), self.loss(batch, -eps)]
        self.coefficients.append(LR * (losses[0] - losses[1]) / (2 * eps))
        return losses

    def masters(self) -> dict[str, np.ndarray]:
        now = len(self.coefficients)
        return {n: self.moved(v, i, 0, now) for i, (n, v) in enumerate(self.base.items())}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("device", ["none", "cpu"])
@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("name", ["opt", "plain"])
def test_equals_a_plain_loop(name: str, lag: int, device: str):
    row = ROWS[name]
    expected = PlainRun(row.build(), row.units, lag)
    with closing(stepper_of(row.build(), lag=lag, device=device)) as stepper:
        for step in range(STEPS):
            batch = row.inputs(5 + step % 2, torch.bfloat16)
            losses = expected.train_step(batch, stepper.config.eps)
            assert stepper.train_step([batch], LR).lane_losses == tuple(losses), step
        for key, master in stepper.weights.masters():
            np.testing.assert_array_equal(master.numpy(), expected.masters()[key])


def net(num_blocks: int = 3) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(num_blocks)


def stepper_of(model: nn.Module, lag: int, device: str = "cpu", **more: Any) -> Stepper:
    offload = {"device": device, **more.pop("offload", {})}
    update = {"lag": lag, "where": more.pop("where", None)}
    config = {"eps": 1e-2, "update": update, "offload_param": offload, **more}
    return Stepper(model, ZOConfig.model_validate(config), dtype=torch.bfloat16)


def steps(stepper: Stepper, number: int = STEPS, look: bool = False) -> list[StepResult]:
    """Results of steps on batches that depend on the step alone; weight decay gathers meanwhile."""
    results = []
    for _ in range(number):
        batches = [in_bf16(vectors(2 + stepper.step % 2)), in_bf16(vectors(3))]
        results.append(stepper.train_step(batches, LR, weight_decay=1e-2))
        if look:
            look_around(stepper)
    return results


def in_bf16(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "x": batch["x"].bfloat16()}


def look_around(stepper: Stepper) -> None:
    stepper.evaluate(in_bf16(vectors(4)))
    stepper.measure_noise(in_bf16(vectors(2)))
    stepper.weights.digest()
    stepper.model.state_dict()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("master", ["fp32", "bf16+8", "bf16_sr"])
@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_tiers_slots_places_and_looking_change_no_bit(lag: int, master: str):
    found = []
    for offload, where, look in [
        ({"device": "none"}, None, False),
        ({"device": "none"}, "device", True),
        ({"buffer_count": 1}, "host", False),
        ({"buffer_count": 5}, "host", True),
        ({"buffer_count": 5}, None, False),
        ({"buffer_count": 1}, "device", True),
        ({"buffer_count": 2}, "device", False),
    ]:
        more = {"master": master, "offload": offload, "where": where, "probes": 2}
        run = stepper_of(net(4), lag=lag, **more)
        with closing(run) as stepper:
            found.append((steps(stepper, look=look), stepper.weights.digest()))
    assert all(each == found[0] for each in found[1:])


def test_lag_shows_in_bfloat16_and_not_in_fp32():
    digests: dict[torch.dtype, set[str]] = {torch.float32: set(), torch.bfloat16: set()}
    for dtype, seen in digests.items():
        for lag in (0, 1, 3):
            config = ZOConfig.model_validate({"eps": 1e-2, "update": {"lag": lag}})
            with closing(Stepper(net(), config, dtype=dtype)) as stepper:
                for _ in range(STEPS):
                    batch = vectors(4)
                    stepper.train_step([{**batch, "x": batch["x"].to(dtype)}], LR)
                seen.add(stepper.weights.digest())
    assert [len(seen) for seen in digests.values()] == [1, 3]


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_evaluation_and_state_dict_are_of_the_current_step(device: str):
    batch = in_bf16(vectors(4))
    with closing(stepper_of(net(), lag=4, device=device)) as stepper:
        steps(stepper)
        assert {stepper.weights.carried(u) for u in stepper.weights.map.units} == {4}
        total, weight = stepper.evaluate(batch)
        exported = net().bfloat16().eval()
        exported.load_state_dict(stepper.model.state_dict())
        assert plain_loss(exported, batch) == total / weight
        for name, master in stepper.weights.masters():
            value = stepper.model.state_dict()[name]
            assert torch.equal(value, rounded(master, torch.bfloat16))


@pytest.mark.parametrize(("device", "where"), [("none", None), ("cpu", "host"), ("cpu", "device")])
def test_the_plan_counts_the_room_for_a_copy(device: str, where: str | None):
    with closing(stepper_of(net(), lag=1, device=device, where=where)) as stepper:
        steps(stepper, 2, look=True)
        arena, weights = stepper.weights.arena, stepper.weights
        assert arena.peak_bytes == stepper.plan.device_bytes
        assert weights.host_bytes == stepper.plan.host_bytes
        assert where != "device" or stepper.plan.slots == 2 * sum(
            (unit.wire_bytes + unit.rest_bytes) for unit in weights.map.units[:1]
        )


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_masters_move_only_on_the_grid(device: str):
    with closing(stepper_of(net(), lag=3, device=device)) as stepper:
        weights = stepper.weights
        for step in range(8):
            steps(stepper, 1)
            carried = {weights.carried(unit) for unit in weights.map.units}
            # A unit that was fetched ahead moves when it is fetched again; the pipeline may have
            # begun with the next visit.
            assert carried <= {0, 3, 6}
            assert max(carried) in {[0, 0, 0, 0, 3, 3, 3, 6, 6][n] for n in (step, step + 1)}


def test_a_closed_run_gives_the_current_weights_back():
    stepper = stepper_of(net(), lag=4)
    steps(stepper)
    expected = {name: value.clone() for name, value in stepper.model.state_dict().items()}
    stepper.close()
    found = dict(stepper.model.named_parameters())
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("lag", "fetched"), [(0, []), (1, [(0, 2), (1, 2)]), (3, [(0, 0), (1, 0)])]
)
def test_the_next_visits_first_units_come_before_the_step_is_known(lag: int, fetched: list):
    with closing(stepper_of(net(4), lag=lag)) as stepper:
        steps(stepper, 2)
        stepper.measure([in_bf16(vectors(2))], stepper.draws())  # the visit of step 2, alone
        pipeline = stepper.weights.pipeline
        assert pipeline is not None
        there = [slot for slot in pipeline._slots if slot.holds in fetched]
        for slot in there:
            assert slot.arrival is not None
            slot.arrival.result()
        assert sorted(slot.holds for slot in there if slot.holds) == fetched
        moved = pipeline.bytes_moved
        stepper.descend(Means({(0, 1): 1.0, (0, -1): 0.5}), LR)
        first, last = stepper.weights.map.units[0], stepper.weights.goal
        pipeline.begin(last(first))
        pipeline.acquire(first, last(first))
        pipeline.forget()
        assert (pipeline.bytes_moved - moved) // first.wire_bytes == (0 if fetched else 2)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_trying_both_places_changes_no_bit(lag: int, monkeypatch):
    """As on an accelerator, where the faster place is kept."""
    with closing(stepper_of(net(4), lag=lag)) as stepper:
        expected = steps(stepper, 12 * max(lag, 1)), stepper.weights.digest()
    monkeypatch.setattr(Placing, "updates_on_device", None)
    for looks in (False, True):
        with closing(stepper_of(net(4), lag=lag)) as stepper:
            results = steps(stepper, 12 * max(lag, 1), look=looks)
            assert (results, stepper.weights.digest()) == expected
            trial = stepper.weights._trial
            assert trial is not None
            assert trial._chosen is not None
