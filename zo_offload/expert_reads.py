"""Single experts of parameters that several units divide among themselves, read in a forward.

Of such a parameter a lane sees what it holds of the group at hand: ``parameter[i]`` makes the lane
stand before the group of expert i, and then is a view of the scratch. Such a view holds until the
lane stops at the next group, so that a forward which uses an older one is refused, and so is one
that reads all experts at once.
"""

import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from zo_offload.errors import ModelError
from zo_offload.experts import ONE_BY_ONE
from zo_offload.joined import Product
from zo_offload.units import AMBIENT
from zo_offload.views import address_of
from zo_offload.weights import Weights


class Visitor(Protocol):
    """A lane, as what it reads knows it.

    Attributes:
        inside: Index of the unit that it is in; ``AMBIENT`` between units.
        experts: Units of the module with divided experts that it is in.
    """

    inside: int
    experts: range

    def arrive(self, unit: int) -> None:
        """Stand before a unit until it has been written."""
        ...

    def join(self, matrix: Hashable, input: torch.Tensor, product: Product) -> torch.Tensor:
        """The product of an input with a matrix, maybe together with other lanes' inputs."""
        ...


class DividedExperts:
    """The divided parameters of a model, and where the scratch has their parts.

    Args:
        weights: Of the model.
    """

    def __init__(self, weights: Weights) -> None:
        self.scratch_address = weights.scratch_address
        self.names: dict[int, str] = {}
        self._parts: dict[int, list[tuple[int, torch.Tensor]]] = {}  # of each expert
        for name, places in weights.map.divided.items():
            parameter = weights.map.parameters[name]
            self.names[id(parameter)] = name
            self._parts[id(parameter)] = [
                (unit.index, expert)
                for unit, span, segment in places
                for expert in weights.scratch_view(span, segment)
            ]

    def __contains__(self, value: object) -> bool:
        return id(value) in self.names

    def expert(self, parameter: torch.Tensor, number: int) -> tuple[int, torch.Tensor]:
        """Unit of an expert, and the expert while the scratch holds that unit."""
        experts = self._parts[id(parameter)]
        if not -len(experts) <= number < len(experts):
            raise IndexError(
                f"index {number} is out of bounds for dimension 0 with size {len(experts)}"
            )
        return experts[number]

    def refuse_whole(self, func: Callable, parameter: torch.Tensor) -> None:
        """Not all experts are there.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"{self.names[id(parameter)]} was read whole by {getattr(func, '__name__', func)}, but "
            "its experts move in groups; let the forward read one expert at a time (transformers: "
            f'model.set_experts_implementation("{ONE_BY_ONE}")), or keep them together: '
            '"unit": "sublayer"'
        )


class ExpertReads:
    """What one lane reads of them.

    Args:
        experts: The divided parameters.
        lane: Who reads.
    """

    def __init__(self, experts: DividedExperts, lane: Visitor) -> None:
        self._experts = experts
        self._lane = lane
        self._views: dict[int, weakref.ref[torch.Tensor]] = {}
        self._unit = AMBIENT  # that they show experts of

    def is_read(self, func: Callable, args: Sequence[Any]) -> bool:
        """Whether a function reads one expert."""
        return (
            func is torch.Tensor.__getitem__
            and args[0] in self._experts
            and _number(args[1]) is not None
        )

    def read(self, parameter: nn.Parameter, index: Any) -> torch.Tensor:
        """``parameter[index]``, after the lane has stood before the expert's group.

        Raises:
            ModelError: The lane is not in the forward of the module that owns the parameter.
        """
        number = _number(index)
        assert number is not None
        unit, expert = self._experts.expert(parameter, number)
        if unit not in self._lane.experts:
            raise ModelError(
                f"{self._experts.names[id(parameter)]} was read outside the forward of its module, "
                'where its experts hold no values; make a larger class the unit: "unit": '
                '["TheClassThatReadsIt"]'
            )
        if unit != self._lane.inside:
            self._lane.arrive(unit)
            self._views.clear()
            self._unit = unit
        result = expert[index[1:]] if isinstance(index, tuple) else expert
        self.note(result)
        return result

    def check(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse what the scratch no longer holds.

        Raises:
            ModelError: An argument is a view of a group that the lane has left.
        """
        for tensor in _tensors([*args, *kwargs.values()]):
            if self._in_scratch(tensor) and not self._holds(tensor):
                raise ModelError(
                    f"{getattr(func, '__name__', func)} was given an expert of a group that the "
                    "forward has left, whose memory holds other experts now; use an expert before "
                    'the next one is read, or keep them together: "unit": "sublayer"'
                )

    def note(self, result: Any) -> None:
        """Remember what shows experts of the group at hand."""
        for tensor in _tensors([result]):
            if self._is_there and self._in_scratch(tensor):
                self._views[id(tensor)] = weakref.ref(tensor)

    @property
    def is_on(self) -> bool:
        """Whether the lane is where experts are read."""
        inside = self._lane.inside
        return bool(self._lane.experts) and (inside == AMBIENT or inside in self._lane.experts)

    @property
    def _is_there(self) -> bool:
        return self._lane.inside == self._unit != AMBIENT

    def _in_scratch(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):  # of another unit, or divided: looked at elsewhere
            return False
        return address_of(tensor) == self._experts.scratch_address

    def _holds(self, tensor: torch.Tensor) -> bool:
        held = self._views.get(id(tensor))
        return self._is_there and held is not None and held() is tensor


def _number(index: Any) -> int | None:
    """Which one along the first axis; None for several."""
    if isinstance(index, tuple):
        return _number(index[0]) if index else None
    if isinstance(index, torch.Tensor):
        single = not index.ndim and not index.is_floating_point() and index.dtype != torch.bool
        return int(index) if single else None
    try:
        return None if isinstance(index, bool) else operator.index(index)
    except TypeError:
        return None


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
