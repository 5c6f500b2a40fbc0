"""What is refused, by name, with the mend."""

import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from models.table import Block, Plain, vectors
from zo_offload.config import ZOConfig
from zo_offload.errors import ConfigError, ModelError, TaskError
from zo_offload.objective import Objective
from zo_offload.step import Stepper


def refused(model: nn.Module, message: str, **config: Any) -> None:
    with pytest.raises(ModelError, match=message):
        Stepper(model, ZOConfig(**config))


def refused_step(model: nn.Module, message: str) -> None:
    with closing(Stepper(model)) as stepper:
        for _ in range(2):  # it stays refused
            with pytest.raises(ModelError, match=message):
                stepper.train_step([vectors(2), vectors(3)], lr=1e-3)
        assert stepper.step == 0


def test_no_blocks():
    refused(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), 'Sequential has no repeated blocks.*"unit"'
    )


def test_a_unit_class_that_is_not_there():
    with pytest.raises(ConfigError, match=r"zeroth_order.unit: no module of class 'Blok'.*Block"):
        Stepper(Plain(), ZOConfig(unit=("Blok",)))


def test_unit_classes_may_be_named():
    model = nn.Sequential(nn.Linear(8, 8), Block(8), Block(8))
    with closing(Stepper(model, ZOConfig(unit=("Block",)))) as stepper:
        assert [unit.name for unit in stepper.weights.map.units] == ["1", "2"]


def test_a_compiled_model():
    compiled: Any = torch.compile(Plain(), backend="eager")
    refused(compiled, "the whole model is wrapped in torch.compile")
    model = Plain()
    model.compile(backend="eager")
    refused(model, "the whole model is wrapped in torch.compile")


def test_a_compiled_part_that_holds_the_blocks():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Plain()
            self.body.compile(backend="eager")

    refused(Wrapped(), "body is wrapped in torch.compile, which hides the blocks inside")


def test_a_model_without_values_is_left_whole():
    model = Plain()
    model.leave.to("meta")
    refused(model, r"parameter leave.weight has no values \(meta device\)")
    assert not model.enter.weight.isnan().any()


def test_a_dtype_that_cannot_be_trained():
    refused(Plain().double(), "parameter enter.weight is torch.float64")


class Peeking(Plain):
    """Reads a block's parameter before the block."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        penalty = self.peek(self.blocks[2].get_parameter("linear.weight"))
        return super().forward(x, labels) + penalty

    peek: Callable[[torch.Tensor], torch.Tensor] = staticmethod(torch.sum)


@pytest.mark.parametrize(
    "peek",
    [torch.sum, lambda w: w.data.sum(), lambda w: w.T.sum(), lambda w: torch.cat([w, w]).sum()],
    ids=["function", "data", "transpose", "list"],
)
def test_a_parameter_read_outside_its_unit(peek: Callable[[torch.Tensor], torch.Tensor]):
    model = Peeking()
    model.peek = peek
    refused_step(
        model, 'blocks.2.linear.weight was read by .* outside the forward of its unit.*"unit"'
    )


class Leaving(Plain):
    """Does something to itself, or to a block, in every forward."""

    def __init__(self, leave: Callable[[Any, torch.Tensor], None]) -> None:
        super().__init__()
        self.trace = leave
        self.seen: list = []
        self.table: dict = {}
        self.statistic: torch.Tensor
        self.register_buffer("statistic", torch.zeros(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.trace(self, x)
        return super().forward(x, labels)


def set_attribute(model: Any, x: torch.Tensor) -> None:
    model.last_input = x


def set_on_a_block(model: Any, x: torch.Tensor) -> None:
    model.blocks[1].num_seen = len(x)


def change_buffer(model: Any, x: torch.Tensor) -> None:
    model.statistic += x.mean()


def replace_buffer(model: Any, x: torch.Tensor) -> None:
    model.statistic = x.mean()


def append(model: Any, x: torch.Tensor) -> None:
    model.seen.append(x)


def cache(model: Any, x: torch.Tensor) -> None:
    model.table[len(x)] = x


@pytest.mark.parametrize(
    ("leave", "where"),
    [
        (set_attribute, "'last_input' of the model (Leaving)"),
        (set_on_a_block, "'num_seen' of blocks.1 (Block)"),
        (change_buffer, "'statistic' of the model (Leaving)"),
        (replace_buffer, "'statistic' of the model (Leaving)"),
        (append, "'seen' of the model (Leaving)"),
        (cache, "'table' of the model (Leaving)"),
    ],
)
def test_state_left_on_a_module(leave: Callable[[Any, torch.Tensor], None], where: str):
    message = f"a forward leaves state in {where}, where another lane"
    refused_step(Leaving(leave), re.escape(message))


def set_equal_constants(model: Any, x: torch.Tensor) -> None:
    model.width = 1000 + x.shape[1]
    model.mode = "".join(["tr", "ain"])


def test_equal_constants_may_be_set_again():
    model: Any = Leaving(set_equal_constants)
    set_equal_constants(model, torch.zeros(1, 8))
    with closing(Stepper(model)) as stepper:
        stepper.train_step([vectors(2), vectors(3)], lr=1e-3)


def test_a_half_precision_loss():
    class Half(Plain):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(x, labels).bfloat16()

    refused_step(Half(), "the loss is bfloat16, whose steps here are .*float32")


def test_no_loss():
    objective = Objective(forward=lambda model, batch: torch.zeros(2), loss=Objective().loss)
    with (
        closing(Stepper(Plain(), objective=objective)) as stepper,
        pytest.raises(TaskError, match="no scalar loss: put labels"),
    ):
        stepper.train_step([vectors(2)], lr=1e-3)
