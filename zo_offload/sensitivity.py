"""How much the loss depends on each weight: squared gradients, unit by unit, over streamed weights.

Autograd needs all weights and all activations at once. Here a forward without gradients leaves what
each unit gave. Then the model runs again, with gradients, but for its units: each gives what was
left, as a leaf. The gradient that gathers at the last leaf goes into the last unit, which is
loaded, runs once more with gradients, and gives those of its weights and of its inputs; what lies
between two units carries them to the leaf before. So the weights, gradients and inner activations
of one unit are in memory at a time, and beside them what units give and take of every batch.

Reference:
    Guo et al. (2024), arXiv 2406.02913, section 3 (sensitive parameters: the largest squared
    gradients on a corpus of text). Deviation: only parameters inside units are scored.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from zo_offload.errors import ConfigError, ModelError
from zo_offload.lane import Call
from zo_offload.objective import move_to
from zo_offload.step import Stepper
from zo_offload.units import Unit

# Takes a unit and, by parameter name, fp32 sums of squared gradients shaped as the parameters.
Keep = Callable[[Unit, dict[str, torch.Tensor]], None]


@dataclass
class Passage:
    """One pass of a batch through a unit.

    Attributes:
        unit: Its index.
        output: What it gave: leaves, where the gradient of all that is behind it gathers.
        args: What it was given, connected to the leaves before it.
        kwargs: Likewise.
    """

    unit: int
    output: Any
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def squared_gradients(stepper: Stepper, batches: Sequence[Any], keep: Keep) -> None:
    """Sum every weight's squared gradients over batches; the last unit comes first.

    Args:
        stepper: Holds the model, at any step.
        batches: Each gives one gradient, of its mean loss; a batch of one example is usual.
        keep: Called once for each unit that the model visits; what it is given is its own.

    Raises:
        ModelError: The loss has no gradient, batches take different ways through the model, or
            experts are divided.
        ConfigError: The head runs in chunks, which have no gradient.

    Example:
        >>> from torch import nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        ...
        ...     def forward(self, x):
        ...         return self.blocks[1](self.blocks[0](x)).sum()
        >>> with Stepper(Net()) as stepper:
        ...     squared_gradients(
        ...         stepper,
        ...         [torch.ones(1, 2)],
        ...         lambda unit, found: print(
        ...             unit.name, [tuple(squares.shape) for squares in found.values()]
        ...         ),
        ...     )
        blocks.1 [(2, 2)]
        blocks.0 [(2, 2)]
    """
    _refuse(stepper)
    moved = [move_to(batch, stepper.weights.arena.device) for batch in batches]
    backward = _Backward(stepper, keep)
    passages = backward.outputs(moved)
    with _trainable(stepper):
        stepper.lanes.run_one(partial(backward.run, moved, passages))


class _Backward:
    """The way back through the units."""

    def __init__(self, stepper: Stepper, keep: Keep) -> None:
        self._stepper = stepper
        self._keep = keep
        self._units = stepper.weights.map.units
        self._modules = stepper.weights.map.modules
        self._sums: dict[str, torch.Tensor] = {}
        self._held: dict[tuple[int, str], torch.Tensor] = {}  # of units that are not done with

    def outputs(self, batches: Sequence[Any]) -> list[list[Passage]]:
        """What units give, of every batch, in the order of its passages."""
        calls = [Call(partial(self._outputs, batch)) for batch in batches]
        numbers = {id(call): number for number, call in enumerate(calls)}
        found: list[list[Passage]] = [[] for _ in batches]

        def note(index: int, module: nn.Module, args: Any, output: Any) -> None:
            lane = self._stepper.lanes.current
            assert lane is not None
            with torch.inference_mode(False):
                found[numbers[id(lane.call)]].append(Passage(index, _mapped(output, _leaf)))

        with ExitStack() as stack:
            for index, module in enumerate(self._modules):
                stack.callback(module.register_forward_hook(partial(note, index)).remove)
            self._stepper.lanes.run(calls, looks=True)
        ways = [[passage.unit for passage in passages] for passages in found]
        if any(way != ways[0] for way in ways):
            raise ModelError(
                "sensitivity: batches take different ways through the model's units; score them "
                "one at a time"
            )
        return found

    def run(self, batches: Sequence[Any], passages: list[list[Passage]]) -> None:
        """In a lane: from the losses to the first unit."""
        with torch.enable_grad():
            for batch, way in zip(batches, passages, strict=True):
                with self._giving_what_was_left(way):
                    loss = self._loss(batch)
                loss.backward()
            to_come = Counter(passage.unit for passage in passages[0])
            for position in reversed(range(len(passages[0]))):
                index = passages[0][position].unit
                to_come[index] -= 1
                for number, way in enumerate(passages):
                    self._back(way.pop(), number, is_last=not to_come[index])
                if not to_come[index]:
                    self._keep(self._units[index], self._sums)
                    self._sums = {}

    def _outputs(self, batch: Any) -> None:
        self._stepper.objective.forward(self._stepper.model, batch)

    def _loss(self, batch: Any) -> torch.Tensor:
        stepper = self._stepper
        outputs = stepper.objective.forward(stepper.model, batch)
        loss = stepper.objective.loss(stepper.model, batch, outputs)
        total, weight = loss if isinstance(loss, tuple) else (loss, None)
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            raise ModelError(
                "sensitivity: the loss has no gradient; score with a loss that is differentiable, "
                "such as the model's own (labels in the batch)"
            )
        return total.mean() if weight is None else total.sum() / weight

    @contextmanager
    def _giving_what_was_left(self, way: Sequence[Passage]) -> Iterator[None]:
        """Units do not run: they note what they are given, and give what they gave before."""
        coming, lane = iter(way), self._stepper.lanes.current
        assert lane is not None

        def give(index: int, *args: Any, **kwargs: Any) -> Any:
            passage = next(coming)
            assert passage.unit == index
            passage.args, passage.kwargs = args, kwargs
            return passage.output

        with ExitStack() as stack:
            for index, module in enumerate(self._modules):
                stack.enter_context(_forward_of(module, partial(give, index)))
            stack.enter_context(lane.passing_by())
            yield

    def _back(self, passage: Passage, number: int, is_last: bool) -> None:
        """One passage of one batch: gradients of the unit, and of what it was given."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def fresh(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            pairs.append((tensor, tensor.detach().requires_grad_()))
            return pairs[-1][1]

        args, kwargs = _mapped(passage.args, fresh), _mapped(passage.kwargs, fresh)
        given = self._modules[passage.unit](*args, **kwargs)
        _backward(given, [leaf.grad for leaf in _tensors(passage.output)])
        with torch._C.DisableTorchFunction():  # the lane's mode is for the model's code
            for name, parameter in self._named(passage.unit):
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None:
                    self._count(number, name, gradient, is_last)
        passage.output = None
        connected = [(tensor, own.grad) for tensor, own in pairs if own.grad is not None]
        if connected:  # what lies before may lie before another unit, too
            tensors, gradients = zip(*connected, strict=True)
            torch.autograd.backward(tensors, gradients, retain_graph=True)

    def _count(self, number: int, name: str, gradient: torch.Tensor, is_last: bool) -> None:
        """The square of a batch's gradient over all passages."""
        gradient = gradient.float()
        held = self._held.pop((number, name), None)
        if held is not None:
            gradient = gradient + held
        if not is_last:
            self._held[number, name] = gradient
        elif name in self._sums:
            self._sums[name].addcmul_(gradient, gradient)
        else:
            self._sums[name] = gradient.square()

    def _named(self, index: int) -> list[tuple[str, nn.Parameter]]:
        names = [segment.name for _, segment in self._units[index].segments]
        return [(name, self._stepper.weights.map.parameters[name]) for name in names]


