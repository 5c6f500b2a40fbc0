"""Chosen weights move in fp32 over a base that rests packed, and is read only."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.common import config
from models.table import ROWS
from parity.test_experts import one_by_one
from parity.test_frozen import TIERS, seen, stepper_of, written_by
from safetensors.torch import load_file
from torch import nn

import zo_offload
from trainable.laid_over import written
from trainable.modes import Owners, written_mask
from zo_offload.codec import codec_of
from zo_offload.config import parse_config
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.export.single_file import write_model
from zo_offload.mask import Chosen, Mask, Origin, read_mask, write_mask
from zo_offload.step import Stepper

LR = 1e-2
DTYPE = torch.bfloat16
WIRES = [None, "int4", "nf4:64", "int8", "fp8_e4m3", "lossless12"]


def masked(name: str, folder: Path) -> dict[str, Any]:
    """A mask of a row's matrices in units."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        chosen = {}
        for key, parameter in ROWS[name].build().named_parameters():
            if parameter.ndim > 1 and key.startswith(ROWS[name].units):
                indices = torch.arange(len(key) % 7, parameter.numel(), 41)
                chosen[key] = Chosen(indices, torch.ones(len(indices)))
        write_mask(path, Mask(Origin("random", "matrix", 1 / 41, 0), chosen))
    return {"mode": "sparse", "mask": str(path)}


def decoded(model: nn.Module, units: Sequence[str], mask: Path, wire: str) -> nn.Module:
    """With matrices as a codec makes them, but for the chosen weights."""
    for name, parameter in model.named_parameters():
        codec = codec_of(wire)
        if parameter.ndim > 1 and name.startswith(tuple(units)) and codec.shrinks(DTYPE):
            given = parameter.data.reshape(-1).clone()
            parameter.data = seen(parameter.data, wire, DTYPE).float()
            chosen = read_mask(mask).chosen.get(name)
            if chosen is not None:
                parameter.data.view(-1)[chosen.indices] = given[chosen.indices]
    return model


def trained(stepper: Stepper, inputs: Any, steps: int = 3) -> dict[str, Any]:
    """Losses, and the values that moved and that the forward sees."""
    losses = []
    for _ in range(steps):
        losses.append(stepper.train_step([inputs, inputs], LR).lane_losses)
        losses.append(stepper.evaluate(inputs))
    weights, plan = stepper.weights, stepper.plan
    assert weights.arena.peak_bytes == plan.device_bytes
    assert weights.host_bytes == plan.host_bytes
    values = {name: weights.value(name) for name in weights.map.parameters}
    return {"losses": losses, **values}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    differ = [
        key for key in expected if key != "losses" and not torch.equal(found[key], expected[key])
    ]
    assert found.keys() == expected.keys()
    assert differ == []


@pytest.mark.parametrize("wire", WIRES[1:])
def test_the_base_is_what_its_codec_makes_on_every_tier(tmp_path: Path, wire: str):
    row, trainable = ROWS["opt"], masked("opt", tmp_path)
    inputs = row.inputs(5)

    def run(model: nn.Module, **block: Any) -> dict[str, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with closing(stepper_of(model, DTYPE, folder, trainable=trainable, **block)) as stepper:
            return trained(stepper, inputs)

    plain = decoded(row.build(), row.units, Path(trainable["mask"]), wire)
    expected = run(plain)
    for tier in TIERS[0], TIERS[2], TIERS[3], TIERS[5]:
        assert_same(run(row.build(), wire=wire, **tier), expected)


@pytest.mark.parametrize("name", ["mixtral", "t5", "albert", "gpt2"])
def test_models_of_any_kind_and_units_of_any_size(tmp_path: Path, name: str):
    row, found = ROWS[name], []
    more: list[dict[str, Any]] = [{}, {"unit": "linear", **TIERS[1]}, TIERS[5]]
    for number, tier in enumerate(more):
        block = {"trainable": masked(name, tmp_path), "wire": "int4", "probes": 2, **tier}
        model = one_by_one(name) if name == "mixtral" else row.build()
        with closing(stepper_of(model, DTYPE, tmp_path / f"{number}", **block)) as stepper:
            assert bool(stepper.weights.map.divided) == (name == "mixtral" and number == 1)
            found.append(trained(stepper, row.inputs(5)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_what_is_served_and_given_back_holds_the_values(tmp_path: Path, device: str):
    row, trainable = ROWS["opt"], masked("opt", tmp_path)
    model = row.build()
    offload = {"device": device}
    with closing(stepper_of(model, DTYPE, tmp_path, trainable=trainable, offload=offload)) as it:
        trained(it, row.inputs(5))
        moved = {each.matrix: each for each in it.trainable.moving.overlays}
        served = {name: each.clone() for name, each in model.state_dict().items()}
        values = {name: it.weights.value(each.name) for name, each in moved.items()}
    given = dict(model.named_parameters())
    assert served.keys() == row.build().state_dict().keys()
    for name, before in row.build().named_parameters():
        expected = before.data.to(DTYPE)
        if name in moved:
            moved[name].parameter.data = values[name]
            expected = written(expected, moved[name])
            assert not torch.equal(expected, before.data.to(DTYPE))
        assert torch.equal(served[name], expected), name
        assert torch.equal(given[name].data.to(DTYPE), expected), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_written_and_little_moves(tmp_path: Path):
    row, trainable = ROWS["opt"], masked("opt", tmp_path)
    block = {"trainable": trainable, "wire": "nf4", "offload": {"device": "nvme"}}
    with closing(stepper_of(row.build(), DTYPE, tmp_path, **block)) as stepper:
        stepper.train_step([row.inputs(5)], LR)
        written_before = written_by(stepper)
        for _ in range(5):
            stepper.train_step([row.inputs(5)], LR)
        assert written_by(stepper) == written_before


def test_a_values_perturbation_is_not_lost_in_the_base(tmp_path: Path):
    """Chosen weights are fp32 where the forward is bfloat16: small updates gather."""
    row, trainable = ROWS["opt"], masked("opt", tmp_path)
    with closing(stepper_of(row.build(), DTYPE, tmp_path, trainable=trainable)) as stepper:
        first = dict(stepper.weights.masters())
        for _ in range(3):
            stepper.train_step([row.inputs(5)], 1e-6)
        moved = {k: v for k, v in stepper.weights.masters() if not torch.equal(v, first[k])}
    assert moved.keys() == {each for each in first if each.endswith(".sparse")}
    assert max(float((v - first[k]).abs().max()) for k, v in moved.items()) < 1e-3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: {"no.such.weight": mask.popitem()[1]}, "no.such.weight is no parameter"),
        (lambda mask: {next(iter(mask)): Chosen(torch.tensor([10**6]), torch.ones(1))},
         "weight 1,000,000 was chosen"),
    ],
)  # fmt: skip
def test_a_mask_of_another_model_is_refused(tmp_path: Path, spoil: Callable, message: str):
    trainable = masked("opt", tmp_path)
    mask = read_mask(Path(trainable["mask"]))
    write_mask(Path(trainable["mask"]), Mask(mask.origin, spoil(dict(mask.chosen))))
    model = ROWS["opt"].build()
    with pytest.raises(CheckpointError, match=message):
        stepper_of(model, DTYPE, tmp_path, trainable=trainable)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("unit", ["sublayer", "linear"])
