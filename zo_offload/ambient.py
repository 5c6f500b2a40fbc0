"""Ambient parameters, substituted wherever code reads them.

A lane's forward runs under a ``TorchFunctionMode``: whatever torch function is called with an
ambient parameter, by whichever module, sees the lane's own perturbed copy. (Swapping at the owning
module would miss tables that other modules read, such as DeBERTa's relative embeddings or CLIP's
scale.)

Four ways, by size and use:

* a large table that only embedding layers read is never copied: its rows are perturbed as gathered;
* with ``head_chunk`` so is the head, tied or not, and logits are lazy (``lazy_logits.py``): its
  rows are perturbed so many at a time, when a loss asks for them;
* another large tensor has one copy, rebuilt when a lane of another probe or sign reads it;
* a small tensor keeps one copy a probe and sign for the length of a visit.

So are single experts, where units divide what holds many (``expert_reads.py``).

The mode also keeps losses exact: the output embedding of a half-precision model yields fp32 logits,
and the inputs of loss functions are upcast. (bfloat16 logits alone cost four times the noise.)
"""

from collections.abc import Callable, Container, Sequence
from operator import is_not
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from zo_offload import ops
from zo_offload.chunked_head import HeadChunks, LaneHead
from zo_offload.errors import ModelError
from zo_offload.exact_head import exact_linear
from zo_offload.expert_reads import DividedExperts, ExpertReads, Visitor
from zo_offload.factors import Pair
from zo_offload.joined import SharedMatrices
from zo_offload.lazy_logits import Family, LazyLogits
from zo_offload.lazy_rules import lazy_linear
from zo_offload.low_rank_reads import LowRankReads, corrected, read_otherwise
from zo_offload.offload.planner import copy_bytes, is_small
from zo_offload.ops import Draw, Segment, Span, rank_sums
from zo_offload.units import AMBIENT
from zo_offload.views import address_of, owned
from zo_offload.weights import Weights
from zo_offload.writes import is_harmless, reads_values, written_by

_HALF = (torch.bfloat16, torch.float16)
_LOSSES = {
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.ctc_loss,
    F.multi_margin_loss, F.cosine_embedding_loss, F.margin_ranking_loss, F.triplet_margin_loss,
    F.hinge_embedding_loss,
}  # fmt: skip


