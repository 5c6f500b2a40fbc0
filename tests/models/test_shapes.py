"""Small modules for what models do with their parts: share, tie, repeat, freeze, skip."""

import copy
import threading
from contextlib import closing
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.perturbed import assert_equals_plain_forwards, perturbed, plain_loss
from models.table import DTYPES, ROWS, Block, Plain, tokens, vectors
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import StoreError
from zo_offload.objective import Objective
from zo_offload.offload import planner
from zo_offload.step import Stepper
from zo_offload.window import Means

STREAMED = ZOConfig(offload_param=OffloadConfig(device="cpu"))
ROWS_OF_TABLE = 1200  # with 32 columns above the size of which every lane keeps a copy

at_all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def vectors_in(dtype: torch.dtype, count: int = 3) -> dict[str, torch.Tensor]:
    batch = vectors(count)
    return {**batch, "x": batch["x"].to(dtype)}


class Language(nn.Module):
    """Predicts tokens through a table too large for a copy in every lane."""

    def __init__(self, tied: bool, width: int = 32, rows: int = ROWS_OF_TABLE) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(input_ids))

    def loss(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), input_ids.flatten())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.loss(self.logits(input_ids), input_ids)


@at_all_dtypes
@pytest.mark.parametrize("tied", [True, False])
def test_large_tables(tied: bool, dtype: torch.dtype):
    batches = [{"input_ids": tokens(length)} for length in (4, 7)]
    assert_equals_plain_forwards(Language(tied), batches, dtype, probes=2)


class Viewing(Language):
    """Takes a view of the large table long before it is read."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        head = self.head.weight.t()
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((x @ head).float().flatten(0, 1), input_ids.flatten())


@at_all_dtypes
def test_a_view_of_a_large_table_stays_what_it_was(dtype: torch.dtype):
    assert_equals_plain_forwards(Viewing(True), [{"input_ids": tokens(4)}], dtype, probes=2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_table_has_at_most_one_copy(tied: bool):
    config = ZOConfig(probes=3, offload_param=STREAMED.offload_param)
    with closing(Stepper(Language(tied), config)) as stepper:
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)
        held = stepper.weights.arena.held
    table = ROWS_OF_TABLE * 32 * 4
    assert held["ambient"] == (table if tied else 2 * table)
    assert held["ambient copies"] == table  # of the head; rows are perturbed as gathered


class ReadWhole(Language):
    """Names its table as its input embedding, and a head of its own, but reads the table whole."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + self.embed.weight.square().mean()


TABLE_BYTES = ROWS_OF_TABLE * 32 * 4


def test_the_plan_counts_a_table_once_it_is_read_whole():
    with closing(Stepper(ReadWhole(tied=False), STREAMED)) as stepper:
        before = stepper.plan
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)
        assert stepper.plan.ambient_copies == before.ambient_copies + TABLE_BYTES
        assert stepper.weights.arena.peak_bytes <= stepper.plan.device_bytes


def test_a_copy_that_was_not_planned_never_exceeds_a_budget():
    offload = STREAMED.offload_param
    with closing(Stepper(ReadWhole(tied=False), STREAMED)) as stepper:
        budget = stepper.plan.device_bytes
    config = ZOConfig(offload_param=offload, device_budget=budget)
    with (
        closing(Stepper(ReadWhole(tied=False), config)) as stepper,
        pytest.raises(StoreError, match="device_budget: ambient copies needs"),
    ):
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)


class TiedInCode(nn.Module):
    """Its head is a line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS_OF_TABLE, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(x, self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), input_ids.flatten())


def test_a_head_that_is_tied_in_code_is_planned():
    with closing(Stepper(TiedInCode(), STREAMED)) as stepper:
        planned = stepper.plan.device_bytes
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)
        assert stepper.weights.arena.peak_bytes == planned
    assert_equals_plain_forwards(TiedInCode(), [{"input_ids": tokens(4)}])


class Special(nn.Parameter):
    """A parameter of its own class, as quantization and distribution libraries have."""


class Stacking(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Special(torch.randn(8)), Special(torch.randn(8))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.stack([self.one, self.two]).sum(0), labels)


class Mapping(Plain):
    """Reads an ambient parameter, and a view of it, under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = torch.vmap(lambda row: row @ self.square + self.square[0])(x)
        return super().forward(x, labels)


@pytest.mark.parametrize("model", [Stacking, Mapping])
@pytest.mark.parametrize("small_bytes", [planner.SMALL_BYTES, 0])
def test_unusual_reads_of_ambient_parameters(
    model: Any, small_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planner, "SMALL_BYTES", small_bytes)
    assert_equals_plain_forwards(model(), [vectors(3), vectors(2)], poison=False)


