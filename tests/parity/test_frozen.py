"""What is frozen rests packed: the forward sees the same bits, and nothing is packed on the way."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS, Plain, vectors
from torch import nn

from zo_offload import ops
from zo_offload.codec import codec_of
from zo_offload.config import ZOConfig
from zo_offload.journal import Journal
from zo_offload.step import Stepper

LR = 1e-2
BLOCKS = 4
STEPS = 20  # so many that a unit or two, fetched ahead, do not count
PAIRS = [
    (torch.bfloat16, "lossless12"), (torch.bfloat16, "int4"), (torch.bfloat16, "nf4:64"),
    (torch.bfloat16, "int8"), (torch.float16, "fp8_e4m3"), (torch.float16, "nf4"),
    (torch.float32, "bf16"), (torch.float32, "fp16"),
]  # fmt: skip
Freeze = Callable[[nn.Module], Any]


def whole_blocks(model: nn.Module) -> None:
    """Every unit: what is trained is ambient."""
    model.get_submodule("blocks").requires_grad_(False)


def matrices(model: nn.Module) -> None:
    """Of a unit some, beside vectors that are trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("blocks") or parameter.ndim == 1)


def some_blocks(model: nn.Module) -> None:
    """Two units, and half of a third."""
    for name in ("blocks.0", "blocks.2", "blocks.3.norm"):
        model.get_submodule(name).requires_grad_(False)


