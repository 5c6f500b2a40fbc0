"""What the engine's forward returns: the model's own output, at the midpoint of the lanes.

The loss (or the logits, where the model returns no loss) carries an autograd node, so that a caller
may scale, mask or combine it as if there were a graph behind it: the node receives dL/dy and books

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

    A bare tensor is replaced whole, a plain tuple in its first place.

    Example:
        >>> with_field({"loss": 1, "n": 2}, "loss", 3)
        {'loss': 3, 'n': 2}
    """
    if isinstance(outputs, torch.Tensor):
        return value
    if isinstance(outputs, tuple):
        if name in getattr(outputs, "_fields", ()):
            return outputs._replace(**{name: value})  # pyright: ignore[reportAttributeAccessIssue]
        return (value, *outputs[1:])
    changed = copy(outputs)
    if isinstance(outputs, MutableMapping):  # a ModelOutput may have no such field yet
        changed[name] = value
    else:
        object.__setattr__(changed, name, value)
    return changed


def field_of(outputs: Any, name: str) -> torch.Tensor | None:
    """A tensor field of a model's output, or None."""
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, torch.Tensor) else None