def test_a_tied_parameter_is_updated_once():
    model = Language(tied=True)
    with closing(Stepper(model, STREAMED)) as stepper:
        stepper.descend(Means({(0, 1): 1.0, (0, -1): 0.0}), lr=1e-3)
        state = model.state_dict()
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert "head.weight" not in dict(stepper.weights.masters())


class Sharing(Plain):
    """Two blocks that hold one norm."""

    def __init__(self) -> None:
        super().__init__()
        first, second, *_ = self.blocks
        assert isinstance(first, Block)
        assert isinstance(second, Block)
        second.norm = first.norm


@at_all_dtypes
def test_a_module_shared_by_two_units_is_ambient(dtype: torch.dtype):
    assert_equals_plain_forwards(Sharing(), [vectors_in(dtype)], dtype)
    with closing(Stepper(Sharing(), STREAMED)) as stepper:
        ambient = {segment.name for _, segment in stepper.weights.map.ambient.segments}
    assert {"blocks.0.norm.weight", "blocks.0.norm.bias"} < ambient


class Repeating(Plain):
    """One block at three places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()] * 3)


@at_all_dtypes
def test_a_block_at_several_places_is_one_unit(dtype: torch.dtype):
    assert_equals_plain_forwards(Repeating(), [vectors_in(dtype)], dtype)


def test_a_block_at_several_places_moves_once_a_visit():
    with closing(Stepper(Repeating(), STREAMED)) as stepper:
        stepper.train_step([vectors(2), vectors(3)], lr=1e-3)
        (unit,) = stepper.weights.map.units
        pipeline = stepper.weights.pipeline
        assert pipeline is not None
        assert pipeline.bytes_moved == unit.wire_bytes


class Buffered(Block):
    """A block that reads buffers, one of which no checkpoint holds."""

    gain: torch.Tensor
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.linspace(0.5, 1.5, 32))
        self.register_buffer("shift", torch.linspace(-1, 1, 32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.gain) + self.shift.to(x.dtype)


@at_all_dtypes
def test_buffers_in_blocks(dtype: torch.dtype):
    model = Plain()
    model.blocks = nn.ModuleList(Buffered() for _ in range(3))
    assert_equals_plain_forwards(model, [vectors_in(dtype)], dtype)


def frozen() -> Plain:
    model = Plain()
    for name in ("enter.weight", "blocks.0.linear.weight", "blocks.1.norm.bias"):
        model.get_parameter(name).requires_grad_(False)
    return model


@at_all_dtypes
def test_frozen_parameters_are_not_perturbed(dtype: torch.dtype):
    assert_equals_plain_forwards(frozen(), [vectors_in(dtype)], dtype)


def test_frozen_parameters_are_rounded_as_trainable_ones():
    """Exactly between two bfloat16 values: away from zero, where torch goes to even."""
    model = frozen()
    between = torch.tensor(1.0 + 2.0**-8)
    for parameter in model.parameters():
        parameter.data.fill_(between)
    with closing(Stepper(model, STREAMED, dtype=torch.bfloat16)) as stepper:
        values = {float(v) for p in stepper.model.state_dict().values() for v in p.flatten()}
    assert values == {1.0 + 2.0**-7} != {float(between.bfloat16())}


def test_frozen_parameters_stay():
    model = frozen()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with closing(Stepper(model, STREAMED)) as stepper:
        stepper.train_step([vectors(3)], lr=1e-2)
        after = dict(stepper.weights.masters())
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert stayed == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_frozen_block_has_no_master_beside_the_wire():
    model = Plain()
    model.blocks.requires_grad_(False)
    with closing(Stepper(model, STREAMED, dtype=torch.bfloat16)) as stepper:
        assert [unit.rest_bytes for unit in stepper.weights.map.units] == [0, 0, 0]


class Skipping(Plain):
    """Leaves early, or skips a block, as the number of examples says."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for position, block in enumerate(self.blocks):
            if len(labels) % 4 != position:
                x = block(x)
        return F.cross_entropy(self.leave(x).float(), labels)


def test_lanes_at_different_units():
    assert_equals_plain_forwards(Skipping(), [vectors(n) for n in (3, 4, 5, 6)], probes=2)


def test_more_lanes_than_may_live_at_once():
    batches = [vectors(n) for n in (2, 3, 4)]
    with closing(Stepper(Plain(), ZOConfig(probes=3))) as stepper:
        together = stepper.measure(batches, stepper.draws())
        stepper.lanes._max_live = 4
        assert stepper.measure(batches, stepper.draws()) == together


class Failing(Plain):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x, labels)
        if len(labels) == 7:
            raise ArithmeticError("seven")
        return loss


def test_a_failing_lane_ends_the_step_as_itself():
    with closing(Stepper(Failing(), STREAMED)) as stepper:
        expected = stepper.measure([vectors(3)], stepper.draws())
        with pytest.raises(ArithmeticError, match=r"^seven$"):
            stepper.train_step([vectors(3), vectors(7)], lr=1e-2)
        assert stepper.step == 0
        assert stepper.measure([vectors(3)], stepper.draws()) == expected


