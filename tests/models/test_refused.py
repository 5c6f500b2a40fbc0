"""What is refused, by name, with the mend."""

import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from models.table import Block, Plain, vectors
from zo_offload.config import OffloadConfig, ZOConfig
from zo_offload.errors import ConfigError, ModelError, StoreError, TaskError
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
        pytest.raises(TaskError, match="no scalar loss; put labels"),
    ):
        stepper.train_step([vectors(2)], lr=1e-3)


# -- parameters that could not be managed --


class Complex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class TiedByMemory(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Parameter(self.leave.weight.data)


class Aliased(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.transposed = self.leave.weight.data.t()


class AliasedInAList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.ones(1), self.leave.weight.detach()]


class PartsOfOneMemory(Plain):
    """Three parameters, of which the last two overlap."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(3, 8)
        self.one, self.two = nn.Parameter(memory[0]), nn.Parameter(memory[1:])
        self.three = nn.Parameter(memory[2])


class Clipped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8, max_norm=1.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Complex, "parameter phase is torch.complex64"),
        (TiedByMemory, "leave.weight lies in the memory of parameter again without being the same"),
        (Aliased, "transposed lies in the memory of parameter leave.weight"),
        (AliasedInAList, "held lies in the memory of parameter leave.weight"),
        (PartsOfOneMemory, "three lies in the memory of parameter two"),
        (Clipped, "table has max_norm=1.0: its forward writes to its weight"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "is a ScriptModule"),
        (lambda: Plain().requires_grad_(False), "Plain has no trainable parameter"),
        (lambda: Plain().to("meta"), "has no values .meta device."),
    ],
)
@pytest.mark.filterwarnings("ignore:.*jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("scale", ["none", "rms"])
def test_what_cannot_be_managed(model: Callable[[], nn.Module], message: str, scale: str):
    refused(model(), message, direction_scale=scale)


def test_parts_of_one_memory_that_do_not_overlap_are_fine():
    model = Plain()
    both = torch.randn(2, 8)
    model.one, model.two = nn.Parameter(both[0]), nn.Parameter(both[1])
    Stepper(model).close()


# -- weights written by a forward --


class Writing(Plain):
    """Changes a weight in its forward."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.write = write

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.write(self)
        return super().forward(x * self.scale, labels)


class WritingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data.mul_(0.9)
        return x @ self.weight


def set_item(model: Any) -> None:
    model.scale[0] = 0.5


def set_data(model: Any) -> None:
    model.scale.data = torch.zeros(1)


def add(model: Any) -> None:
    model.scale += 1.0


ANY_TORCH: Any = torch
WRITES = {
    "clamp_": lambda model: model.scale.clamp_(0.0, 0.5),
    "an item": set_item,
    "data": set_data,
    "+=": add,
    "out": lambda model: torch.mul(torch.ones(1), 2.0, out=model.scale),
    "out of two": lambda model: torch.max(
        torch.ones(1, 2), 1, out=(model.scale, torch.zeros(1, dtype=torch.int64))
    ),
    "inplace": lambda model: nn.functional.relu(model.scale, inplace=True),
    "keyword": lambda model: nn.init.uniform_(tensor=model.scale),
    "max_norm": lambda model: nn.functional.embedding(
        torch.zeros(1, dtype=torch.int64), model.enter.weight, None, 1e-3
    ),
    "a list": lambda model: ANY_TORCH._foreach_mul_([torch.ones(1), model.scale], 2.0),
    "an operator": lambda model: torch.ops.aten.mul_.Tensor(model.scale, 2.0),
}


@pytest.mark.parametrize("device", ["none", "cpu"])
@pytest.mark.parametrize("name", WRITES)
def test_a_forward_that_writes_to_a_weight(name: str, device: Any):
    with closing(
        Stepper(Writing(WRITES[name]), ZOConfig(offload_param=OffloadConfig(device=device)))
    ) as s:
        before = dict(s.weights.masters())
        for run in (lambda: s.train_step([vectors(2)], lr=0.0), lambda: s.forward(vectors(2))):
            with pytest.raises(ModelError, match="written in place by"):
                run()
        assert all(torch.equal(value, before[name]) for name, value in s.weights.masters())


def test_what_writes_no_values_is_no_write():
    def touch(model: Any) -> None:
        model.scale.requires_grad_(True)
        model.scale.grad = None

    with closing(Stepper(Writing(touch))) as stepper:
        stepper.train_step([vectors(2)], lr=0.0)


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_a_caller_is_given_no_view_of_a_master(device: Any):
    config = ZOConfig(offload_param=OffloadConfig(device=device))
    objective = Objective(forward=lambda model, batch: model.get_parameter("leave.bias").detach())
    with closing(Stepper(Plain(), config, objective=objective)) as stepper:
        before = stepper.weights.digest()
        stepper.forward(vectors(2)).zero_()
        assert stepper.weights.digest() == before


def test_a_block_that_writes_to_its_weight():
    model = nn.Sequential(WritingBlock(), WritingBlock())
    with closing(Stepper(model, ZOConfig(unit=("WritingBlock",)))) as stepper:
        stepper.weights.poison = False
        with pytest.raises(ModelError, match="a view of it, is written in place by mul_"):
            stepper.forward(torch.ones(2, 8))


# -- one store a model --


def test_a_model_has_one_store_at_a_time():
    model = Plain()
    with closing(Stepper(model)) as first:
        refused(model, "the weights of this Plain are in the store of another Stepper")
        first.train_step([vectors(2)], lr=1e-2)
        expected = dict(first.weights.masters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    with closing(Stepper(model)) as second:  # goes on from where the first one ended
        assert all(torch.equal(value, expected[n]) for n, value in second.weights.masters())


def test_a_part_of_a_model_whose_weights_are_taken_is_refused():
    model = Plain()
    with closing(Stepper(model)):
        refused(model.blocks, "the weights of 0.norm are in the store", unit=("Block",))
        refused(nn.Sequential(model), "the weights of 0 are in the store")


def test_closing_twice_leaves_the_next_store_alone():
    model = Plain()
    first = Stepper(model)
    first.close()
    with closing(Stepper(model)) as second:
        first.close()
        assert "forward" in vars(model)
        assert all(parameter.isnan().all() for parameter in model.parameters())
        refused(model, "the weights of this Plain are in the store")
        second.train_step([vectors(2)], lr=0.0)


def test_a_closed_stepper_takes_no_step():
    stepper = Stepper(Plain())
    stepper.close()
    with pytest.raises(StoreError, match="is closed; make a new one"):
        stepper.train_step([vectors(2)], lr=0.0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("device", ["none", "cpu"])
def test_a_construction_that_fails_leaves_the_model_as_it_was(
    device: Any, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    model = Plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise ArithmeticError("late")

    for target in (
        "zo_offload.weights.Weights.empty_scratch",
        "zo_offload.weights.serve_state_dict",
        "zo_offload.step.Lanes",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(ArithmeticError, match="late"):
                Stepper(model, ZOConfig(offload_param=OffloadConfig(device=device)), dtype=dtype)
        after = model.state_dict()
        assert [n for n in before if after[n].dtype != before[n].dtype] == []
        assert [n for n in before if not torch.equal(after[n], before[n])] == []


def test_a_unit_of_another_store_is_outside_a_visit():
    other = Plain()

    def loss(model: nn.Module, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        return outputs + other.blocks[0](batch["x"]).mean()

    with (
        closing(Stepper(other)),
        closing(Stepper(Plain(), objective=Objective(loss))) as stepper,
        pytest.raises(StoreError, match="Block was called outside a visit"),
    ):
        stepper.train_step([vectors(2)], lr=0.0)


def test_the_whole_model_of_another_store_is_outside_a_visit():
    other = Plain()

    def loss(model: nn.Module, batch: Any, outputs: torch.Tensor) -> torch.Tensor:
        return outputs + other(**batch)

    with (
        closing(Stepper(other)),
        closing(Stepper(Plain(), objective=Objective(loss))) as stepper,
        pytest.raises(StoreError, match="no model of another engine"),
    ):
        stepper.train_step([vectors(2)], lr=0.0)


def keep_longest(model: Any, x: torch.Tensor) -> None:
    if len(x) > 3:
        model.longest = len(x)


def test_state_that_only_longer_inputs_leave():
    with closing(Stepper(Leaving(keep_longest))) as stepper:
        stepper.train_step([vectors(2)], lr=0.0)
        with pytest.raises(ModelError, match="leaves state in 'longest'"):
            stepper.train_step([vectors(2), vectors(4)], lr=0.0)
        with pytest.raises(ModelError, match="leaves state in 'longest'"):
            stepper.train_step([vectors(2)], lr=0.0)  # it is still there


@pytest.mark.parametrize("name", ["forward", "evaluate", "the bare model"])
def test_state_that_an_evaluation_leaves(name: str):
    model = Leaving(keep_longest)
    with closing(Stepper(model)) as stepper:
        run = {
            "forward": stepper.forward,
            "evaluate": stepper.evaluate,
            "the bare model": lambda batch: model(**batch),
        }[name]
        run(vectors(2))
        with pytest.raises(ModelError, match="leaves state in 'longest'"):
            run(vectors(4))


def test_shapes_that_were_looked_at_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch):
    with closing(Stepper(Plain())) as stepper:
        stepper.train_step([vectors(2), vectors(3)], lr=0.0)
        monkeypatch.setattr("zo_offload.leftovers.state_of", None)
        stepper.train_step([vectors(3), vectors(3), vectors(2)], lr=0.0)
