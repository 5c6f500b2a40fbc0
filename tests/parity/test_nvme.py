"""Units that rest on a disk: the same weights to the bit as in memory, and the plan's bytes."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS, Plain, vectors
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.errors import StoreError
from zo_offload.journal import Journal
from zo_offload.offload.planner import Plan
from zo_offload.step import Stepper

LR = 1e-2


def net(num_blocks: int = 6) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(num_blocks, width=24)


def batch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = vectors(3)
    return {**found, "x": found["x"].to(dtype)}


def stepper_of(folder: Path | None, model: nn.Module, dtype: torch.dtype, **block: Any) -> Stepper:
    offload: dict[str, Any] = {"device": "none"}
    if folder is not None:
        offload = {"device": "nvme", "nvme_path": [str(folder / "a"), str(folder / "b")]}
        offload |= block.pop("offload", {})
        block["aio"] = {"block_size": 8192}
    config = {"eps": 1e-2, "offload_param": offload, **block}
    return Stepper(model, ZOConfig.model_validate(config), dtype=dtype)


def masters(
    folder: Path | None, dtype: torch.dtype, looks: bool = True, **block: Any
) -> dict[str, torch.Tensor]:
    """After six steps, with looks and weight decay between."""
    with closing(stepper_of(folder, net(), dtype, **block)) as stepper:
        for _ in range(6):
            stepper.train_step([batch(dtype)], LR, weight_decay=1e-2)
            if looks:
                stepper.evaluate(batch(dtype))
                stepper.model.state_dict()
        weights, plan = stepper.weights, stepper.plan
        assert weights.arena.peak_bytes == plan.device_bytes
        assert weights.host_bytes == plan.host_bytes
        return dict(weights.masters())


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"wire": "lossless12"}),
        (torch.bfloat16, {"wire": "nf4", "master": "bf16+8"}),
        (torch.float16, {"wire": "int8"}),
        (torch.float32, {}),
    ],
    ids=str,
)
def test_no_tier_changes_a_bit(tmp_path: Path, dtype: torch.dtype, block: dict, lag: int):
    block = {**block, "update": {"lag": lag}}
    expected = masters(None, dtype, **block)
    variants: list[dict[str, Any]] = [
        {},
        {"offload": {"buffer_count": 1}},
        {"host_budget": 60_000, "device_budget": 25_000},
    ]
    for more in variants:
        assert differing(expected, masters(tmp_path, dtype, **block, **more)) == [], more
    assert not (tmp_path / "a").exists()  # a run without a journal leaves nothing


def test_budgets_fill_every_tier(tmp_path: Path):
    """Twelve blocks so large that staging them takes less memory than keeping them."""

    def plan(**block: Any) -> tuple[Plan, list[str], int]:
        model = Plain(12, width=128)
        with closing(stepper_of(tmp_path, model, torch.bfloat16, **block)) as stepper:
            units = stepper.weights.map.units
            whole = max(unit.wire_bytes + unit.rest_bytes for unit in units)
            return stepper.plan, [stepper.weights.tiers[unit.index] for unit in units], whole

    least, tiers, whole = plan()
    assert set(tiers) == {"nvme"}
    budgets = {
        "device_budget": least.device_bytes + whole,
        "host_budget": least.host_bytes + 3 * whole,
    }
    found, tiers, _ = plan(**budgets)
    assert {tier: tiers.count(tier) for tier in tiers} == {"device": 1, "host": 3, "nvme": 8}
    assert found.device_bytes <= budgets["device_budget"]
    assert found.host_bytes <= budgets["host_budget"]
    assert found.nvme_bytes < least.nvme_bytes


@pytest.mark.parametrize("name", ["opt", "albert", "qwen3-moe", "t5"])
def test_models_of_any_kind(tmp_path: Path, name: str):
    row = ROWS[name]
    found = []
    for folder in (None, tmp_path):
        with closing(stepper_of(folder, row.build(), torch.float32)) as stepper:
            results = [stepper.train_step([row.inputs(5)], 1e-4) for _ in range(3)]
            found.append((results, dict(stepper.weights.masters())))
    assert found[0][0] == found[1][0]
    assert differing(found[0][1], found[1][1]) == []


def test_frozen_units_are_read_as_they_were_written(tmp_path: Path):
    found = []
    for folder in (None, tmp_path):
        model = net()
        model.blocks[1].requires_grad_(False)
        with closing(stepper_of(folder, model, torch.bfloat16)) as stepper:
            for _ in range(3):
                stepper.train_step([batch(torch.bfloat16)], LR)
            found.append(dict(stepper.weights.masters()))
    assert differing(*found) == []


def test_a_model_is_given_back_as_it_was_if_nothing_was_trained(tmp_path: Path):
    model, before = net(), net().state_dict()
    with closing(stepper_of(tmp_path, model, torch.bfloat16)) as stepper:
        stepper.evaluate(batch(torch.bfloat16))
    assert differing(before, model.state_dict()) == []


def test_two_runs_do_not_share_a_folder(tmp_path: Path):
    def two_steps(stepper: Stepper) -> None:
        for _ in range(2):
            stepper.train_step([batch(torch.bfloat16)], LR)

    with (
        closing(stepper_of(tmp_path, net(), torch.bfloat16)) as one,
        closing(stepper_of(tmp_path, net(), torch.bfloat16)) as other,
    ):
        two_steps(one)
        with pytest.raises(StoreError, match="another run has these files; end that run"):
            two_steps(other)
        two_steps(one)


def test_what_is_on_the_disk_is_taken_over(tmp_path: Path):
    """A run that ends and starts again reads its units; they are neither replayed nor written."""

    def run(steps: int) -> tuple[dict[str, torch.Tensor], list[int], int]:
        with closing(stepper_of(tmp_path, net(), torch.bfloat16)) as stepper:
            path = tmp_path / "run.journal"
            stepper.follow(Journal.open(path, stepper.bit_header()))
            files = stepper.weights.files
            assert files is not None
            carried = [stepper.weights.carried(unit) for unit in stepper.weights.map.units]
            for _ in range(steps):
                stepper.train_step([batch(torch.bfloat16)], LR)
            found = dict(stepper.weights.masters())
            return found, carried, files.bytes_written

    first, carried, written = run(3)
    assert carried == [0] * 6
    assert written > 0
    again, carried, written = run(0)
    assert carried == [3] * 6
    assert written == 0
    assert differing(first, again) == []
    assert differing(run(2)[0], first) != []
    (tmp_path / "run.journal").unlink()
    afresh, carried, _ = run(3)
    assert carried == [0] * 6  # of a run that is no more nothing is believed
    assert differing(first, afresh) == []


def test_another_run_does_not_touch_what_is_there(tmp_path: Path):
    for eps in (1e-2, 2e-2):
        with closing(stepper_of(tmp_path, net(), torch.bfloat16, eps=eps)) as stepper:
            journal = Journal.open(tmp_path / f"{eps}.journal", stepper.bit_header())
            if eps == 1e-2:
                stepper.follow(journal)
                stepper.train_step([batch(torch.bfloat16)], LR)
                continue
            with pytest.raises(StoreError, match="weights of something else: run: the disk has"):
                stepper.follow(journal)


def test_a_unit_that_is_damaged_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """After an unclean end everything is checked: what is damaged is replayed from the base."""
    whole: list[dict[str, torch.Tensor]] = []
    carried: list[int] = []
    for trial in range(3):
        with closing(stepper_of(tmp_path, net(), torch.bfloat16)) as stepper:
            stepper.follow(Journal.open(tmp_path / "run.journal", stepper.bit_header()))
            carried = [stepper.weights.carried(unit) for unit in stepper.weights.map.units]
            if trial == 0:
                for _ in range(4):
                    stepper.train_step([batch(torch.bfloat16)], LR)
            whole.append(dict(stepper.weights.masters()))
        if trial == 1:
            assert carried == [4] * 6
            (tmp_path / "a" / "clean").unlink()
            path = tmp_path / "a" / "units.bin"
            content = bytearray(path.read_bytes())
            content[4096 + 100 :: 16384] = b"?" * len(content[4096 + 100 :: 16384])
            path.write_bytes(content)
    assert carried != [4] * 6
    assert "not whole, left out" in caplog.text
    assert differing(whole[0], whole[1]) == differing(whole[0], whole[2]) == []


def test_a_twin_does_not_remove_what_a_run_at_work_has(tmp_path: Path):
    """The same settings, another journal: to the files they are one run."""
    with (
        closing(stepper_of(tmp_path, net(), torch.bfloat16)) as one,
        closing(stepper_of(tmp_path, net(), torch.bfloat16)) as twin,
    ):
        one.follow(Journal.open(tmp_path / "one.journal", one.bit_header()))
        one.train_step([batch(torch.bfloat16)], LR)
        journal = Journal.open(tmp_path / "twin.journal", twin.bit_header())
        with pytest.raises(StoreError, match="another run has these files; end that run"):
            twin.follow(journal)
        journal.close()
        one.train_step([batch(torch.bfloat16)], LR)
        assert (tmp_path / "a" / "store.json").exists()