def net(freeze: Freeze, decoded: tuple[str, torch.dtype] | None = None) -> Plain:
    """With its frozen matrices as the forward is to see them, where a codec is named."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Plain(BLOCKS, width=24)
    freeze(model)
    for _, parameter in model.get_submodule("blocks").named_parameters():
        if decoded is not None and parameter.ndim > 1 and not parameter.requires_grad:
            parameter.data = seen(parameter.data, *decoded).float()
    return model


def seen(values: torch.Tensor, wire: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix by the codec alone: groups never reach beyond a parameter."""
    codec, padded = codec_of(wire), -(-values.numel() // ops.ALIGNMENT) * ops.ALIGNMENT
    elements = torch.zeros(padded, dtype=dtype)
    ops.encode(dtype, values.reshape(-1), elements[: values.numel()])
    packed = torch.empty(codec.capacity(padded, dtype), dtype=torch.uint8)
    codec.encode(elements, packed)
    return codec.look(packed, padded, dtype)[: values.numel()].view(values.shape)


def batch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = vectors(3)
    return {**found, "x": found["x"].to(dtype)}


def stepper_of(model: nn.Module, dtype: torch.dtype, folder: Path, **block: Any) -> Stepper:
    offload = {"device": "none", **block.pop("offload", {})}
    if offload["device"] == "nvme":
        offload["nvme_path"] = [str(folder / "a"), str(folder / "b")]
        block["aio"] = {"block_size": 8192}
    config = {"eps": 1e-2, "offload_param": offload, **block}
    return Stepper(model, ZOConfig.model_validate(config), dtype=dtype)


def trained(model: nn.Module, dtype: torch.dtype, folder: Path, **block: Any) -> dict[str, Any]:
    """Losses and masters of four steps, with looks between; what is planned is what is held."""
    with closing(stepper_of(model, dtype, folder, **block)) as stepper:
        losses = []
        for _ in range(4):
            losses.append(stepper.train_step([batch(dtype)], LR).lane_losses)
            losses.append(stepper.evaluate(batch(dtype)))
        weights, plan = stepper.weights, stepper.plan
        assert weights.arena.peak_bytes == plan.device_bytes
        assert weights.host_bytes == plan.host_bytes
        values = {name: weights.value(name).float().tolist() for name in weights.map.parameters}
        masters = {name: value.tolist() for name, value in weights.masters()}
        return {"losses": losses, "values": values, "masters": masters}


TIERS: list[dict[str, Any]] = [
    {},
    {"offload": {"device": "cpu"}},
    {"offload": {"device": "cpu", "buffer_count": 1}},
    {"offload": {"device": "cpu"}, "update": {"where": "device"}},
    {"offload": {"device": "cpu"}, "device_budget": 18_000},
    {"offload": {"device": "nvme"}},
    {"offload": {"device": "nvme", "buffer_count": 1}, "host_budget": 25_000},
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("dtype", "wire"), PAIRS)
@pytest.mark.parametrize("freeze", [whole_blocks, matrices])
def test_the_forward_sees_what_the_codec_makes(
    tmp_path: Path, freeze: Freeze, dtype: torch.dtype, wire: str
):
    lag = {"lag": 2} if wire in ("int4", "bf16") else {}
    for number, tier in enumerate(TIERS):
        update = {"update": {**tier.get("update", {}), **lag}}
        expected = trained(net(freeze, (wire, dtype)), dtype, tmp_path / f"{number}", **update)
        found = trained(net(freeze), dtype, tmp_path / f"{number}", wire=wire, **tier | update)
        assert found == expected, tier


@pytest.mark.parametrize(("dtype", "wire"), PAIRS[:4] + PAIRS[-2:])
def test_beside_units_that_are_trained(tmp_path: Path, dtype: torch.dtype, wire: str):
    update = {"lag": 3} if wire in ("nf4:64", "fp16") else {}
    found = []
    for number, tier in enumerate(TIERS):
        block = {"wire": wire, **tier, "update": {**tier.get("update", {}), **update}}
        found.append(trained(net(some_blocks), dtype, tmp_path / f"{number}", **block))
        assert found[-1] == found[0], tier
    name = "blocks.2.linear.weight"
    frozen = seen(net(some_blocks).get_parameter(name).data, wire, dtype)
    assert found[0]["masters"][name] == frozen.float().tolist()


class Wide(nn.Module):
    """Blocks large enough for padding and vectors not to count; the end is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(5))
        self.blocks.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return (x * self.scale).float().square().mean()


def wide_step(stepper: Stepper) -> None:
    stepper.train_step([torch.ones(1, 256, dtype=torch.bfloat16)], LR)


@pytest.mark.parametrize("wire", ["int4", "nf4"])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize("lag", [0, 3])
def test_a_step_moves_half_a_byte_a_parameter(tmp_path: Path, wire: str, device: str, lag: int):
    block = {"wire": wire, "offload": {"device": device}, "update": {"lag": lag}, "probes": 2}
    with closing(stepper_of(Wide().bfloat16(), torch.bfloat16, tmp_path, **block)) as stepper:
        weights = stepper.weights
        assert weights.pipeline is not None
        for _ in range(4):  # units are written when a step has been taken, and fetched anew
            wide_step(stepper)
        before, written = weights.pipeline.bytes_moved, written_by(stepper)
        for _ in range(STEPS):
            wide_step(stepper)
        stepper.weights.forget_fetched()
        moved = (weights.pipeline.bytes_moved - before) / STEPS / weights.map.num_parameters
        assert 0.4 <= moved <= 0.55
        assert written_by(stepper) == written
        packed = sum(unit.wire_bytes for unit in weights.map.units)
        assert packed <= 0.55 * weights.map.num_parameters
        if device == "nvme":
            assert packed <= written <= packed + 5 * 3 * 4096
        else:
            ambient = weights.map.ambient
            assert weights.host_bytes == packed + ambient.wire_bytes + ambient.rest_bytes


def written_by(stepper: Stepper) -> int:
    files = stepper.weights.files
    return files.bytes_written if files is not None else 0


def test_slots_for_all_of_it_are_filled_once(tmp_path: Path):
    block = {"wire": "nf4", "offload": {"device": "cpu", "buffer_count": 5}}
    with closing(stepper_of(Wide().bfloat16(), torch.bfloat16, tmp_path, **block)) as stepper:
        assert stepper.weights.pipeline is not None
        for _ in range(3):
            wide_step(stepper)
        assert stepper.weights.pipeline.bytes_moved == sum(
            unit.wire_bytes for unit in stepper.weights.map.units
        )


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_a_visit_decodes_once_for_all_lanes(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    for name in ("pack", "unpack"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, counted(name, real, calls))
    block = {"wire": "int4", "offload": {"device": device}, "probes": 3}
    with closing(stepper_of(Wide().bfloat16(), torch.bfloat16, tmp_path, **block)) as stepper:
        assert calls == ["pack"] * 5
        calls.clear()
        wide_step(stepper)
        assert calls == ["unpack"] * 5


def counted(name: str, real: Callable, calls: list[str]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["opt", "albert", "t5"])
def test_models_of_any_kind(tmp_path: Path, name: str):
    row, found = ROWS[name], []
    for tier in TIERS[0], TIERS[1], TIERS[5]:
        model = row.build()
        for path in row.units:
            model.get_submodule(path).requires_grad_(False)
        with closing(
            stepper_of(model, torch.bfloat16, tmp_path / str(len(found)), wire="nf4", **tier)
        ) as stepper:
            losses = [stepper.train_step([row.inputs(5)], 1e-4) for _ in range(3)]
            found.append((losses, stepper.weights.digest()))
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize("tier", [TIERS[0], TIERS[1], TIERS[5]], ids=str)
def test_what_rests_packed_is_not_given_back(tmp_path: Path, tier: dict[str, Any]):
    model = net(whole_blocks)
    with closing(stepper_of(model, torch.bfloat16, tmp_path, wire="nf4", **tier)) as stepper:
        for _ in range(3):
            stepper.train_step([batch(torch.bfloat16)], LR)
        kept = model.state_dict()["blocks.0.linear.weight"]
    assert torch.equal(
        kept, seen(net(whole_blocks).get_parameter("blocks.0.linear.weight"), "nf4", kept.dtype)
    )
    assert model.get_parameter("blocks.0.linear.weight").isnan().all()
    assert not model.get_parameter("enter.weight").isnan().any()


def test_a_journal_finds_the_frozen_units_on_the_disk(tmp_path: Path):
    """What was looked at before it was taken up is not lost, and nothing is written twice."""
    block = {"wire": "int4", "offload": {"device": "nvme"}}
    digests = []
    for _ in range(2):
        with closing(stepper_of(net(some_blocks), torch.bfloat16, tmp_path, **block)) as stepper:
            stepper.evaluate(batch(torch.bfloat16))
            stepper.follow(Journal.open(tmp_path / "run.journal", stepper.bit_header()))
            digests.append(stepper.weights.digest())
            for _ in range(3 if not stepper.step else 0):
                stepper.train_step([batch(torch.bfloat16)], LR)
            digests.append(stepper.weights.digest())
            if len(digests) == 4:
                stepper.evaluate(batch(torch.bfloat16))
                assert written_by(stepper) == 0
    assert digests[1] == digests[2] == digests[3] != digests[0]
