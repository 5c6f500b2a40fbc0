"""What torch keeps for a thread, of which each lane has its own while it runs.

Lanes take turns in one thread, at any place in the model's code. So whatever that code may have
entered around a unit (``no_grad``, autocast, a mode) goes with the lane that entered it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Autocast(NamedTuple):
    """Of a kind of device."""

    enabled: bool
    dtype: torch.dtype
    cache: bool


class LaneState:
    """A lane's, while others run; it begins with the caller's autocast.

    Args:
        kind: Of the device, as ``torch.device.type``.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._modes: list[Any] = []
        self._operator_modes: list[Any] = []
        self._callers_operator_modes = 0
        self._grad = False
        # never cached: a cast copy would outlive the weights it was made from
        self._autocast = _autocast(kind)._replace(cache=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Set while the lane runs; what it leaves is kept, and the caller's put back."""
        modes, autocast = _take_modes(), _autocast(self._kind)
        try:
            with torch.inference_mode():
                self._enter()
                try:
                    yield
                finally:
                    self._leave()
        finally:
            _set_autocast(self._kind, autocast)
            _put_modes(modes)

    def _enter(self) -> None:
        if self._grad:
            torch._C._set_grad_enabled(True)
        _set_autocast(self._kind, self._autocast)
        _put_modes(self._modes)
        self._callers_operator_modes = torch._C._len_torch_dispatch_stack()
        for mode in reversed(self._operator_modes):
            torch._C._push_on_torch_dispatch_stack(mode)

    def _leave(self) -> None:
        entered = torch._C._len_torch_dispatch_stack() - self._callers_operator_modes
        pop = torch._C._pop_torch_dispatch_stack
        self._operator_modes = [pop(None) for _ in range(entered)]
        self._modes = _take_modes()
        self._autocast = _autocast(self._kind)
        self._grad = torch.is_grad_enabled()
        if self._autocast.enabled:
            torch.clear_autocast_cache()  # all lanes have one


def _take_modes() -> list[Any]:
    """Function modes, innermost first; none is on afterwards."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._pop_torch_function_stack() for _ in range(count)]


def _put_modes(modes: list[Any]) -> None:
    for mode in reversed(modes):
        torch._C._push_on_torch_function_stack(mode)


def _autocast(kind: str) -> Autocast:
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return Autocast(enabled, dtype, torch.is_autocast_cache_enabled())


def _set_autocast(kind: str, wanted: Autocast) -> None:
    if wanted == _autocast(kind):
        return
    torch.set_autocast_enabled(kind, wanted.enabled)
    torch.set_autocast_dtype(kind, wanted.dtype)
    torch.set_autocast_cache_enabled(wanted.cache)
