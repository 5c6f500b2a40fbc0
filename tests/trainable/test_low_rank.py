"""Matrices move by small factors: what the forward sees, what a merge does, what is refused."""

import math
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.table import ROWS, Row
from parity.test_experts import one_by_one
from parity.test_frozen import TIERS
from parity.test_parity import loss_of
from torch import nn
from transformers import AutoModelForCausalLM

from trainable.low_rank_loop import BASIS, sums
from trainable.modes import BATCH, LR, differing, masters, model
from trainable.test_sparse import assert_same, trained, written_by
from zo_offload.config import ZOConfig, parse_config
from zo_offload.errors import ConfigError, ModelError
from zo_offload.journal import Journal
from zo_offload.ops import Draw, StepUpdate, kernels, rank_sums, reference
from zo_offload.ops.span import Segment, Span
from zo_offload.step import Stepper
from zo_offload.trainable.moving import LowRank
from zo_offload.update import in_factor
from zo_offload.weights import Weights

INTERVAL = 3


def stepper_of(
    net: nn.Module | None = None, dtype: torch.dtype | None = None, **more: Any
) -> Stepper:
    trainable = {"mode": "low_rank", "interval": INTERVAL, **more.pop("trainable", {})}
    config = ZOConfig.model_validate({"eps": 1e-2, "trainable": trainable, **more})
    return Stepper(model() if net is None else net, config, dtype=dtype)


def along(stepper: Stepper, net: nn.Module, draw: Draw) -> nn.Module:
    """A plain model at the stepper's current weights, perturbed whole."""
    low_rank = stepper.weights.map.low_rank
    assert low_rank is not None
    values = dict(stepper.weights.masters())
    signs = reference.DIRECTIONS["rademacher"]
    interval = draw.step // low_rank.interval
    for i, (name, p) in enumerate(net.named_parameters()):
        sides, c = low_rank.sides(p.shape), draw.coefficient
        if not p.requires_grad:
            z = np.zeros(p.shape, np.float32)
        elif sides is None:
            z = signs(draw.seed, draw.step, draw.probe, i, 0, p.numel(), c)
        else:
            rows, columns = sides
            rank, at = low_rank.rank, (draw.step, draw.probe)
            u = signs(draw.seed, *at, i, 0, rows * rank, c / math.sqrt(rank))
            v = signs(draw.seed, interval, BASIS, i, 0, columns * rank, 1.0)
            z = u.reshape(rows, rank) @ v.reshape(columns, rank).T
        p.data = values[name] + torch.from_numpy(z).view(p.shape)
    return net


@torch.no_grad()
def loss_at(row: Row, stepper: Stepper, draw: Draw) -> float:
    return float(loss_of(along(stepper, row.build(), draw), row.inputs(5)))


@pytest.mark.parametrize(
    "name",
    ["gpt2", "opt", "mixtral", "qwen3-moe", "t5", "bart", "mamba", "whisper", "deberta", "vit"],
)
def test_the_forward_sees_the_matrix_and_its_factors(name: str):
    """Products, gathered rows, tied heads, experts, convolutions, and what is read whole."""
    row = ROWS[name]
    with closing(stepper_of(row.build(), offload_param={"device": "cpu"})) as stepper:
        for _ in range(INTERVAL + 2):
            stepper.train_step([row.inputs(5)], 1e-3)
        draws = stepper.draws()
        points = [loss_at(row, stepper, draw) for *_, draw in draws]
        found = stepper.train_step([row.inputs(5)], 0.0).lane_losses
        assert found == pytest.approx(points, abs=2e-5, rel=2e-5)
        now = loss_at(row, stepper, Draw(0, stepper.step, 0, 0.0))
        total, weight = stepper.evaluate(row.inputs(5))
        assert total / weight == pytest.approx(now, abs=2e-5, rel=2e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["mixtral", "t5", "albert", "gpt2", "qwen3"])
