"""Experts that units divide among themselves train to the bits of experts that move together."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from models.perturbed import assert_equals_plain_forwards
from models.table import ROWS
from safetensors.torch import load_file
from torch import nn

from zo_offload import units
from zo_offload.config import ZOConfig
from zo_offload.errors import CheckpointError
from zo_offload.export.single_file import write_model
from zo_offload.journal import Journal
from zo_offload.offload.streamer import Slot
from zo_offload.snapshot import read_snapshot, write_snapshot
from zo_offload.step import Stepper
from zo_offload.units import Unit

NAMES = ("mixtral", "qwen3-moe")
BF16 = torch.bfloat16
LR = 1e-2


def one_by_one(name: str) -> Any:
    """A model whose forward indexes its experts, as training by group lets it."""
    model: Any = ROWS[name].build()
    model.set_experts_implementation("eager")
    return model


def stepper_of(model: nn.Module, dtype: torch.dtype, unit: Any = "linear", **block: Any) -> Stepper:
    config = {"eps": 1e-2, "probes": 2, "unit": unit, "offload_param": {"device": "cpu"}, **block}
    return Stepper(model, ZOConfig.model_validate(config), dtype=dtype)


def train(stepper: Stepper, name: str, number: int = 3) -> list[Any]:
    """Lane losses of steps on two micro-batches, with looks between."""
    dtype = next(stepper.model.parameters()).dtype
    losses = []
    for _ in range(number):
        batches = [ROWS[name].inputs(length, dtype) for length in (6, 3)]
        losses.append(stepper.train_step(batches, LR, weight_decay=1e-2).lane_losses)
        losses.append(stepper.evaluate(batches[0]))
    return losses


def trained(name: str, dtype: torch.dtype, **block: Any) -> tuple[list, dict, str]:
    """Losses, masters and their digest; what is planned is what is held."""
    with closing(stepper_of(one_by_one(name), dtype, **block)) as stepper:
        stepper.weights.poison = True
        losses = train(stepper, name)
        assert stepper.weights.arena.peak_bytes == stepper.plan.device_bytes
        assert stepper.weights.host_bytes == stepper.plan.host_bytes
        on_disk = block.get("offload_param", {}).get("device") == "nvme"
        num_tiers = 3 if "host_budget" in block else 2 if on_disk else 1  # ambient: on the host
        assert len(set(stepper.weights.tiers.values())) == num_tiers
        return losses, dict(stepper.weights.masters()), stepper.weights.digest()


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def tiers(folder: Path, lag: int, budgets: tuple[int, int]) -> list[dict[str, Any]]:
    """Where units may rest: one tier, or as many as budgets fill."""
    nvme = {"device": "nvme", "nvme_path": [str(folder)]}
    small = dict(zip(("device_budget", "host_budget"), budgets, strict=True))
    update = {"lag": lag}
    return [
        {"offload_param": {"device": "none"}, "update": update},
        {"offload_param": {"device": "cpu", "buffer_count": 1}, "update": update},
        {"offload_param": {"device": "cpu"}, "update": {"where": "device", **update}},
        {"offload_param": nvme, "update": update, **small},
    ]


@contextmanager
def kept_together() -> Iterator[None]:
    """Meanwhile, the experts of a module move as one unit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "groups_of", lambda module, most: [range(module.num_experts)])
        yield


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "dtype", "lag", "budgets", "block"),
    [
        ("mixtral", torch.float32, 0, (240_000, 165_000), {"direction": "gaussian"}),
        ("mixtral", torch.float16, 2, (200_000, 300_000), {"wire": "int8:64"}),
        ("qwen3-moe", BF16, 2, (100_000, 105_000), {"direction_scale": "rms"}),
        ("qwen3-moe", BF16, 0, (92_000, 86_000), {"master": "bf16+8", "wire": "int4"}),
        ("qwen3-moe", BF16, 2, (100_000, 66_000), {"master": "bf16_sr", "wire": "lossless12"}),
    ],
    ids=str,
)
def test_dividing_changes_no_bit(
    tmp_path: Path, name: str, dtype: Any, lag: int, budgets: tuple[int, int], block: dict
):
    with kept_together():
        losses, masters, digest = trained(name, dtype, update={"lag": lag}, **block)
    for where in tiers(tmp_path, lag, budgets):
        found = trained(name, dtype, **block, **where)
        assert found[0] == losses, where
        assert differing(masters, found[1]) == [], where
        assert found[2] == digest, where


