"""What may be done to lazy logits without making them whole: one rule a function of torch.

A rule is told the function, the logits, and the other arguments. It returns NotImplemented for what
it does not know, whatever that is: then the whole logits are made, and torch decides.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zo_offload import chunked_loss
from zo_offload.lazy_logits import Family, Head, LazyLogits, Rule


def lazy_linear(head: Head, hidden: torch.Tensor) -> LazyLogits:
    """The product of hidden states ``[..., width]`` and a head, when it is read."""
    return Family(head, hidden, RULES).logits()


# -- what is deferred --


def _same(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Values stay as they are."""
    return lazy.after(lambda whole: func(whole, *args, **kwargs))


def _cast(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``to`` another floating dtype; not to another device."""
    dtype = lazy.dtype
    if not {"dtype", "device", "copy", "non_blocking"}.issuperset(kwargs):
        return NotImplemented
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            if value.device != lazy.device:
                return NotImplemented
            dtype = value.dtype
        elif isinstance(value, str | torch.device):
            device = torch.device(value)
            if device.type != lazy.device.type or device.index not in (None, lazy.device.index):
                return NotImplemented
        elif value is not None and not isinstance(value, bool):
            return NotImplemented
    if not dtype.is_floating_point:
        return NotImplemented
    return _converted(func, lazy, args, kwargs, dtype)


def _float(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    return _converted(func, lazy, args, kwargs, torch.float32)


def _converted(
    func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype
) -> LazyLogits:
    added = None if dtype == lazy.dtype else lambda block, columns: block.to(dtype)
    return lazy.after(lambda whole: func(whole, *args, **kwargs), added=added, dtype=dtype)


def _indexed(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Positions are chosen; of each the whole vocabulary stays."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    leading = _leading(index, lazy.dim())
    if leading is None:
        return NotImplemented
    return lazy.after(lambda whole: func(whole, *args), hidden=lazy.hidden[leading])


def _leading(index: tuple, num_dims: int) -> tuple | None:
    """An index without its part for the last dimension, if that takes all; else None."""
    sizes = [_dims_taken(item) for item in index]
    if None in sizes:
        return None
    taken = sum(size for size in sizes if size is not None)
    places = [i for i, item in enumerate(index) if item is Ellipsis]
    if len(places) > 1:
        return None
    if places:
        filling = (slice(None),) * (num_dims - taken)
        index = (*index[: places[0]], *filling, *index[places[0] + 1 :])
        taken = num_dims
    if taken < num_dims:
        return index
    last = index[-1] if index else None
    whole = isinstance(last, slice) and last == slice(None)
    return index[:-1] if taken == num_dims and whole else None


def _dims_taken(item: Any) -> int | None:
    """None for what is left to torch."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, slice) or (isinstance(item, int) and not isinstance(item, bool)):
        return 1
    if isinstance(item, torch.Tensor) and not isinstance(item, LazyLogits):
        return item.dim() if item.dtype == torch.bool and item.dim() else 1
    return None


def _reshaped(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Positions are laid out anew."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if kwargs or not sizes or not all(type(size) is int for size in sizes):
        return NotImplemented
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if list(sizes).count(-1) == 1 and known > 0 and lazy.numel() % known == 0:
        sizes = tuple(lazy.numel() // known if size == -1 else size for size in sizes)
        known = lazy.numel()
    if -1 in sizes or known != lazy.numel() or sizes[-1] != lazy.shape[-1]:
        return NotImplemented
    hidden = lazy.hidden.reshape(*sizes[:-1], lazy.hidden.shape[-1])
    return lazy.after(lambda whole: func(whole, *args), hidden=hidden)


def _scaled(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Multiplied or divided by a number."""
    if kwargs or len(args) != 1 or type(args[0]) not in (int, float):
        return NotImplemented
    factor = args[0]
    return lazy.after(lambda x: func(x, factor), added=lambda x, columns: func(x, factor))


def _capped(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or args:
        return NotImplemented
    return lazy.after(func, added=lambda x, columns: func(x))


def _shifted(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A bias of the vocabulary is added."""
    bias = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(bias, torch.Tensor) or isinstance(bias, LazyLogits):
        return NotImplemented
    if bias.shape != (1,) * (bias.dim() - 1) + lazy.shape[-1:] or bias.dim() > lazy.dim():
        return NotImplemented
    if bias.device != lazy.device or not bias.is_floating_point():
        return NotImplemented
    row = bias.reshape(-1).clone()
    return lazy.after(
        lambda whole: whole + row,
        added=lambda x, columns: x + row[columns],
        dtype=torch.promote_types(lazy.dtype, row.dtype),
    )


# -- what is computed in blocks --


def _cross_entropy(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    def bound(
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        if weight is not None or size_average is not None or reduce is not None:
            return NotImplemented
        if not _is_index(target, lazy) or target.shape != lazy.shape[:-1] or lazy.dim() > 2:
            return NotImplemented
        if reduction not in ("mean", "sum", "none") or not 0.0 <= label_smoothing <= 1.0:
            return NotImplemented  # torch says what is wrong
        classes, flat = lazy.shape[-1], target.reshape(-1)
        loss = chunked_loss.cross_entropy(
            lazy.blocks(), classes, flat, ignore_index, reduction, label_smoothing
        )
        return loss.reshape(target.shape) if reduction == "none" else loss

    return bound(*args, **kwargs)


def _logsumexp(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    def bound(dim: Any, keepdim: bool = False) -> Any:
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        if dim not in (-1, lazy.dim() - 1) or lazy.dtype != torch.float32:
            return NotImplemented
        found = chunked_loss.logsumexp(lazy.blocks()).reshape(lazy.shape[:-1])
        return found.unsqueeze(-1) if keepdim else found

    return bound(*args, **kwargs)


def _gather(func: Callable, lazy: LazyLogits, args: tuple, kwargs: dict[str, Any]) -> Any:
    def bound(dim: Any, index: Any, sparse_grad: bool = False) -> Any:
        if dim not in (-1, lazy.dim() - 1) or not _is_index(index, lazy):
            return NotImplemented
        if index.shape[:-1] != lazy.shape[:-1] or index.numel() >= lazy.numel():
            return NotImplemented
        lazy.family.check_open()
        hidden, columns = lazy.rows(), index.reshape(-1)
        every, parts = index.shape[-1], []
        for first in range(0, len(columns), lazy.family.head.chunk):
            part = columns[first : first + lazy.family.head.chunk]
            positions = torch.arange(first, first + len(part), device=part.device) // every
            pairs = lazy.family.head.pairs(hidden[positions], part)
            parts.append(lazy.mapped(pairs, part))
        return torch.cat(parts).reshape(index.shape) if parts else NotImplemented

    return bound(*args, **kwargs)


def _is_index(value: Any, lazy: LazyLogits) -> bool:
    """Whether these are numbers of columns, of logits that are computed in fp32."""
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, LazyLogits)
        and value.dtype == torch.int64
        and value.device == lazy.device
        and lazy.dtype == torch.float32
    )


_T = torch.Tensor
RULES: dict[Callable, Rule] = {
    **dict.fromkeys((_T.contiguous, _T.detach, torch.detach, _T.clone, torch.clone), _same),
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape), _reshaped),
    **dict.fromkeys(
        (
            _T.mul, torch.mul, _T.__mul__, _T.__rmul__, _T.multiply, torch.multiply, _T.div,
            torch.div, _T.__truediv__, _T.divide, torch.divide, _T.true_divide, torch.true_divide,
        ),
        _scaled,
    ),
    **dict.fromkeys((_T.tanh, torch.tanh), _capped),
    **dict.fromkeys((_T.add, torch.add, _T.__add__, _T.__radd__), _shifted),
    **dict.fromkeys((_T.logsumexp, torch.logsumexp), _logsumexp),
    **dict.fromkeys((_T.gather, torch.gather), _gather),
    _T.to: _cast,
    _T.float: _float,
    _T.__getitem__: _indexed,
    F.cross_entropy: _cross_entropy,
}  # fmt: skip
