"""``head_chunk``: losses to rounding, rows to the bit, less memory; and whoever reads it whole."""

import logging
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.perturbed import moved_along, rounded
from models.table import DTYPES, ROWS, Plain, tokens, vectors
from models.test_shapes import ROWS_OF_TABLE, TABLE_BYTES, Language
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import ConfigError, ModelError, StoreError
from zo_offload.objective import Objective
from zo_offload.ops import Draw
from zo_offload.step import Stepper

STREAMED = OffloadConfig(device="cpu")
HEADLESS = ("plain", "roberta-classifier", "vit", "clip", "swin")
HALVES = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
CHUNK = 40  # rows of 96: two parts and a shorter one
LOGGER = "zo_offload.chunked_head"


def stepper_of(model: nn.Module, chunk: int | None, **settings: Any) -> Stepper:
    options = {"offload_param": STREAMED, "probes": 2, **settings}
    dtype, objective = options.pop("dtype", None), options.pop("objective", Objective())
    config = ZOConfig(head_chunk=chunk, **options)
    return Stepper(model, config, dtype=dtype, objective=objective)


def steps(
    model: nn.Module, chunk: int | None, batches: list[Any], count: int = 3, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Lane losses of some steps, the masters after them, and the peak, which was planned."""
    with closing(stepper_of(model, chunk, **settings)) as stepper:
        stepper.weights.poison = True
        planned = stepper.plan.device_bytes
        results = [stepper.train_step(batches, lr=1e-4) for _ in range(count)]
        peak = stepper.weights.arena.peak_bytes
        assert peak <= planned == stepper.plan.device_bytes
        losses = [loss for result in results for loss in result.lane_losses]
        return losses, dict(stepper.weights.masters()), peak


@pytest.mark.sampled(11)
@HALVES
@pytest.mark.parametrize("name", [name for name in ROWS if name not in HEADLESS])
def test_every_model_with_a_head(name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    row = ROWS[name]
    batches = [row.inputs(6, dtype), row.inputs(4, dtype)]
    count = 3 if dtype == torch.float32 else 1  # then a last bit rounds a weight the other way
    whole, masters, most = steps(row.build(), None, batches, count, dtype=dtype)
    losses, chunked, peak = steps(row.build(), CHUNK, batches, count, dtype=dtype)
    assert losses[:4] == pytest.approx(whole[:4], rel=2e-6)
    assert losses == pytest.approx(whole, rel=1e-5)
    assert peak < most
    assert [record for record in caplog.records if record.name == LOGGER] == []
    for key, master in masters.items():
        torch.testing.assert_close(chunked[key], master, rtol=0, atol=1e-5, msg=key)


class Named(Language):
    """Says which table is its embedding, so that its plan is exact."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


@HALVES
@TIED
def test_equal_bits_streamed_resident_and_again(tied: bool, dtype: torch.dtype):
    batches = [{"input_ids": tokens(length)} for length in (4, 7)]
    torch.manual_seed(0)
    state = Language(tied).state_dict()

    def run(device: Any) -> tuple[list[float], dict[str, torch.Tensor], int]:
        model = Language(tied)
        model.load_state_dict(state)
        return steps(
            model, 500, batches, 2, dtype=dtype, offload_param=OffloadConfig(device=device)
        )

    first, again, resident = run("cpu"), run("cpu"), run("none")
    assert first[0] == again[0] == resident[0]
    for _, masters, _ in (again, resident):
        assert [n for n, value in first[1].items() if not value.equal(masters[n])] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 20])  # of which rows begin anywhere in a noise block
@pytest.mark.parametrize("chunk", [1, 33, 96, 500])
def test_rows_are_those_of_a_whole_copy(chunk: int, width: int, dtype: torch.dtype):
    model, draw = Language(tied=False, width=width, rows=96), Draw(3, 5, 1, 1e-2)
    (index,) = (i for i, (n, _) in enumerate(model.named_parameters()) if n == "head.weight")
    weight = rounded(model.head.weight.detach(), dtype)
    with closing(stepper_of(model, chunk, dtype=dtype)) as stepper:
        stepper.weights.begin_visit()
        copies = stepper.lanes.copies
        assert copies.chunks is not None
        assert copies.chunks.chunk == min(chunk, 96)
        for draw_or_none in (draw, None):
            whole = copies.value(copies.head, draw_or_none, 0)
            assert whole.equal(moved_along(weight, index, draw) if draw_or_none else weight)
            for first in range(0, 96, chunk):
                last = min(first + chunk, 96)
                part = copies.chunks.part(first, last, draw_or_none)
                assert part.equal(whole[first:last]), first
                rows = copies.rows(copies.head, torch.arange(first, last), draw_or_none)
                assert rows.equal(part)
        stepper.weights.finish_visit()


@TIED
def test_a_chunked_head_has_no_whole_copy(tied: bool):
    with closing(stepper_of(Named(tied), 100)) as stepper:
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)
        held = stepper.weights.arena.held
        assert held["ambient copies"] == 100 * 32 * 4
        assert stepper.weights.arena.peak_bytes == stepper.plan.device_bytes


@TIED
def test_a_tied_table_is_gathered_from(tied: bool):
    """The losses are those of plain perturbed copies, so the embedding saw them too."""
    batch = {"input_ids": tokens(7)}
    torch.manual_seed(0)
    state = Language(tied).state_dict()
    found = []
    for chunk in (None, 512):
        model = Language(tied)
        model.load_state_dict(state)
        with closing(stepper_of(model, chunk, eps=1e-1)) as stepper:
            found.append(stepper.train_step([batch], lr=0.0).lane_losses)
    assert found[1] == pytest.approx(found[0], rel=2e-6)
    assert len({round(loss, 4) for loss in found[0]}) == 4