def test_units_of_any_size_on_any_tier_change_no_bit(name: str, tmp_path: Path):
    row, found = ROWS[name], []
    for number, tier in enumerate([{}, {"unit": "sublayer", **TIERS[1]}, TIERS[5]]):
        block: dict[str, Any] = {"probes": 2, "wire": "int8", **tier}
        offload = dict(block.pop("offload", {"device": "none"}))
        if offload["device"] == "nvme":
            offload["nvme_path"] = str(tmp_path / f"{number}")
        it = stepper_of(row.build(), torch.bfloat16, offload_param=offload, **block)
        with closing(it) as stepper:
            found.append(trained(stepper, row.inputs(5, torch.bfloat16), steps=INTERVAL + 1))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_is_numpys_to_the_bit(dtype: torch.dtype, direction: Any):
    """Of more rows than are merged at once; decay is of the interval, before the merge."""
    rows, columns, rank = 1200, 260, 3
    segment = Segment("w", 5, (rows, columns), 0, scale=0.75)
    span = Span(dtype, (segment,), 0, 0)
    layout = rank_sums.lay_out_factors([segment], {"w": (rows, columns)}, rank)
    draws = [Draw(9, step, probe, 1e-3 * (step - 1.5)) for step in range(3) for probe in range(2)]
    left = rank_sums.gathered(layout, direction, draws)
    right = rank_sums.basis(layout, direction, 9, 4)
    noise, total = reference.DIRECTIONS[direction], np.zeros(rows * rank, np.float32)
    for draw in draws:
        c = draw.coefficient * (0.75 * (1 / math.sqrt(rank)))
        total += noise(9, draw.step, draw.probe, 5, 0, rows * rank, c)
    v = noise(9, 4, BASIS, 5, 0, columns * rank, 1.0).reshape(columns, rank)
    assert np.array_equal(layout.lefts(left, "w").numpy(), -total.reshape(rows, rank))
    assert np.array_equal(layout.rights(right, "w").numpy(), v)
    given = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    wire = torch.zeros(span.elements, dtype=dtype)
    rest = span.rest(torch.zeros(span.rest_bytes, dtype=torch.uint8))
    part = slice(segment.numel)
    kernels.store_master(span, given.view(-1), wire[part], rest[part] if len(rest) else rest)
    arguments = layout.lefts(left, "w"), layout.rights(right, "w")
    rank_sums.merge(span, segment, wire, rest, *arguments)
    expected = (given + sums(-total.reshape(rows, rank), v)).view(-1)
    found = kernels.torch_ops.load_master(span, wire[part], rest[part] if len(rest) else rest)
    assert torch.equal(found, expected)


def test_decay_is_applied_when_matrices_are_merged():
    with closing(stepper_of(offload_param={"device": "cpu"})) as stepper:
        before, name = masters(stepper), "model.layers.1.mlp.up_proj.weight"
        stepper.train_step([BATCH], 1e-3, weight_decay=100.0)
        factor, undecayed = stepper.journal.records[0].decay, masters(stepper)[name]
        assert factor < 1.0
        for _ in range(INTERVAL - 1):
            stepper.train_step([BATCH], 0.0)
        merged = masters(stepper)[name]
        step_taken = undecayed - before[name]
        decayed = (before[name].double() * factor).float()
    assert (merged - (decayed + step_taken)).abs().max() < 1e-6
    assert (undecayed - decayed).abs().max() > 1e-3


def test_momentum_is_that_of_a_naive_loop():
    """M in the small factor, from 0 in every interval."""
    generator = torch.Generator().manual_seed(3)
    b, rates = 0.8, [0.1, 0.3, 0.0, 0.2, 0.05]
    grads = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    us = torch.randn(5, 2, 7, 3, generator=generator, dtype=torch.float64)
    moment, expected = torch.zeros(7, 3).double(), torch.zeros(7, 3).double()
    for lr, g, u in zip(rates, grads, us, strict=True):
        moment = b * moment + (1 - b) * (g[0] * u[0] + g[1] * u[1]) / 2
        expected += lr * moment
    steps = [
        StepUpdate(
            1.0,
            tuple(Draw(0, t, k, lr * float(g[k]) / 2) for k in range(2)),
            0,
            t,
            lr,
            tuple(float(each) / 2 for each in g),
        )
        for t, (lr, g) in enumerate(zip(rates, grads, strict=True))
    ]
    found = sum(d.coefficient * us[d.step, d.probe] for d in in_factor(steps, b))
    assert torch.allclose(torch.as_tensor(found), expected, rtol=1e-12)


def test_a_base_is_written_once_an_interval_and_read_once_a_visit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "units")}
    loaded, counts, look = [], [], Weights._look

    def spy(self: Weights, span: Span, source: torch.Tensor) -> None:
        loaded.append(span)
        look(self, span, source)

    monkeypatch.setattr(Weights, "_look", spy)
    with closing(stepper_of(offload_param=offload, probes=3)) as stepper:
        for _ in range(2 * INTERVAL + 1):
            loaded.clear()
            stepper.train_step([BATCH], LR)
            assert len(loaded) == len(stepper.weights.map.units)  # six draws share each
            counts.append(written_by(stepper))
    written = [b - a for a, b in pairwise(counts)]
    assert [each > 0 for each in written] == [False, False, True, False, False, True]


