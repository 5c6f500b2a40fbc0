"""Group scales move in fp32 over a base of integers, whose codes are read only."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from models.table import ROWS
from parity.test_experts import one_by_one
from parity.test_frozen import STEPS, TIERS, Wide, seen, stepper_of, wide_step, written_by
from torch import nn
from transformers import AutoModelForCausalLM

from trainable.laid_over import coded, times
from trainable.modes import BATCH, Owners, masters, model
from trainable.test_sparse import assert_same, trained
from zo_offload import ops
from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError, ModelError
from zo_offload.ops import layout_of
from zo_offload.step import Stepper
from zo_offload.trainable.scales import PART, initial_scales

LR = 1e-4
DTYPE = torch.bfloat16
WIRES = ["int4", "int4:64", "int8", "int8:64"]


def scales(**more: Any) -> dict[str, Any]:
    return {"mode": "scales", **more}


def stepper(given: nn.Module, dtype: torch.dtype | None = None, **block: Any) -> Stepper:
    block = {"eps": 1e-3, "wire": "int4", "trainable": scales(), **block}
    return Stepper(given, ZOConfig.model_validate(block), dtype=dtype)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE, torch.float16], ids=str)
def test_the_first_forward_is_that_of_the_frozen_base(wire: str, dtype: torch.dtype):
    """Values begin at the base's own scales: nothing is rounded anew."""
    row = ROWS["opt"]
    with closing(stepper(row.build(), dtype, wire=wire)) as it:
        found = it.evaluate(row.inputs(5))
        values = {name: it.weights.value(name) for name in it.weights.map.overlays}
    plain = row.build()
    given = dict(plain.named_parameters())
    for name, value in values.items():
        expected = seen(given[name].data, wire, dtype)
        assert torch.equal(value, expected), name
        given[name].data = expected.float()
    with closing(Stepper(plain, ZOConfig(), dtype=dtype)) as it:
        assert it.evaluate(row.inputs(5)) == found


def test_what_the_forward_sees_is_codes_times_scales():
    with closing(stepper(model())) as it:
        before = masters(it)
        for _ in range(3):
            it.train_step([BATCH], LR)
        after = masters(it)
        for name in it.weights.map.overlays:
            given = dict(model().named_parameters())[name].data
            codes, first = coded(given, layout_of("int4"))
            assert torch.equal(first, before[f"{name}.scales"])
            moved = after[f"{name}.scales"]
            assert not torch.equal(moved, first)
            assert torch.equal(it.weights.value(name), times(codes, moved, given.shape)), name


@pytest.mark.parametrize("wire", WIRES)
def test_every_tier_sees_the_same_bits(tmp_path: Path, wire: str):
    row, found = ROWS["opt"], []
    for number, tier in enumerate([TIERS[0], TIERS[2], TIERS[3], TIERS[5]]):
        block = {"trainable": scales(), "wire": wire, **tier}
        with closing(stepper_of(row.build(), DTYPE, tmp_path / f"{number}", **block)) as it:
            found.append(trained(it, row.inputs(5)))
        assert_same(found[-1], found[0])