class Measuring(Plain):
    """Asks for shapes and dtypes of a unit's parameters outside of it."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight: Any = self.blocks[0].get_parameter("linear.weight")
        assert weight.shape == (weight.size(0), weight.numel() // len(weight))
        return super().forward(x.to(weight.dtype).to(weight.device), labels)


def test_metadata_of_units_may_be_read_anywhere():
    assert_equals_plain_forwards(Measuring(), [vectors(3)])


class Casting(Language):
    """Asks the large table for its dtype, as models do to cast their inputs."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert self.embed.weight.dtype.is_floating_point
        assert self.embed.weight.shape[0] == self.embed.weight.size(0) == ROWS_OF_TABLE
        return self.embed(input_ids).float().mean()


def test_metadata_of_ambient_parameters_builds_no_copy():
    with closing(Stepper(Casting(tied=False), STREAMED)) as stepper:
        stepper.train_step([{"input_ids": tokens(4)}], lr=1e-3)
        assert "ambient copies" not in stepper.weights.arena.held


def test_the_state_of_a_part_is_never_stale():
    model = Plain()
    with closing(Stepper(model, STREAMED)) as stepper:
        part = model.blocks.state_dict()
        stepper.descend(Means({(0, 1): 1.0, (0, -1): 0.0}), lr=1e-3)
        whole = model.state_dict()
        assert not torch.equal(part["0.linear.weight"], whole["blocks.0.linear.weight"])
        assert torch.equal(
            model.blocks.state_dict()["0.linear.weight"], whole["blocks.0.linear.weight"]
        )


def test_outside_a_visit_nothing_stale_is_read():
    model = Plain()
    with closing(Stepper(model, STREAMED)) as stepper:
        stepper.train_step([vectors(3)], lr=1e-2)
        assert all(p.isnan().all() for p in model.parameters())
        with pytest.raises(StoreError, match="Block was called outside a visit"):
            model.blocks[0](vectors(3)["x"])
        with pytest.raises(StoreError, match="load_state_dict on Plain"):
            model.load_state_dict({})


def test_the_bare_model_is_served_with_current_weights():
    model = Plain()
    with closing(Stepper(model, STREAMED)) as stepper:
        stepper.train_step([vectors(3)], lr=1e-2)
        with torch.no_grad():
            found = model(**vectors(3))
        assert torch.equal(found, stepper.forward(vectors(3)))
        found *= 2.0  # an ordinary tensor, which a caller may change
    assert "forward" not in vars(model)


def test_generators_are_left_as_they_were():
    with closing(Stepper(Plain(), STREAMED)) as stepper:
        before = torch.get_rng_state()
        stepper.train_step([vectors(3)], lr=1e-2)
        assert torch.equal(torch.get_rng_state(), before)


def test_closing_ends_every_thread():
    before = set(threading.enumerate())
    with closing(Stepper(Plain(), STREAMED)) as stepper:
        stepper.train_step([vectors(2), vectors(3)], lr=1e-2)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before


def test_lanes_run_under_the_callers_autocast_and_context():
    name: ContextVar[str] = ContextVar("name")
    name.set("caller")
    seen = []

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append((name.get(), torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return model(**batch)

    model, batch = Plain(), vectors(4)
    copies = copy.deepcopy(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        closing(Stepper(model, STREAMED, objective=Objective(forward=forward))) as stepper,
    ):
        draws = stepper.draws()
        losses = [total for total, _ in stepper.measure([batch], draws)[0]]
        moved = [perturbed(copies, draw, torch.float32) for _, _, draw in draws]
        assert losses == [plain_loss(plain, batch) for plain in moved]
    assert losses != [plain_loss(plain, batch) for plain in moved]
    assert seen == [("caller", torch.get_num_threads(), True)] * 2


def test_training_lanes_fill_no_cache():
    model: Any = ROWS["llama"].build()
    assert model.config.use_cache
    with closing(Stepper(model, STREAMED)) as stepper:
        results = stepper.run_lanes([ROWS["llama"].inputs(5)], stepper.draws())
    assert [outputs.past_key_values for _, outputs in results] == [None, None]
    assert model.config.use_cache


def test_compiled_blocks_change_nothing():
    def losses(compiled: bool) -> list[tuple[float, ...]]:
        torch.manual_seed(0)
        model = Plain(2)
        for block in model.blocks if compiled else ():
            block.compile(backend="eager")
        with closing(Stepper(model, STREAMED)) as stepper:
            stepper.weights.poison = True
            return [stepper.train_step([vectors(3)], lr=1e-2).lane_losses for _ in range(4)]

    torch._dynamo.reset()  # counts its graphs from here
    torch._dynamo.utils.counters.clear()
    assert losses(compiled=True) == losses(compiled=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