class AmbientCopies:
    """The perturbed copies of ambient parameters on the device.

    Args:
        model: Where the parameters are used.
        weights: Holds their values.
        num_draws: Copies of a small tensor; a visit of more draws rebuilds them.
        head_chunk: Rows of the head that are perturbed at a time (None: all).
    """

    def __init__(
        self, model: nn.Module, weights: Weights, num_draws: int, head_chunk: int | None = None
    ) -> None:
        self._weights = weights
        self._num_draws = num_draws
        self.places = {
            id(weights.map.parameters[segment.name]): (span, segment)
            for span, segment in weights.map.ambient.segments
        }
        self.unit_of = {
            id(weights.map.parameters[segment.name]): (unit.index, segment.name)
            for unit in weights.map.units
            for _, segment in unit.segments
        }
        self.experts = DividedExperts(weights)
        self._whole = [
            frozenset(
                id(parameter)
                for parameter in (weights.map.parameters[each.name] for _, each in unit.segments)
                if parameter not in self.experts
            )
            for unit in weights.map.units
        ]
        self.gathered = {
            id(weights.map.parameters[name])
            for name in gathered_parameters(model, weights.map.ambient.segments)
        }
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._held: dict[tuple[str, int], tuple[int, Draw | None]] = {}
        self.addresses: set[int | None] = {weights.ambient_address}  # views of it never get out
        self.addresses.discard(None)
        self.head = head_of(model)
        self.chunks: HeadChunks | None = None
        self.low_rank: LowRankReads | None = None
        self.shared: SharedMatrices | None = None  # products of lanes are joined
        if weights.map.low_rank is not None:
            copied = read_otherwise(model, weights.map)
            self.low_rank = LowRankReads(weights, num_draws, copied)
            self.addresses |= self.low_rank.addresses
        if head_chunk is not None:
            span, segment = self.places[id(self.head)]
            factors = self.low_rank.ambient if self.low_rank is not None else None
            self.chunks = HeadChunks(weights, span, segment, head_chunk, factors)
            self.gathered |= {id(self.head)} if span.trainable else set()

    def value(self, parameter: object, draw: Draw | None, rank: int) -> torch.Tensor:
        """The parameter along ``draw``; ``rank`` counts the visit's distinct draws from 0."""
        span, segment = self.places[id(parameter)]
        pair = self.ambient_pair(segment, draw)
        if pair is None and (draw is None or not self._weights.map.moves(span, draw.step)):
            return self.at_rest(parameter)
        key = (segment.name, rank % self._num_draws if is_small(span, segment) else 0)
        wanted = (len(self._weights.history), draw)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._weights.arena.take("ambient copies", copy_bytes(span, segment))
            buffer = self._buffers[key] = buffer.view(span.dtype)
            self.addresses.add(address_of(buffer))
        if self._held.get(key) != wanted:
            wire = self._weights.ambient_values(span)
            if pair is not None:
                rank_sums.add_product(segment, wire, buffer, *pair)
            else:
                assert draw is not None
                ops.perturb(
                    span, wire, buffer, self._weights.direction, draw, segment.start, segment.padded
                )
            self._held[key] = wanted
        return buffer[: segment.numel].view(segment.shape)

    def rows(self, parameter: object, indices: torch.Tensor, draw: Draw | None) -> torch.Tensor:
        """Rows ``[len(indices), width]`` of a table, perturbed along ``draw``."""
        span, segment = self.places[id(parameter)]
        pair = self.ambient_pair(segment, draw)
        if pair is not None:
            return rank_sums.rows_with_product(self.at_rest(parameter), indices, *pair)
        if draw is None or not self._weights.map.moves(span, draw.step):
            return self.value(parameter, None, 0).index_select(0, indices)
        return ops.perturb_rows(
            span,
            segment,
            self._weights.ambient_values(span),
            indices,
            self._weights.direction,
            draw,
        )

    def at_rest(self, parameter: object) -> torch.Tensor:
        """The parameter as the device holds it; what it moves by may be in small factors."""
        span, segment = self.places[id(parameter)]
        values = self._weights.ambient_values(span)
        return values[segment.start : segment.start + segment.numel].view(segment.shape)

    def ambient_pair(self, segment: Segment, draw: Draw | None) -> Pair | None:
        """Small factors of an ambient matrix that moves by them, where they are not 0."""
        if self.low_rank is None or segment.name not in self.low_rank.ambient:
            return None
        return self.low_rank.ambient.pair(segment.name, draw)

    def moves_by_factors(self, table: object) -> bool:
        """Whether an ambient parameter does."""
        return (
            self.low_rank is not None
            and id(table) in self.places
            and self.places[id(table)][1].name in self.low_rank.ambient
        )

    def read_as_they_are(self, unit: int) -> Container[int]:
        """``id`` of parameters that a lane in a unit may be given by any function that reads."""
        return () if self.makes_products or unit == AMBIENT else self._whole[unit]

    @property
    def makes_products(self) -> bool:
        """Whether some products are not the model's own: by small factors, or of many lanes."""
        return self.low_rank is not None or self.shared is not None

    @property
    def names(self) -> set[str]:
        """Of the parameters that have a perturbed copy."""
        of_units = self.low_rank.names if self.low_rank is not None else set()
        return {name for name, _ in self._buffers} | of_units

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a managed parameter, or lies in memory that holds one."""
        if id(tensor) in self.places or id(tensor) in self.unit_of:
            return True
        address = address_of(tensor)
        return address is not None and (
            address == self._weights.scratch_address or address in self.addresses
        )

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name of a managed parameter; None for a view of one."""
        if id(tensor) in self.places:
            return self.places[id(tensor)][1].name
        return self.unit_of.get(id(tensor), (0, None))[1]

    def invalidate(self) -> None:
        """Forget what the copies hold."""
        self._held.clear()
        if self.low_rank is not None:
            self.low_rank.invalidate()
        if self.chunks is not None:
            self.chunks.invalidate()


def gathered_parameters(model: nn.Module, segments: Sequence[tuple[Span, Segment]]) -> set[str]:
    """Names of the large trainable tables that only ``nn.Embedding`` modules own."""
    readers: dict[int, set[bool]] = {}
    names = dict(model.named_parameters())
    for module in model.modules():
        plain = isinstance(module, nn.Embedding) and module.max_norm is None
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), set()).add(plain)
    return {
        segment.name
        for span, segment in segments
        if segment.name in names  # else it is an overlay's
        and span.trainable
        and not is_small(span, segment)
        and readers[id(names[segment.name])] == {True}
    }