def test_it_exports_a_plain_model_and_gives_back_the_weights(tmp_path: Path):
    net = model()
    with closing(stepper_of(net, offload_param={"device": "cpu"})) as stepper:
        for _ in range(INTERVAL + 2):
            stepper.train_step([BATCH], LR)
        total, weight = stepper.evaluate(BATCH)
        stepper.trainable.save(stepper.model, stepper.weights, tmp_path / "model")
        expected = masters(stepper)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert float(loaded(**BATCH).loss) == pytest.approx(total / weight, rel=1e-6)
    for it in (loaded, net):
        assert differing(expected, {k: p.data for k, p in it.named_parameters()}) == []


def test_weights_may_begin_anew_amid_an_interval():
    """As where a checkpoint of another run is a beginning."""
    with closing(stepper_of(offload_param={"device": "cpu"})) as stepper:
        for _ in range(INTERVAL + 2):
            stepper.train_step([BATCH], LR)
        expected, loss = masters(stepper), stepper.evaluate(BATCH)
        stepper.weights.rebase(stepper.weights.history)
        stepper.follow(Journal.memory({}))
        assert differing(expected, masters(stepper)) == []
        assert stepper.evaluate(BATCH) == pytest.approx(loss, rel=1e-6)
        stepper.train_step([BATCH], LR)
        assert differing(expected, masters(stepper)) == list(expected)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_head_in_chunks_is_perturbed_alike(name: str):
    def run(**more: Any) -> tuple[list[Any], float]:
        with closing(stepper_of(ROWS[name].build(), **more)) as stepper:
            losses = [stepper.train_step([BATCH], 1e-3).lane_losses for _ in range(INTERVAL + 2)]
            assert stepper.weights.arena.peak_bytes == stepper.plan.device_bytes
            total, weight = stepper.evaluate(BATCH)
            return losses, total / weight

    (whole, now), (chunked, then) = run(), run(head_chunk=40)
    assert torch.allclose(torch.tensor(whole), torch.tensor(chunked), rtol=1e-5)
    assert now == pytest.approx(then, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((9, 7), (9, 7)), ((2, 9), None), ((50,), None), ((), None),
        ((8, 6, 32), (48, 32)), ((16, 3, 4, 4), (16, 48)), ((64, 1, 4), (64, 4)),
    ],
)  # fmt: skip
def test_sides(shape: tuple[int, ...], sides: Any):
    assert LowRank(rank=2, interval=1).sides(shape) == sides


def compiled(net: nn.Module) -> nn.Module:
    mlp: Any = net.get_submodule("model.layers.1.mlp")
    mlp._compiled_call_impl = mlp._call_impl  # as compile() leaves it
    return net


@pytest.mark.parametrize(
    ("make", "block", "message"),
    [
        (lambda: compiled(model()), {}, "model.layers.1.mlp is compiled, and low-rank"),
        (lambda: one_by_one("mixtral"), {"unit": "linear"}, 'together: "unit": "sublayer"'),
    ],
)
def test_what_cannot_move_so_is_refused(make: Callable[[], nn.Module], block: dict, message: str):
    net = make()
    with pytest.raises(ModelError, match=message):
        stepper_of(net, **block)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"trainable": {"rank": 0}}, "trainable.rank: expected at least 1, found 0"),
        ({"trainable": {"rank": 65}}, "trainable.rank: expected at most 64, found 65"),
        ({"trainable": {"interval": 0}}, "trainable.interval: expected at least 1, found 0"),
        ({"trainable": {"momentum": 1.0}}, "trainable.momentum: expected less than 1.0, found 1.0"),
        ({"trainable": {"rotate": {}}}, 'trainable.rotate: is of "mode": "full", found "low_rank"'),
        ({"trainable": {"mask": "x"}}, 'trainable.mask: is of "mode": "sparse"'),
        ({"trainable": {"mode": "full", "rank": 2}}, 'rank: is of "mode": "low_rank"'),
        ({"trainable": {"mode": "peft", "layers": [0]}}, 'is of "mode": "full" or "low_rank"'),
        ({"update": {"lag": 2}}, "update.lag: .* every trainable.interval steps"),
        ({"master": "bf16_sr"}, 'zeroth_order.master: "mode": "low_rank" merges'),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(block: dict, message: str):
    trainable = {"mode": "low_rank", **block.get("trainable", {})}
    with pytest.raises(ConfigError, match=message):
        parse_config({"zeroth_order": {**block, "trainable": trainable}})