def test_a_frozen_head_has_no_copy_at_all():
    model = Named(tied=False)
    model.head.requires_grad_(False)
    with closing(stepper_of(model, 100)) as stepper:
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)
        assert stepper.weights.arena.held.get("ambient copies", 0) == 0
        assert stepper.weights.arena.peak_bytes == stepper.plan.device_bytes


class Squaring(Named):
    """Its loss looks at all logits at once."""

    def loss(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, input_ids) + logits.square().mean()


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    return model.logits(**batch)


@HALVES
@TIED
def test_what_reads_all_logits_gets_the_same_bits(
    tied: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
):
    objective = Objective(
        forward=logits_of,
        loss=lambda model, batch, logits: F.log_softmax(logits, -1)[..., 0].mean(),
    )
    found = []
    with caplog.at_level(logging.WARNING, LOGGER):
        for chunk in (None, 100):
            torch.manual_seed(0)
            with closing(stepper_of(Language(tied), chunk, dtype=dtype, objective=objective)) as s:
                batches = [{"input_ids": tokens(length)} for length in (4, 7)]
                found.append([s.train_step(batches, lr=1e-2).lane_losses for _ in range(2)])
                assert s.weights.arena.peak_bytes <= s.plan.device_bytes
    assert found[0] == found[1]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"zeroth_order.head_chunk: log_softmax needs logits of all {ROWS_OF_TABLE:,} columns at "
        "once, and a whole copy of the head; cross_entropy, logsumexp and gather over the "
        "vocabulary need neither"
    )


def test_a_whole_copy_is_planned_once_it_was_made_and_kept_within_a_budget():
    batch = {"input_ids": tokens(4)}
    torch.manual_seed(0)
    with closing(stepper_of(Squaring(tied=False), 100)) as stepper:
        before = stepper.plan
        stepper.train_step([batch], lr=1e-3)
        assert stepper.plan.ambient_copies == before.ambient_copies + TABLE_BYTES
        assert stepper.weights.arena.peak_bytes <= stepper.plan.device_bytes
    budget = before.device_bytes
    with (
        closing(stepper_of(Squaring(tied=False), 100, device_budget=budget)) as stepper,
        pytest.raises(StoreError, match="device_budget: ambient copies needs"),
    ):
        stepper.train_step([batch], lr=1e-3)


class Reusing(Language):
    """Overwrites the hidden states after the head has seen them."""

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.hidden(input_ids)
        logits = self.head(x)
        x.zero_()
        return logits


def test_hidden_states_may_be_overwritten_after_the_head():
    def losses(model: type[Language], chunk: int | None) -> tuple[float, ...]:
        torch.manual_seed(0)
        with closing(stepper_of(model(tied=False), chunk)) as stepper:
            return stepper.train_step([{"input_ids": tokens(4)}], lr=0.0).lane_losses

    assert losses(Reusing, 100) == losses(Language, None)


def test_autocast_rounds_no_logits():
    row = ROWS["llama"]
    found = []
    for chunk in (None, CHUNK):
        with (
            torch.autocast("cpu", torch.bfloat16),
            closing(stepper_of(row.build(), chunk)) as stepper,
        ):
            found.append(stepper.train_step([row.inputs(6)], lr=0.0).lane_losses)
    assert found[1] == pytest.approx(found[0], rel=2e-6)


def test_what_leaves_a_lane():
    """Whole logits from evaluation, and from training where there is no loss; else none."""
    row = ROWS["llama"]
    batch = row.inputs(5)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    outputs = []
    for chunk in (None, CHUNK):
        with closing(stepper_of(row.build(), chunk)) as stepper:
            seen = stepper.forward(batch)
            trained = stepper.run_lanes([inputs], stepper.draws())
            evaluated = stepper.evaluate(batch)
            (_, with_loss), *_ = stepper.run_lanes([batch], stepper.draws())
            model: Any = stepper.model
            generated = stepper.run_model(
                lambda m=model: m.generate(batch["input_ids"][:1], max_new_tokens=3)
            )
        outputs.append((seen, [each.logits for _, each in trained], evaluated, generated))
    assert type(outputs[1][0].logits) is torch.Tensor
    assert outputs[1][0].logits.equal(outputs[0][0].logits)
    assert all(a.equal(b) for a, b in zip(outputs[0][1], outputs[1][1], strict=True))
    assert outputs[1][2] == pytest.approx(outputs[0][2], rel=1e-6)
    assert outputs[1][3].equal(outputs[0][3])
    assert with_loss.logits.shape == (2, 5, 96)
    with pytest.raises(ModelError, match="take the labels out of the batch"):
        with_loss.logits.argmax(-1)


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_that_names_no_head_is_refused(name: str):
    model = ROWS[name].build()
    message = (
        rf"zeroth_order.head_chunk: 8 rows .* {type(model).__name__} names no output embedding"
    )
    with pytest.raises(ConfigError, match=message):
        Stepper(model, ZOConfig(head_chunk=8))
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_a_head_inside_a_unit_is_refused():
    class Inside(Plain):
        def get_output_embeddings(self) -> Any:
            return self.blocks[0].get_submodule("linear")

    with pytest.raises(ConfigError, match="Inside names no output embedding outside its units"):
        Stepper(Inside(), ZOConfig(head_chunk=8))
    with closing(Stepper(Inside(), ZOConfig())) as stepper:
        stepper.train_step([vectors(2)], lr=0.0)