def surely_gathered(model: nn.Module, segments: Sequence[tuple[Span, Segment]]) -> set[str]:
    """Those of :func:`gathered_parameters` that a plan may count on never being copied.

    Any table may be read through its ``weight`` as well (Whisper's positions, DeBERTa's relative
    embeddings, a head that is tied in code), which shows only when it happens. So a copy is counted
    unless the model itself says that the table is its input embedding, of the plainest kind, and
    that its head is another parameter. Should code read even that one whole, its copy is refused
    where a budget has no room for it, and is in the plan from then on.
    """
    embedding, head = _embeddings_of(model)
    table, other = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if type(embedding) is not nn.Embedding or other is None or other is table:
        return set()
    names = {name for name, parameter in model.named_parameters() if parameter is table}
    return names & gathered_parameters(model, segments)


def head_of(model: nn.Module) -> nn.Parameter | None:
    """The weight of what a model names as its output embedding."""
    return getattr(_embeddings_of(model)[1], "weight", None)


def chunked_head(model: nn.Module, segments: Sequence[tuple[Span, Segment]]) -> str | None:
    """Name of the head if it can be perturbed a part at a time; else None."""
    head = head_of(model)
    names = {name for name, parameter in model.named_parameters() if parameter is head}
    return next(
        (each.name for _, each in segments if each.name in names and len(each.shape) == 2), None
    )


