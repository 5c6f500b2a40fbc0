"""Modules that hold many experts: how they are divided, how lanes read them, what is refused."""

import copy
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from models.perturbed import assert_equals_plain_forwards
from models.table import ROWS, tokens
from models.test_generate import GENERATED, alone, generate
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import ModelError
from zo_offload.experts import groups_of, holds_experts
from zo_offload.ops import ALIGNMENT
from zo_offload.step import Stepper
from zo_offload.units import map_model

LINEAR = ZOConfig(seed=3, eps=0.2, unit="linear", offload_param=OffloadConfig(device="cpu"))
WIDTH = 128  # a block of noise, so that single experts can be a unit
Forward = Callable[["Experts", torch.Tensor], torch.Tensor]


class Experts(nn.Module):
    """Each as wide as what it takes, with a vector of its own."""

    def __init__(self, forward: Forward, count: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.num_experts = count
        self.weight = nn.Parameter(torch.randn(count, width, width) / width)
        self.shift = nn.Parameter(torch.randn(count, width))
        self.run = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


class Block(nn.Module):
    def __init__(self, forward: Forward, **of: int) -> None:
        super().__init__()
        self.experts = Experts(forward, **of)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.experts(x))


class Model(nn.Module):
    def __init__(self, forward: Forward, **of: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(forward, **of) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def by_number(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    return sum(
        (F.linear(x, experts.weight[i], experts.shift[i]) for i in range(experts.num_experts)),
        torch.zeros_like(x),
    )


def by_any_index(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """Backwards, twice, by tensors, from the end, and some rows alone."""
    total = torch.zeros_like(x)
    for i in (-1, torch.tensor(2), 0, torch.tensor([3])[0], -4):
        weight = experts.weight[i, :, 1:]
        total = total + F.linear(x[:, 1:], weight.contiguous()) + experts.shift[i][None]
    return total + len(experts.weight) + experts.weight.shape[1]


def whole(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bi,eoi->bo", x, experts.weight)


def some(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, experts.weight[torch.tensor([0, 2])].sum(0))


def by_data(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, experts.weight.data[0])


def one_before(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    first, last = experts.weight[0].t(), experts.weight[3]
    return F.linear(x, last) @ first


def listed(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, torch.stack([experts.weight[i] for i in range(4)]).sum(0))


def written(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    experts.weight[1].mul_(2.0)
    return F.linear(x, experts.weight[1])


def assigned(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    experts.weight[1] = 0.0
    return x


def made(forward: Forward, **of: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(forward, **of).eval()


@pytest.mark.parametrize("forward", [by_number, by_any_index])
def test_experts_may_be_read_in_any_order(forward: Forward):
    batches = [torch.ones(2, WIDTH), torch.randn(3, WIDTH)]
    assert len(map_model(made(forward), "linear").divided) == 4
    assert_equals_plain_forwards(made(forward), batches, unit="linear")


WHOLE = r'"unit": "sublayer"$'


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            whole,
            rf"blocks.0.experts.weight was read whole by einsum, .* at a time .*eager.*{WHOLE}",
        ),
        (some, rf"blocks.0.experts.weight was read whole by __getitem__, but .*{WHOLE}"),
        (by_data, rf"blocks.0.experts.weight was read whole by __get__, but .*{WHOLE}"),
        (one_before, rf"^matmul was given an expert of a group that the forward has left.*{WHOLE}"),
        (listed, rf"^stack was given an expert of a group that the forward has left.*{WHOLE}"),
        (written, "a weight, through a view of it, is written in place by mul_ in the forward"),
        (assigned, "blocks.0.experts.weight is written in place by __setitem__ in the forward"),
    ],
)
def test_what_a_group_does_not_hold_is_refused(forward: Forward, message: str):
    with (
        closing(Stepper(made(forward), LINEAR)) as stepper,
        pytest.raises(ModelError, match=message) as error,
    ):
        stepper.train_step([torch.ones(2, WIDTH)], lr=1e-3)
    assert "\n" not in str(error.value)
    assert stepper.step == 0


def test_experts_that_another_module_reads_are_refused():
    model = made(by_number)
    model.blocks[1].experts.run = lambda experts, x: F.linear(x, model.blocks[0].experts.weight[0])
    with (
        closing(Stepper(model, LINEAR)) as stepper,
        pytest.raises(ModelError, match=r"blocks.0.experts.weight was read outside the forward"),
    ):
        stepper.train_step([torch.ones(2, WIDTH)], lr=1e-3)


def test_a_number_that_there_is_no_expert_of_is_an_index_error():
    with (
        closing(Stepper(made(lambda experts, x: x @ experts.weight[4]), LINEAR)) as stepper,
        pytest.raises(IndexError, match="index 4 is out of bounds for dimension 0 with size 4"),
    ):
        stepper.evaluate(torch.ones(2, WIDTH))


def test_another_forward_chosen_meanwhile_is_refused_with_the_mend():
    model: Any = ROWS["mixtral"].build()
    with closing(Stepper(model, LINEAR)) as stepper:
        stepper.train_step([ROWS["mixtral"].inputs(4)], lr=1e-3)
        model.set_experts_implementation("grouped_mm")
        with pytest.raises(ModelError, match=r"gate_up_proj was read whole by .*\(\"eager\"\)"):
            stepper.train_step([ROWS["mixtral"].inputs(4)], lr=1e-3)
        model.set_experts_implementation("eager")
        stepper.train_step([ROWS["mixtral"].inputs(4)], lr=1e-3)


def test_compiled_experts_are_refused():
    model = made(by_number)
    model.blocks[0].experts.compile(backend="eager")
    with pytest.raises(ModelError, match=r"^blocks.0.experts is compiled, and its experts move in"):
        Stepper(model, LINEAR)
    map_model(model, "sublayer")


def test_experts_that_two_modules_share_stay_on_the_device():
    model = made(by_number)
    model.blocks[1].experts.weight = model.blocks[0].experts.weight
    assert map_model(model, "linear").divided == {}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_generate(name: str):
    """On current weights, and in lanes whose tokens choose other experts at other lengths."""
    model: Any = ROWS[name].build()
    model.set_experts_implementation("eager")
    batches = [
        {"input_ids": tokens(length)[:1], "max_new_tokens": most}
        for length, most in ((5, 8), (9, 3))
    ]
    with closing(Stepper(copy.deepcopy(model), LINEAR, objective=GENERATED)) as stepper:
        stepper.weights.poison = True
        found = stepper.run_model(lambda: generate(stepper.model, batches[0]))
        draws = stepper.draws()
        results = [outputs for _, outputs in stepper.run_lanes(batches, draws)]
    assert torch.equal(found, generate(model, batches[0]))
    expected = [
        alone(model, draw, batch, i) for _, _, draw in draws for i, batch in enumerate(batches)
    ]
    assert [result.tolist() for result in results] == [other.tolist() for other in expected]


@given(
    count=st.integers(2, 200),
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    most=st.integers(0, 200_000),
)
def test_groups_are_even_aligned_and_no_larger_than_asked(count: int, sizes: list[int], most: int):
    module: Any = nn.Module()
    module.num_experts = count
    for i, size in enumerate(sizes):
        module.register_parameter(f"p{i}", nn.Parameter(torch.empty(count, 1, size, device="meta")))
    assert holds_experts(module)
    groups = groups_of(module, most)
    assert [expert for group in groups for expert in group] == list(range(count))
    assert all(group.start * size % ALIGNMENT == 0 for group in groups for size in sizes)
    largest = max(map(len, groups))
    fewer = [n for n in range(1, largest) if all(n * size % ALIGNMENT == 0 for size in sizes)]
    assert largest * sum(sizes) <= most or not fewer


def test_what_cannot_be_divided_on_blocks_of_noise_stays_together():
    """Five experts of 25 numbers each have no border at a multiple of 128."""
    model = made(by_number, count=5, width=5)
    names = [unit.name for unit in map_model(model, "linear").units]
    assert names == [f"blocks.{i}.{part}" for i in range(2) for part in ("experts", "linear")]


@pytest.mark.parametrize(
    "module",
    [nn.Conv1d(4, 8, 3), nn.Linear(4, 4), nn.Bilinear(4, 4, 4), Model(by_number)],
    ids=lambda module: type(module).__name__,
)
def test_what_does_not_count_experts_holds_none(module: nn.Module):
    assert not holds_experts(module)