def _refuse(stepper: Stepper) -> None:
    if stepper.config.head_chunk is not None:
        raise ConfigError(
            "zeroth_order.head_chunk: a head in chunks has no gradient; leave it out to score"
        )
    if len(set(stepper.weights.map.modules)) < len(stepper.weights.map.modules):
        raise ModelError(
            "sensitivity: experts are divided, and would be scored one by one; keep them together: "
            '"unit": "sublayer"'
        )


@contextmanager
def _trainable(stepper: Stepper) -> Iterator[None]:
    """What is in units takes gradients meanwhile, and nothing else does."""
    weights = stepper.weights.map
    inside = {segment.name for unit in weights.units for _, segment in unit.segments}
    before = {name: parameter.requires_grad for name, parameter in weights.parameters.items()}
    try:
        for name, parameter in weights.parameters.items():
            parameter.requires_grad_(name in inside)
        yield
    finally:
        for name, parameter in weights.parameters.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward")
        if own is not None:
            module.forward = own


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_() if copy.is_floating_point() else copy


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A value with its tensors changed; containers keep their types."""
    return tree_map(lambda each: change(each) if isinstance(each, torch.Tensor) else each, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, torch.Tensor)]


def _backward(given: Any, gradients: Sequence[torch.Tensor | None]) -> None:
    pairs = zip(_tensors(given), gradients, strict=True)
    connected = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
    if connected:
        tensors, those = zip(*connected, strict=True)
        torch.autograd.backward(tensors, those)
