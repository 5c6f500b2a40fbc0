"""What the engine's forward returns: the model's own output, at the midpoint of the lanes.

The loss, the logits and whatever else the model returns in floating point carry an autograd node,
so that a caller may scale, mask or combine them as if there were a graph behind: the node receives
dL/dy and books

    projected_grad_k += sum(dL/dy * (y_k+ - y_k-)) / (2 eps)

which is exact in the outer function and zeroth-order in the model.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch

Book = Callable[[torch.Tensor], None]  # receives dL/dy


class _Midpoint(torch.autograd.Function):
    """Identity on a value; its backward books the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, value: torch.Tensor, book: Book) -> torch.Tensor:
        ctx.book = book
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.book(grads[0])
        return None, None, None


def tie(value: torch.Tensor, book: Book) -> torch.Tensor:
    """``value`` with a node that calls ``book(dL/dvalue)`` in the backward pass.

    Example:
        >>> seen = []
        >>> loss = 3.0 * tie(torch.tensor(2.0), seen.append)
        >>> loss.backward()
        >>> seen
        [tensor(3.)]
    """
    leaf = torch.zeros((), requires_grad=True)
    result = _Midpoint.apply(leaf, value, book)
    assert isinstance(result, torch.Tensor)
    return result


def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elementwise mean in fp32 or better, outside inference mode."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(dtype, copy=True)
    for value in values[1:]:
        total = total + value
    return total / len(values)


def with_field(outputs: Any, name: str, value: torch.Tensor) -> Any:
    """A copy of a model's output, of its own type, with one field replaced.

    A bare tensor is replaced whole; of a plain tuple or list, the place where :func:`field_of`
    finds the field.

    Example:
        >>> with_field({"loss": 1, "n": 2}, "loss", 3)
        {'loss': 3, 'n': 2}
    """
    if isinstance(outputs, torch.Tensor):
        return value
    if isinstance(outputs, tuple | list):
        place = _place(outputs, name)
        assert place is not None, f"no {name} in {type(outputs).__name__}"
        items = [*outputs[:place], value, *outputs[place + 1 :]]
        return type(outputs)(*items) if hasattr(outputs, "_fields") else type(outputs)(items)
    changed = copy(outputs)
    if isinstance(outputs, MutableMapping):  # a ModelOutput may have no such field yet
        changed[name] = value
    else:
        object.__setattr__(changed, name, value)
    return changed


def fields_of(outputs: Sequence[Any]) -> dict[str, list[torch.Tensor]]:
    """By name, what all lanes' outputs hold in floating point and in one shape, but for the loss.

    Of a tensor, a tuple or a list the logits alone, as :func:`field_of` finds them.

    Example:
        >>> found = fields_of([{"loss": torch.ones(()), "scores": torch.ones(2)}] * 2)
        >>> {name: len(values) for name, values in found.items()}
        {'scores': 2}
    """
    first = outputs[0]
    if isinstance(first, torch.Tensor | tuple | list):
        names = ["logits"]
    else:
        own = first if isinstance(first, Mapping) else getattr(first, "__dict__", ())
        names = list(dict.fromkeys(["logits", *own]))  # which may be a property
    found = {}
    for name in names:
        values = [field_of(output, name) for output in outputs]
        present = [value for value in values if value is not None and value.is_floating_point()]
        alike = len({value.shape for value in present}) == 1
        is_loss = name == "loss" and alike and present[0].numel() == 1
        if len(present) == len(values) and alike and not is_loss:
            found[name] = present
    return found


def field_of(outputs: Any, name: str) -> torch.Tensor | None:
    """The loss or the logits of a model's output, or None.

    Of a plain tuple or list, the loss is the first floating-point tensor of one element, the logits
    the first one of more.

    Example:
        >>> outputs = torch.ones(2, 3), torch.tensor(0.5)
        >>> field_of(outputs, "loss"), field_of(outputs, "logits").shape
        (tensor(0.5000), torch.Size([2, 3]))
    """
    if isinstance(outputs, torch.Tensor):
        return outputs if (name == "loss") == (outputs.numel() == 1) else None
    if isinstance(outputs, tuple | list):
        place = _place(outputs, name)
        value = None if place is None else outputs[place]
    else:
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, torch.Tensor) else None


def _place(outputs: Sequence[Any], name: str) -> int | None:
    fields = getattr(outputs, "_fields", ())
    if name in fields:
        return fields.index(name)
    for place, value in enumerate(outputs):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if floating and (name == "loss") == (value.numel() == 1):
            return place
    return None
