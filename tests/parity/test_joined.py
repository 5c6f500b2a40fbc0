"""Products that lanes share: computed once, on the rows of one micro-batch, whatever else runs."""

from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from models.table import ROWS, values
from torch import nn
from trainable.modes import MODES

from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError, ModelError
from zo_offload.joined import Meeting
from zo_offload.offload import planner
from zo_offload.step import Stepper

LR = 1e-2
MODEL = "llama"
NVME = {"device": "nvme"}


def stepper_of(mode: str, dtype: torch.dtype | None = None, **block: Any) -> Stepper:
    config = {"eps": 1e-2, "trainable": MODES[mode].trainable, **MODES[mode].block, **block}
    return Stepper(ROWS[MODEL].build(), ZOConfig.model_validate(config), dtype=dtype)


def losses(stepper: Stepper, lengths: tuple[int, ...], steps: int = 3) -> list[Any]:
    batches = [ROWS[MODEL].batch(length) for length in lengths]
    return [stepper.train_step(batches, LR).lane_losses for _ in range(steps)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Lanes and rows of each product that is computed for some."""
    found: list[tuple[int, int]] = []
    real = Meeting._compute

    def spy(meeting: Meeting, product: Any) -> None:
        rows = sum(each.input.shape[:-1].numel() for each in meeting.together)
        found.append((len(meeting.together), rows))
        real(meeting, product)

    monkeypatch.setattr(Meeting, "_compute", spy)
    return found


class Ways(nn.Module):
    """Its lanes go different ways through frozen blocks: by their sign, and by their input."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.between = float(self.enter.weight.detach()[0, 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_straight = self.enter.weight[0, 0] > self.between and x[0, 0] > 0
        x = self.enter(x)
        for index in (0, 1, 2) if is_straight else (0, 2, 1, 2):
            x = torch.tanh(self.blocks[index](x))
        return x.square().mean()


class Queries(nn.Module):
    """Its first block multiplies a parameter, as it is, from outside."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.queries = nn.Parameter(torch.randn(3, 8))
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.queries
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return (hidden @ x.T).square().mean()


class Graded(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return super().forward(input.clone()).detach()


def frozen_but(model: nn.Module, *parameters: str, **block: Any) -> Stepper:
    block = {"eps": 1e-2, "trainable": {"parameters": parameters}, "joined_rows": 1000, **block}
    return Stepper(model, ZOConfig.model_validate(block))


@pytest.mark.parametrize("mode", ["lora", "low-rank"])
def test_they_are_the_products_of_each(mode: str):
    found = []
    for joined in (None, 1000):
        with closing(stepper_of(mode, joined_rows=joined, probes=2)) as stepper:
            found.append(losses(stepper, (6, 3)))
    assert torch.tensor(found[0]).allclose(torch.tensor(found[1]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["lora", "low-rank"])
def test_no_tier_changes_a_bit(mode: str, dtype: torch.dtype, tmp_path: Path):
    found = []
    for number, offload in enumerate(({"device": "none"}, {"device": "cpu"}, NVME)):
        if offload is NVME:
            offload = {**NVME, "nvme_path": str(tmp_path / f"{number}")}
        block = {"offload_param": offload, "joined_rows": 1000, "probes": 2}
        with closing(stepper_of(mode, dtype, **block)) as stepper:
            found.append((losses(stepper, (6, 3)), stepper.weights.digest()))
    assert found[1:] == found[:1] * 2


def test_only_lanes_of_one_micro_batch_are_joined():
    """Else a rank that has fewer would compute other bits."""
    with closing(stepper_of("lora", joined_rows=1000, probes=2)) as stepper:
        batches = [ROWS[MODEL].batch(5), ROWS[MODEL].batch(5)]
        draws = stepper.draws()
        together = stepper.measure(batches, draws)
        apart = [row for batch in batches for row in stepper.measure([batch], draws)]
    assert together == apart


def test_lanes_that_came_other_ways_are_not_joined(monkeypatch: pytest.MonkeyPatch):
    """Whether they meet at all hangs on the micro-batches beside theirs."""
    found: list[tuple[int, int]] = []
    real = Meeting._compute

    def spy(meeting: Meeting, product: Any) -> None:
        micro_batch, *_ = cast(tuple, meeting.key)
        found.append((micro_batch, len(meeting.together)))
        real(meeting, product)

    monkeypatch.setattr(Meeting, "_compute", spy)
    batch, other = ({"x": sign * values(4, 8).abs()} for sign in (1, -1))
    with closing(frozen_but(Ways(), "enter*")) as stepper:
        draws = stepper.draws()
        alone, joined_alone = stepper.measure([batch], draws), sorted(found)
        found.clear()
        beside, joined_beside = stepper.measure([batch, other], draws), sorted(found)
    assert joined_alone == [(0, 1)] * 5 + [(0, 2)]  # three and four blocks, the first together
    assert joined_beside == joined_alone + [(1, 2)] * 4
    assert beside[0] == alone[0]


@pytest.mark.parametrize(("build", "batch"), [
    (ROWS["opt"].build, ROWS["opt"].batch(5)), (Queries, {"x": values(4, 8)}),
])  # fmt: skip
def test_copies_that_lanes_share_are_read_by_the_lane(
    monkeypatch: pytest.MonkeyPatch, build: Any, batch: Any
):
    """Biases and inputs that move have one copy's memory, unless they are small."""
    monkeypatch.setattr(planner, "SMALL_BYTES", 0)
    found = []
    for joined in (None, 1000):
        block = {"eps": 1e-2, "trainable": {"mode": "low_rank"}, "joined_rows": joined}
        with closing(Stepper(build(), ZOConfig.model_validate(block))) as stepper:
            found.append(stepper.train_step([batch], LR).lane_losses)
    assert torch.tensor(found[0]).allclose(torch.tensor(found[1]), rtol=1e-5)


def test_lanes_that_take_gradients_are_not_joined(computed: list[tuple[int, int]]):
    model = Ways()
    model.blocks = nn.ModuleList(Graded(8, 8) for _ in range(3))
    with closing(frozen_but(model, "enter*")) as stepper:
        stepper.train_step([{"x": values(4, 8)}], LR)
    assert computed == []


@pytest.mark.parametrize("compiles", ["block.compile", "torch.compile"])
def test_compiled_blocks_are_refused(compiles: str):
    model = Ways()
    for index, block in enumerate(model.blocks):
        if compiles == "block.compile":
            block.compile(backend="eager")
        else:
            compiled: Any = torch.compile(block, backend="eager")
            model.blocks[index] = compiled
    with pytest.raises(ModelError, match=r"^blocks\.0 is compiled, and lanes cannot stop at its"):
        frozen_but(model, "enter*")
    frozen_but(model, "enter*", joined_rows=None).close()


@pytest.mark.parametrize("probes", [1, 2])
def test_a_product_is_computed_once_for_all(computed: list[tuple[int, int]], probes: int):
    batch = ROWS[MODEL].batch(5)
    rows = batch["input_ids"].numel()
    with closing(stepper_of("lora", joined_rows=rows, probes=probes)) as stepper:
        stepper.train_step([batch, batch], LR)
        matrices = [p for n, p in stepper.model.named_parameters() if "base_layer" in n]
    assert set(computed) == {(2 * probes, 2 * probes * rows)}
    assert len(computed) == 2 * (len(matrices) + 2 * 5)  # of two blocks: five without an adapter


@pytest.mark.parametrize(("mode", "rows"), [("lora", 3), ("full", 1000), ("sparse", 1000)])
def test_larger_inputs_and_other_matrices_are_not(
    computed: list[tuple[int, int]], mode: str, rows: int
):
    with closing(stepper_of(mode, joined_rows=rows)) as stepper:
        stepper.train_step([ROWS[MODEL].batch(5)], LR)
    assert computed == []


def test_lanes_that_are_not_all_alive_are_refused():
    with closing(stepper_of("lora", joined_rows=1000, live_lanes=3)) as stepper:
        losses(stepper, (6,))
        with pytest.raises(ConfigError, match=r"joined_rows: all 4 lanes .*live_lanes is 3"):
            losses(stepper, (6, 3))


class Chooses(nn.Module):
    """Its data say which bias is added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.above, self.below = nn.Parameter(torch.ones(8)), nn.Parameter(-torch.ones(8))
        self.least = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.above if x.sum() > self.least else self.below
        return torch.tanh(F.linear(x, self.weight, bias))


class Choices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList(Chooses() for _ in range(2))
        self.blocks.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.enter
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_lanes_with_another_bias_share_nothing():
    """The sum that chooses lies between that of one sign and that of the other."""
    found = []
    for joined in (None, 64):
        model = Choices()
        model.blocks[0].least = 16.0  # type: ignore[assignment]
        with closing(Stepper(model, ZOConfig(eps=1e-2, joined_rows=joined))) as stepper:
            found.append(stepper.train_step([torch.ones(2, 8)], 0.0).lane_losses)
    assert found[0] == pytest.approx(found[1])
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-3)