def _embeddings_of(model: Any) -> tuple[Any, Any]:
    """What a model names as its input and output embedding (None: nothing)."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name, lambda: None)())
        except NotImplementedError:  # transformers' word for "there is none"
            found.append(None)
    return found[0], found[1]


class AmbientMode(TorchFunctionMode):
    """Active while one lane runs: substitutes ambient parameters and keeps losses exact.

    Args:
        copies: Of the ambient parameters.
        draw: Where the lane's weights stand.
        rank: Of the draw among those of the visit.
        lane: Who reads.
    """

    def __init__(self, copies: AmbientCopies, draw: Draw | None, rank: int, lane: Visitor) -> None:
        super().__init__()
        self._copies = copies
        self._draw = draw
        self._rank = rank
        self._lane = lane
        self._reads = ExpertReads(copies.experts, lane) if copies.experts.names else None
        self._families: WeakSet[Family] = WeakSet()  # of lazy logits
        self.was_needed = False  # did what functions would not have done by themselves

    def step_aside(self) -> bool:
        """Leave torch functions alone until :meth:`come_back`; not while another mode is on.

        Being asked about a function costs as much again as a small one takes.
        """
        if torch._C._len_torch_function_stack() != 1:
            return False
        super().__exit__(None, None, None)
        return True

    def come_back(self) -> None:
        """Be asked about every torch function again."""
        self.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        for family in self._families:
            family.closed = True
        super().__exit__(*exc_info)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._reads is not None and self._reads.is_on:
            return self._with_experts(self._reads, func, args, kwargs)
        return self._call(func, args, kwargs)

    def _with_experts(
        self, reads: ExpertReads, func: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        self.was_needed = True
        if reads.is_read(func, args):
            return reads.read(*args)
        if reads_values(func):
            reads.check(func, args, kwargs)
        result = self._call(func, args, kwargs)
        reads.note(result)
        return result

    def _call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        own = self._copies.read_as_they_are(self._lane.inside)
        if func not in _LOSSES and is_harmless(func, args, kwargs, own):  # most calls by far
            return func(*args, **kwargs)
        self.was_needed, needed_before = True, self.was_needed
        for target in written_by(func, args, kwargs):
            self._before_writing(func, target)
        if func is F.embedding:
            table = args[1] if len(args) > 1 else kwargs["weight"]
            gathers = self._draw is not None and id(table) in self._copies.gathered
            if gathers or self._copies.moves_by_factors(table):
                return self._gather(args[0] if args else kwargs["input"], table)
        is_head = func is F.linear and self._is_head(args, kwargs)
        if is_head and self._copies.chunks is not None:
            if not torch.is_grad_enabled():
                return self._lazy_logits(func, *args, **kwargs)
            self._copies.chunks.tell("a gradient")
        if func is F.linear and self._copies.makes_products:
            product = self._own_product(is_head, *args, **kwargs)
            if product is not None:
                return product
        values = [self._substitute(func, value) for value in args]
        named = {key: self._substitute(func, value) for key, value in kwargs.items()}
        replaces = any(map(is_not, values, args)) or any(
            map(is_not, named.values(), kwargs.values())
        )
        if func in _LOSSES:
            values = [_exact(value) for value in values]
            named = {key: _exact(value) for key, value in named.items()}
        elif not is_head and not replaces and not self._families:
            self.was_needed = needed_before
        result = exact_linear(*values, **named) if is_head else func(*values, **named)
        return owned(result, self._copies.addresses) if replaces else result

    def _own_product(
        self, is_head: bool, input: Any, weight: Any, bias: Any = None
    ) -> torch.Tensor | None:
        """The product with a matrix that moves by small factors, or that lanes share; else None."""
        pair, at_rest = self._pair(weight), weight
        shared = self._copies.shared
        if pair is None and (shared is None or not shared.joins(weight, input)):
            return None
        if id(weight) in self._copies.places:
            at_rest = self._copies.at_rest(weight)
        else:
            self._check_visited(F.linear, weight)
        input = owned(self._substitute(F.linear, input), self._copies.addresses)
        product = self._base_product(is_head, input, weight, at_rest, bias)
        return corrected(product, input, pair) if pair is not None else product

    def _base_product(
        self, is_head: bool, input: Any, weight: Any, at_rest: Any, bias: Any
    ) -> torch.Tensor:
        """With what all draws of a visit share."""
        shared, linear = self._copies.shared, exact_linear if is_head else F.linear
        if shared is None or not shared.joins(weight, input):
            return linear(input, at_rest, self._substitute(F.linear, bias))
        own = bias is not None and bias not in shared
        common = None if own else self._substitute(F.linear, bias)
        key = id(weight), id(None if own else bias)
        product = self._lane.join(key, input, lambda rows: linear(rows, at_rest, common))
        # a lane's own bias is looked up now: others may have had the memory of its copy meanwhile
        return product + self._substitute(F.linear, bias) if own else product

    def _pair(self, parameter: Any) -> Pair | None:
        """Small factors of a parameter that moves by them, where they are not 0."""
        copies = self._copies
        if copies.low_rank is None:
            return None
        if id(parameter) in copies.places:
            return copies.ambient_pair(copies.places[id(parameter)][1], self._draw)
        return copies.low_rank.pair(parameter, self._lane.inside, self._draw)

    def _gather(self, indices: torch.Tensor, table: nn.Parameter) -> torch.Tensor:
        rows = self._copies.rows(table, indices.reshape(-1), self._draw)
        return rows.view(*indices.shape, table.shape[1])

    def _lazy_logits(
        self, func: Callable, input: Any, weight: nn.Parameter, bias: torch.Tensor | None = None
    ) -> LazyLogits:
        assert self._copies.chunks is not None
        hidden = owned(self._substitute(func, input), self._copies.addresses)
        if bias is not None:  # a copy: by the time it is added, others may have been there
            bias = self._substitute(func, bias).to(torch.float32, copy=True)
        head = LaneHead(self._copies, self._copies.chunks, self._draw, self._rank, bias)
        logits = lazy_linear(head, hidden)
        self._families.add(logits.family)
        return logits

    def _is_head(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        return weight is self._copies.head

    def _substitute(self, func: Callable, value: Any) -> Any:
        if type(value) is torch.Tensor:  # no parameter; a compiled unit must not depend on its id
            return value
        if id(value) in self._copies.places:
            if reads_values(func):
                return self._copies.value(value, self._draw, self._rank)
        elif id(value) in self._copies.unit_of:
            self._check_visited(func, value)
            if self._copies.low_rank is not None and self._draw is not None:
                pair = self._pair(value) if reads_values(func) else None
                if pair is not None:
                    copy = self._copies.low_rank.copy(value, pair, self._draw)
                    self._copies.addresses |= self._copies.low_rank.addresses
                    return copy
        elif type(value) in (list, tuple) and any(isinstance(item, nn.Parameter) for item in value):
            return type(value)(self._substitute(func, item) for item in value)
        return value

    def _before_writing(self, func: Callable, target: Any) -> None:
        if isinstance(target, (list, tuple)):
            for item in target:
                self._before_writing(func, item)
            return
        for family in self._families:
            if isinstance(target, torch.Tensor) and family.is_made_of(address_of(target)):
                family.make_all(getattr(func, "__name__", str(func)))
        if isinstance(target, torch.Tensor) and self._copies.holds(target):
            name = self._copies.name_of(target) or "a weight, through a view of it,"
            raise ModelError(
                f"{name} is written in place by {getattr(func, '__name__', func)} in the forward; "
                "lanes share its memory and masters change by updates alone: compute a new tensor "
                "instead"
            )

    def _check_visited(self, func: Callable, parameter: nn.Parameter) -> None:
        index, name = self._copies.unit_of[id(parameter)]
        if parameter in self._copies.experts:
            if reads_values(func):
                self._copies.experts.refuse_whole(func, parameter)
        elif index != self._lane.inside and reads_values(func):
            raise ModelError(
                f"{name} was read by {getattr(func, '__name__', func)} outside the forward of its "
                "unit, where it holds no values; make a larger class the unit: "
                '"unit": ["TheClassThatReadsIt"]'
            )


def _exact(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value
