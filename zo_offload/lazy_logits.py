"""Logits that are made when they are read, and for a loss never whole.

:class:`LazyLogits` stands for ``F.linear(hidden, head, bias)``. What models do between head and
loss (upcast, slice, flatten, scale, cap) is applied to the hidden states, or kept for later; a
cross-entropy, a log-sum-exp and a gather over the vocabulary are computed a block of it at a time
(``lazy_rules.py``). Anything else makes the whole logits, as they would have been, and goes on with
those.

All that come from one product are a family. They alias each other as views of one tensor would:
once one is made, the others are views of it, and whatever is written to one is first made in all.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from zo_offload.errors import ModelError
from zo_offload.views import address_of, replaced
from zo_offload.writes import reads_values, written_by

Columns = slice | torch.Tensor
Map = Callable[[torch.Tensor, Columns], torch.Tensor]
"""Applied to a block of logits; told which columns of the vocabulary they are."""
Rule = Callable[[Callable, "LazyLogits", tuple, dict[str, Any]], Any]
"""Of a function, told the logits and its other arguments: the result, or NotImplemented."""


class Head(Protocol):
    """What logits are made with."""

    @property
    def num_columns(self) -> int:
        """Of the whole vocabulary."""
        ...

    @property
    def chunk(self) -> int:
        """Columns of a block."""
        ...

    def block(self, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """fp32 logits ``[tokens, last - first]`` of hidden states ``[tokens, width]``."""
        ...

    def pairs(self, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """fp32 ``[n]``: the logit of each hidden state ``[n, width]`` at its column ``[n]``."""
        ...

    def whole(self, hidden: torch.Tensor, reader: str | None) -> torch.Tensor:
        """All of them; ``reader`` asked for it (None: as was to be expected)."""
        ...


@dataclass(eq=False)
class Family:
    """All lazy logits of one product.

    Attributes:
        head: Makes them.
        hidden: What was multiplied, ``[..., width]``.
        rules: What need not make the whole logits, by function.
        closed: Whether the lane is over, so that no more can be made.
    """

    head: Head
    hidden: torch.Tensor
    rules: Mapping[Callable, Rule]
    closed: bool = False
    _members: "list[weakref.ref[LazyLogits]]" = field(default_factory=list)

    def logits(self) -> "LazyLogits":
        """``[..., vocabulary]``."""
        return self.join(LazyLogits.of(self, self.hidden))

    def join(self, member: "LazyLogits") -> "LazyLogits":
        """Count it in."""
        self._members.append(weakref.ref(member))
        return member

    def make_all(self, reader: str) -> None:
        """Before something is written that they are made of, or to one of them."""
        for reference in self._members:
            member = reference()
            if member is not None:
                member.value(reader)

    def is_made_of(self, address: int | None) -> bool:
        """Whether what lies at this address goes into logits that are not made yet."""
        return address is not None and address == address_of(self.hidden)

    def check_open(self) -> None:
        """Refuse to make logits after the lane.

        Raises:
            ModelError: With what to write instead.
        """
        if self.closed:
            raise ModelError(
                "the logits of this output were not made: with zeroth_order.head_chunk a training "
                "forward that gives a loss leaves them out; take the labels out of the batch, or "
                'write "head_chunk": null'
            )


class LazyLogits(torch.Tensor):
    """See the module's docstring. Its shape, dtype and device are those of the logits."""

    family: Family
    hidden: torch.Tensor  # of its positions, [..., width]
    maps: tuple[Map, ...]
    _parent: "LazyLogits | None"
    _step: Callable[[torch.Tensor], torch.Tensor]
    _made: torch.Tensor | None

    @staticmethod
    def of(
        family: Family,
        hidden: torch.Tensor,
        maps: tuple[Map, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> "LazyLogits":
        """The logits of these hidden states."""
        shape = (*hidden.shape[:-1], family.head.num_columns)
        logits = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            LazyLogits, shape, dtype=dtype, device=hidden.device
        )
        logits.family, logits.hidden, logits.maps = family, hidden, maps
        logits._parent, logits._made = None, None
        return logits

    def after(
        self,
        step: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor | None = None,
        added: Map | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LazyLogits":
        """What ``step`` would make of the whole logits, told by what it does to their parts."""
        hidden = self.hidden if hidden is None else hidden
        maps = self.maps if added is None else (*self.maps, added)
        logits = LazyLogits.of(self.family, hidden, maps, dtype or self.dtype)
        logits._parent, logits._step = self, step
        return self.family.join(logits)

    @property
    def is_made(self) -> bool:
        """Whether it, or what it is a view of, exists."""
        return self._made is not None or (self._parent is not None and self._parent.is_made)

    def value(self, reader: str | None = None) -> torch.Tensor:
        """The logits themselves, from now on one and the same tensor.

        Args:
            reader: Name of what needs them, for the log (None: not to be told).
        """
        if self._made is None:
            self.family.check_open()
            with torch._C.DisableTorchFunction():  # a lane's mode is for the model's code
                if self._parent is None:
                    self._made = self.family.head.whole(self.hidden, reader)
                else:
                    self._made = self._step(self._parent.value(reader))
        return self._made

    def rows(self) -> torch.Tensor:
        """Its hidden states ``[tokens, width]``."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """A block of the vocabulary at a time, in order; each may be overwritten."""
        self.family.check_open()
        head, rows = self.family.head, self.rows()
        for first in range(0, head.num_columns, head.chunk):
            last = min(first + head.chunk, head.num_columns)
            yield first, self.mapped(head.block(rows, first, last), slice(first, last))

    def mapped(self, block: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Logits after all that was kept for later."""
        for each in self.maps:
            block = each(block, columns)
        return block

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyLogits({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not reads_values(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy = args[0] if args else kwargs.get("input")
        if isinstance(lazy, LazyLogits) and not lazy.is_made:
            rule = lazy.family.rules.get(func)
            with torch._C.DisableTorchFunction():
                others = {key: value for key, value in kwargs.items() if key != "input"}
                result = rule(func, lazy, args[1:], others) if rule else NotImplemented
            if result is not NotImplemented:
                return result
        return _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _with_values(func, args, kwargs or {})  # called by code below Python's functions


def made(result: Any, reader: str | None = None) -> Any:
    """A result in which no logits are lazy."""
    return replaced(result, lambda t: t.value(reader) if isinstance(t, LazyLogits) else t)


def _with_values(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    reader = getattr(func, "__name__", str(func))
    if reader == "__get__":
        reader = getattr(getattr(func, "__self__", None), "__name__", reader)
    for target in _lazy_in(written_by(func, args, kwargs)):
        target.family.make_all(reader)
    return func(*made(args, reader), **made(kwargs, reader))


def _lazy_in(values: Any) -> Iterator[LazyLogits]:
    for value in values:
        if isinstance(value, LazyLogits):
            yield value
        elif isinstance(value, list | tuple):
            yield from _lazy_in(value)