@pytest.mark.parametrize("name", ["mixtral", "t5", "albert", "gpt2"])
def test_models_of_any_kind_and_units_of_any_size(tmp_path: Path, name: str):
    row, found = ROWS[name], []
    more: list[dict[str, Any]] = [{}, {"unit": "linear", **TIERS[1]}, TIERS[5]]
    for number, tier in enumerate(more):
        block = {"trainable": scales(), "wire": "int4:64", "probes": 2, **tier}
        given = one_by_one(name) if name == "mixtral" else row.build()
        with closing(stepper_of(given, DTYPE, tmp_path / f"{number}", **block)) as it:
            assert bool(it.weights.map.divided) == (name == "mixtral" and number == 1)
            found.append(trained(it, row.inputs(5)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize(("unit", "inside"), [("block", 9), ("sublayer", 6), ("linear", 6)])
@pytest.mark.parametrize("budget", [None, 10**9])
def test_a_matrix_that_travels_with_no_unit_does_not_move(
    unit: str, inside: int, budget: int | None
):
    block: dict[str, Any] = {"device_budget": budget} if budget else {"unit": unit}
    with closing(stepper(Owners(), **block)) as it:
        assert len(it.trainable.moving.overlays) == (6 if budget else inside)
        begun = masters(it)
        it.train_step([torch.ones(2, 8)], LR)
        moved = [k for k, v in masters(it).items() if not torch.equal(v, begun[k])]
    assert moved == [each.name for each in it.trainable.moving.overlays]


def test_no_scale_is_ever_below_zero():
    with closing(stepper(model(), clip="none")) as it:
        for _ in range(4):
            it.train_step([BATCH], 1e-2)
        moved = [value for name, value in masters(it).items() if name.endswith(".scales")]
    everything = torch.cat(moved)
    assert float(everything.min()) == 0.0
    assert float((everything == 0.0).float().mean()) < 0.9


def test_a_projected_gradient_is_clipped_where_it_is_too_large():
    def steps(clip: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
        with closing(stepper(model(), clip=clip)) as it:
            found = [it.train_step([BATCH], 0.0) for _ in range(4)]
            recorded = [probe.projected_grad for r in it.journal.records for probe in r.probes]
            assert recorded == [g for result in found for g in result.projected_grads]
            return found, masters(it)

    free, _ = steps("none")
    sizes = sorted(abs(r.measured_grads[0]) for r in free)
    limit = (sizes[1] + sizes[2]) / 2
    held, _ = steps(limit)
    assert all(r.projected_grads == r.measured_grads for r in free)
    assert [r.measured_grads for r in held] == [r.measured_grads for r in free]
    for result in held:
        (grad,), (measured,) = result.projected_grads, result.measured_grads
        assert grad == (measured if abs(measured) < limit else limit * (1 if measured > 0 else -1))


def test_the_limit_is_the_papers_unless_it_is_said():
    for clip, limit in ((None, 100.0), (7, 7.0), ("none", None)):
        with closing(stepper(model(), clip=clip)) as it:
            assert it.bit_header()["clip"] == limit


def test_nothing_is_written_and_half_a_byte_a_parameter_moves(tmp_path: Path):
    block = {"trainable": scales(), "wire": "int4", "offload": {"device": "nvme"}}
    with closing(stepper_of(Wide().bfloat16(), DTYPE, tmp_path, **block)) as it:
        weights = it.weights
        assert weights.pipeline is not None
        for _ in range(4):
            wide_step(it)
        before, written = weights.pipeline.bytes_moved, written_by(it)
        for _ in range(STEPS):
            wide_step(it)
        weights.forget_fetched()
        matrices = sum(p.numel() for p in it.model.parameters())
        moved = (weights.pipeline.bytes_moved - before) / STEPS / matrices
        assert 0.4 <= moved <= 0.55
        assert written_by(it) == written


def test_a_base_that_is_written_over_is_not_decoded_before(monkeypatch: pytest.MonkeyPatch):
    calls: list[bool] = []
    real = ops.unpack

    def spy(*args: Any) -> None:
        calls.append(args[-1] is not None)
        real(*args)

    with closing(stepper(Wide())) as it:
        monkeypatch.setattr(ops, "unpack", spy)
        it.train_step([torch.ones(1, 256)], LR)
    assert calls == [True] * 2 * 5  # both signs of every block


def test_it_exports_a_plain_model(tmp_path: Path):
    with closing(stepper(model())) as it:
        for _ in range(2):
            it.train_step([BATCH], LR)
        it.trainable.save(it.model, it.weights, tmp_path / "model")
        expected = it.evaluate(BATCH)
        values = {name: it.weights.value(name) for name in it.weights.map.overlays}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in loaded.named_parameters():
        if name in values:
            assert torch.equal(parameter.data, values[name]), name
    with closing(Stepper(loaded, ZOConfig())) as it:
        assert it.evaluate(BATCH) == expected


def test_scales_are_found_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    assert PART % 128 == 0
    values, layout = torch.randn(40, 77), layout_of("int4:64")
    whole = initial_scales(values, layout, DTYPE)
    monkeypatch.setattr("zo_offload.trainable.scales.PART", 256)
    assert torch.equal(initial_scales(values.t().t(), layout, DTYPE), whole)
    assert len(whole) == 2 * -(-40 * 77 // 128)


def test_what_cannot_be_is_refused_before_the_model_is_touched():
    with pytest.raises(ConfigError, match='wire: mode "scales" moves the group scales'):
        stepper(model(), wire="nf4")
    given = model()
    with pytest.raises(ConfigError, match="none of the model's matrices in units is chosen"):
        stepper(given, trainable=scales(parameters=["lm_head*"]))
    with torch.device("meta"), pytest.raises(ModelError, match="has no values"):
        stepper(model())
    assert all(parameter.requires_grad for parameter in given.parameters())