@pytest.mark.parametrize("name", NAMES)
def test_divided_experts_equal_plain_forwards(name: str):
    """Of lanes whose tokens choose other experts."""
    batches = [ROWS[name].inputs(length) for length in (6, 3, 9)]
    assert_equals_plain_forwards(one_by_one(name), batches, unit="linear")


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_journal_is_that_of_experts_together(dtype: torch.dtype):
    """What decides bits is the same, so that a run may go on with other units."""

    def header(**block: Any) -> dict[str, Any]:
        with closing(stepper_of(one_by_one("mixtral"), dtype, **block)) as stepper:
            return stepper.bit_header()

    for block in ({}, {"update": {"lag": 2}}, {"wire": "int8"}):
        with kept_together():
            expected = header(**block)
        assert header(**block) == expected, block


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_model_is_given_back_whole(tmp_path: Path, dtype: torch.dtype, device: str):
    model, before = one_by_one("qwen3-moe"), ROWS["qwen3-moe"].build().state_dict()
    model.set_experts_implementation("batched_mm")
    offload = {"device": device, "nvme_path": [str(tmp_path)] if device == "nvme" else None}
    with closing(stepper_of(model, dtype, offload_param=offload)) as stepper:
        stepper.evaluate(ROWS["qwen3-moe"].inputs(6, dtype))
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == "batched_mm"
    assert differing(before, model.state_dict()) == []
    with closing(stepper_of(model, dtype, offload_param=offload)) as stepper:
        train(stepper, "qwen3-moe", 1)
        seen = stepper.model.state_dict()
    if device != "nvme":  # what rests on a disk stays there
        assert differing(seen, model.state_dict()) == []
        model(**ROWS["qwen3-moe"].inputs(6, dtype))


def test_weights_that_came_from_a_file_are_given_back_uncopied(tmp_path: Path):
    model: Any = one_by_one("mixtral")
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    address = weight.data_ptr()
    offload = {"device": "nvme", "nvme_path": [str(tmp_path)]}
    with closing(stepper_of(model, torch.float32, offload_param=offload)):
        assert weight.data_ptr() != address
    assert weight.data_ptr() == address


def test_readers_see_whole_parameters(tmp_path: Path):
    """Whatever moves together: a file of the model, ``state_dict``, a snapshot's other reader."""
    with closing(stepper_of(one_by_one("mixtral"), BF16, update={"lag": 2})) as stepper:
        train(stepper, "mixtral")
        weights, step = stepper.weights, stepper.step
        write_model(tmp_path / "model.safetensors", weights)
        written, state = load_file(tmp_path / "model.safetensors"), stepper.model.state_dict()
        shapes = {name: parameter.shape for name, parameter in weights.map.parameters.items()}
        assert {name: value.shape for name, value in written.items()} == shapes
        assert differing(written, state) == []
        (tmp_path / "snapshot").mkdir()
        write_snapshot(tmp_path / "snapshot", weights, step, "")
        masters = dict(weights.masters())
        snapshot = read_snapshot(tmp_path / "snapshot")
        with closing(stepper_of(one_by_one("mixtral"), BF16, update={"lag": 2})) as other:
            snapshot.check(other.weights)
            snapshot.restore(other.weights)
            other.follow(copied(stepper.journal))
            assert differing(masters, dict(other.weights.masters())) == []
            assert train(other, "mixtral", 1) == train(stepper, "mixtral", 1)
    with (
        kept_together(),
        closing(stepper_of(one_by_one("mixtral"), BF16)) as whole,
        pytest.raises(
            CheckpointError, match=r"files, but the model has .* of another model, or of"
        ),
    ):
        snapshot.check(whole.weights)


def test_groups_on_a_disk_are_taken_over_by_the_next_process(tmp_path: Path):
    name, offload = "qwen3-moe", {"device": "nvme", "nvme_path": [str(tmp_path / "disk")]}
    losses: list[Any] = []
    for number in (2, 1):
        with closing(stepper_of(one_by_one(name), BF16, offload_param=offload)) as stepper:
            journal = Journal.open(tmp_path / "run.journal", stepper.bit_header())
            stepper.follow(journal)
            carried = {stepper.weights.carried(unit) for unit in stepper.weights.map.units}
            assert carried == {0} if number == 2 else 2 in carried
            losses += train(stepper, name, number)
            masters = dict(stepper.weights.masters())
    with kept_together():
        expected = trained(name, BF16)
    assert losses == expected[0]
    assert differing(masters, expected[1]) == []


def copied(journal: Journal) -> Journal:
    other = Journal.memory({})
    for record in journal.records:
        other.append(record)
    return other


def test_each_group_moves_once_a_visit():
    """Although lanes come to other experts, and to some late."""
    name = "qwen3-moe"
    with closing(stepper_of(one_by_one(name), torch.float32)) as stepper:
        asked: list[int] = []
        pipeline: Any = stepper.weights.pipeline
        acquire = pipeline.acquire

        def ask(unit: Unit, step: int) -> Slot:
            asked.append(unit.index)
            return acquire(unit, step)

        pipeline.acquire = ask
        stepper.measure([ROWS[name].inputs(length) for length in (2, 3, 4)], stepper.draws())
        groups = [index for index, _ in groupby(asked)]
        names = [unit.name for unit in stepper.weights.map.units]
    assert len(groups) == len(set(groups))
    assert sum(names[index].endswith("]") for index in groups) >= 6  # of 8