def test_a_mask_of_what_travels_with_no_unit_is_refused(tmp_path: Path, unit: str):
    path, chosen = tmp_path / "mask.safetensors", Chosen(torch.tensor([3]), torch.ones(1))
    write_mask(path, Mask(Origin("random", "matrix", 1 / 64, 0), {"blocks.1.own": chosen}))
    trainable = {"mode": "sparse", "mask": str(path)}
    with pytest.raises(ConfigError, match=f"unit: blocks.1.own is to move .*units are {unit}"):
        stepper_of(Owners(), torch.float32, tmp_path, trainable=trainable, unit=unit)
    with closing(stepper_of(Owners(), torch.float32, tmp_path, trainable=trainable)) as it:
        assert it.train_step([torch.ones(2, 8)], LR).projected_grads != (0.0,)


def test_a_matrix_moves_whole_or_by_its_mask(tmp_path: Path):
    trainable = {**masked("opt", tmp_path), "parameters": ["*.fc1.*", "*norm*"]}
    with pytest.raises(ConfigError, match=r"layers.0.fc1.weight would move whole"):
        stepper_of(ROWS["opt"].build(), DTYPE, tmp_path, trainable=trainable)


def test_what_is_named_to_move_whole_must_not_all_be_frozen(tmp_path: Path):
    model = ROWS["opt"].build().requires_grad_(False)
    trainable = {**masked("opt", tmp_path), "parameters": ["*norm*"]}
    with pytest.raises(ConfigError, match="that it names are frozen"):
        stepper_of(model, DTYPE, tmp_path, trainable=trainable)


def test_a_file_of_the_model_has_the_models_names(tmp_path: Path):
    row, trainable = ROWS["opt"], masked("opt", tmp_path)
    with closing(stepper_of(row.build(), DTYPE, tmp_path, trainable=trainable)) as stepper:
        trained(stepper, row.inputs(5))
        for frozen in (True, False):
            write_model(tmp_path / "model.safetensors", stepper.weights, frozen)
            found = load_file(tmp_path / "model.safetensors")
            named = dict(row.build().named_parameters())
            matrices = {each.matrix for each in stepper.trainable.moving.overlays}
            assert found.keys() == (named.keys() if frozen else matrices)
            served = stepper.model.state_dict()
            assert all(torch.equal(found[name], served[name]) for name in found)


def test_a_mask_that_is_missing_or_no_mask(tmp_path: Path):
    with pytest.raises(ConfigError, match='"sparse" needs a mask'):
        parse_config({"zeroth_order": {"trainable": {"mode": "sparse"}}})
    with pytest.raises(ConfigError, match="mask: sparse needs one, found null; write the path"):
        stepper_of(ROWS["opt"].build(), DTYPE, tmp_path, trainable={"mode": "sparse"})
    for text in (None, "no mask"):
        path = tmp_path / "mask.safetensors"
        if text is not None:
            path.write_text(text)
        with pytest.raises(CheckpointError, match="no mask of this zo_offload"):
            stepper_of(ROWS["opt"].build(), DTYPE, tmp_path,
                       trainable={"mode": "sparse", "mask": str(path)})  # fmt: skip


def test_files_are_looked_for_before_a_model_is(tmp_path: Path):
    for trainable, words in (
        ({"mode": "sparse", "mask": str(tmp_path / "none")}, "trainable.mask: .*no mask of this"),
        ({"mode": "peft", "adapter": str(tmp_path)}, "trainable.adapter: no adapter_config.json"),
    ):
        block = {"trainable": trainable}
        with pytest.raises(ConfigError, match=words):
            zo_offload.initialize(model="no/such/model", config=config(zeroth_order=block))


def test_journals_of_two_masks_are_two_runs(tmp_path: Path):
    headers = []
    for every in (37, 41):
        trainable = {"mode": "sparse", "mask": str(written_mask(every))}
        with closing(stepper_of(ROWS["llama"].build(), DTYPE, tmp_path, trainable=trainable)) as it:
            headers.append(it.bit_header()["trainable"])
    assert headers[0]["mask"] != headers[1]["mask"]
