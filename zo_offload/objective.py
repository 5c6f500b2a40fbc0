"""What is minimised: how a batch goes into a model, and how a loss comes out.

An objective may be anything that returns a number; nothing needs a gradient.
"""

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from zo_offload.errors import ModelError, TaskError
from zo_offload.midpoint import field_of


class Inputs(NamedTuple):
    """A batch of positional and keyword arguments together."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_with(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping is keywords, a sequence positional."""
    if isinstance(batch, Inputs):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def model_loss(model: nn.Module, batch: Any, outputs: Any) -> torch.Tensor | None:
    """The model's own loss: ``.loss``, or what ``midpoint.field_of`` takes for it; else None."""
    loss = field_of(outputs, "loss")
    return loss if loss is not None and loss.numel() == 1 else None


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: ``fn(model, batch, outputs)`` to a per-example tensor (its mean counts, with weight 1)
            or to ``(sum, weight)``. Need not be differentiable.
        forward: ``fn(model, batch)`` to outputs.
        smooth: Whether it changes little where weights change little. An accuracy or a reward moves
            in jumps: then lanes may well be equal, and nobody looks for rounding in its steps.
        name: In a journal's header, so that no run goes on with another; empty for the task's loss.
    """

    loss: Callable[[nn.Module, Any, Any], Any] = model_loss
    forward: Callable[[nn.Module, Any], Any] = call_with
    smooth: bool = True
    name: str = ""


def loss_sum(loss: Any) -> tuple[float, float]:
    """``(sum, weight)`` of what an objective returned, as float64.

    Raises:
        TaskError: There is none.
        ModelError: The loss was computed in half precision, whose steps would drown the signal.
    """
    if loss is None:
        raise TaskError(
            "the model returned no scalar loss; put labels into the batch, or pass "
            "objective=fn(model, batch, outputs)"
        )
    pair: Any = loss
    total, weight = pair if isinstance(loss, tuple) else (loss, 1.0)
    if isinstance(total, torch.Tensor):
        if total.dtype in (torch.bfloat16, torch.float16):
            step = torch.finfo(total.dtype).eps * max(abs(float(total.float().mean())), 1e-3)
            raise ModelError(
                f"the loss is {str(total.dtype).removeprefix('torch.')}, whose steps here are "
                f"{step:.1g}, far above the loss difference of a step; compute it in float32 "
                "(logits.float()) in the model or the objective"
            )
        total = total.double()
        total = float(total.mean() if not isinstance(loss, tuple) else total.sum())
    return float(total), float(weight)


def example_losses(losses: Sequence[Any]) -> list[list[float]]:
    """What an objective returned in the lanes of a micro-batch, example by example, as float64.

    Raises:
        TaskError: It is no loss an example, or lanes differ in how many there are.

    Example:
        >>> example_losses([torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5])])
        [[1.0, 2.0], [1.5, 2.5]]
    """
    found = [_of_examples(loss) for loss in losses]
    counts = sorted({len(lane) for lane in found})
    if len(counts) > 1:
        raise TaskError(
            "zeroth_order.natural: compares examples between lanes, and the objective returned "
            f"{counts[0]} losses in one lane of a micro-batch and {counts[-1]} in another; return "
            "one for every example, whatever the outputs are"
        )
    return found


def _of_examples(loss: Any) -> list[float]:
    given: Any = loss
    if isinstance(loss, torch.Tensor) and loss.dim() == 1:
        return given.double().tolist()
    found = type(loss).__name__
    if isinstance(loss, tuple):
        found = "a (sum, weight) pair"
    elif isinstance(loss, torch.Tensor):
        found = f"a tensor of shape {list(loss.shape)}"
    raise TaskError(
        "zeroth_order.natural: compares single examples, and the objective returned "
        f"{found}; pass objective=fn(model, batch, outputs) that returns a loss an example, "
        "shape [examples], or leave the key out"
    )


def move_to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; containers keep their types."""
    parts: Any = batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, MutableMapping):  # a BatchEncoding, say
        moved = copy(parts)
        for key, value in parts.items():
            moved[key] = move_to(value, device)
        return moved
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in parts.items()}
    if isinstance(batch, tuple | list):
        values = [move_to(value, device) for value in parts]
        return type(parts)(*values) if hasattr(parts, "_fields") else type(parts)(values)
    return parts


def shapes_of(batch: Any) -> Hashable:
    """The shapes of a batch's tensors; equal for batches that a model takes the same way through.

    Example:
        >>> shapes_of({"x": torch.ones(2, 3), "n": 4})
        (('x', torch.Size([2, 3])), ('n', <class 'int'>))
    """
    parts: Any = batch
    if isinstance(batch, torch.Tensor):
        return batch.shape
    if isinstance(batch, Mapping):
        return tuple((key, shapes_of(value)) for key, value in parts.items())
    if isinstance(batch, list | tuple):
        return tuple(shapes_of(value) for value in parts)
    return parts.__class__
