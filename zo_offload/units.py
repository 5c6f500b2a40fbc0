"""Which parts of a model move together, and how their parameters lie in flat memory.

A *unit* is the granule that moves: one repeated block of the model (``blocks.py``). Everything
outside every unit, or reached from two, is *ambient*: embeddings, final norm, head, shared tables.

Blocks may be divided further (``granularity.py``), and so may a module that holds many experts
(``experts.py``): then several units share its parameters, each a part of all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from zo_offload.blocks import WRAPPED, named_classes, repeated_blocks
from zo_offload.codec import codec_of
from zo_offload.errors import ConfigError, ModelError
from zo_offload.experts import groups_of, holds_experts, refuse_compiled_experts
from zo_offload.granularity import GRANULARITIES, divide
from zo_offload.ops import Segment, Span
from zo_offload.ops.rank_sums import FactorLayout, lay_out_factors
from zo_offload.trainable.moving import ALWAYS, LowRank, Moving, Rotation
from zo_offload.trainable.overlay import Overlay, Patch
from zo_offload.unmanageable import refuse_compiled

FORWARD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDENTITY = "identity"  # the codec that packs nothing
AMBIENT = -1  # index of the pseudo-unit that holds ambient parameters


@dataclass(frozen=True)
class Unit:
    """Parameters that travel together.

    Attributes:
        index: Position in the order of definition; ``AMBIENT`` for the ambient parameters.
        name: Module path in the model, with the range of experts where it holds some of many; empty
            for ambient.
        spans: Where its parameters lie.
        wire_bytes: Bytes that travel, as they rest: elements in the forward's dtype, and packed
            what is frozen and has a codec.
        rest_bytes: Bytes that stay with the master.
    """

    index: int
    name: str
    spans: tuple[Span, ...]
    wire_bytes: int
    rest_bytes: int

    @property
    def segments(self) -> list[tuple[Span, Segment]]:
        """Every parameter with the span it lies in, in order of memory."""
        return [(span, segment) for span in self.spans for segment in span.segments]

    @property
    def packed_bytes(self) -> int:
        """The most that cross the bus where the wire is packed."""
        return sum(span.packed_bytes for span in self.spans)

    @property
    def plain_bytes(self) -> int:
        """Bytes that the forward reads, in its dtype."""
        return sum(span.plain_bytes for span in self.spans)

    @cached_property
    def is_frozen(self) -> bool:
        """Whether nothing in it is trained: what rests is what travels, at every step."""
        return not any(span.trainable for span in self.spans)

    @property
    def is_packed(self) -> bool:
        """Whether a codec packs what crosses the bus."""
        return any(span.codec != IDENTITY for span in self.spans)

    @property
    def packs_on_its_way(self) -> bool:
        """Whether some of it is packed anew each time that it travels."""
        return any(span.codec != IDENTITY and span.trainable for span in self.spans)

    @property
    def num_parameters(self) -> int:
        """Without padding."""
        return sum(segment.numel for _, segment in self.segments)


# Where a parameter, or a part of it, lies.
Place = tuple[Unit, Span, Segment]


class Overlaid(NamedTuple):
    """A part of a frozen matrix, and what is written into it.

    Attributes:
        place: Of the part.
        patch: What is.
        values: Where the overlay's values lie, all of them.
    """

    place: Place
    patch: Patch
    values: Place


@dataclass(frozen=True)
class ModelMap:
    """A model divided into units and ambient parameters.

    Attributes:
        units: In order of definition.
        ambient: The pseudo-unit of all other floating-point parameters.
        modules: Unit modules, by index; one whose experts are divided stands there for each group.
        parameters: Every managed parameter by its first name.
        aliases: Further names of tied parameters, to the first.
        division: How far blocks are divided, or the names of the classes that are units.
        rotation: When which parameters move; None: all that do, at every step.
        overlays: By the name of their matrix.
        low_rank: How matrices move, where it is by products of small factors.
    """

    units: tuple[Unit, ...]
    ambient: Unit
    modules: tuple[nn.Module, ...]
    parameters: dict[str, nn.Parameter]
    aliases: dict[str, str]
    division: str | tuple[str, ...] = "block"
    rotation: Rotation | None = None
    overlays: Mapping[str, Overlay] = field(default_factory=dict)
    low_rank: LowRank | None = None

    def moves(self, span: Span, step: int) -> bool:
        """Whether the directions of a step move a span; its parameters take their turns alike."""
        if not span.trainable or self.rotation is None:
            return span.trainable
        return self.rotation.moves(span.segments[0].name, step)

    def is_low_rank(self, span: Span) -> bool:
        """Whether a span moves by products of small factors; its parameters move alike."""
        return span.trainable and self.sides_of(span.segments[0]) is not None

    def sides_of(self, segment: Segment) -> tuple[int, int] | None:
        """Rows and columns of a parameter that may move so; None where its directions are dense."""
        return self.low_rank.sides(segment.shape) if self.low_rank is not None else None

    def low_rank_segments(self, unit: Unit) -> list[Segment]:
        """The matrices of a unit that move so."""
        return [segment for span, segment in unit.segments if self.is_low_rank(span)]

    def factors_of(self, segments: Sequence[Segment]) -> FactorLayout:
        """Where the small factors of such matrices lie."""
        assert self.low_rank is not None
        sides = {s.name: side for s in segments if (side := self.sides_of(s)) is not None}
        return lay_out_factors(segments, sides, self.low_rank.rank)

    @property
    def everything(self) -> tuple[Unit, ...]:
        """The ambient pseudo-unit, then the units."""
        return (self.ambient, *self.units)

    @cached_property
    def places(self) -> dict[str, list[Place]]:
        """Where each parameter lies, by first name: a divided one in several places, in order."""
        found: dict[str, list[Place]] = {}
        for unit in self.everything:
            for span, segment in unit.segments:
                found.setdefault(segment.name, []).append((unit, span, segment))
        return found

    @cached_property
    def overlaid(self) -> dict[int, list[Overlaid]]:
        """What is written into units, by index."""
        found: dict[int, list[Overlaid]] = {}
        for matrix, overlay in self.overlays.items():
            (values,) = self.places[overlay.name]
            for place in self.places[matrix]:
                overlaid = Overlaid(place, overlay.patch(place[2]), values)
                found.setdefault(place[0].index, []).append(overlaid)
        return found

    def overlaid_at(self, place: Place) -> Overlaid | None:
        """What is written into a part, if anything is."""
        of_unit = self.overlaid.get(place[0].index, ())
        return next((each for each in of_unit if each.place[2] is place[2]), None)

    @cached_property
    def covered(self) -> set[int]:
        """Identities of the spans that overlays write all of: nobody need decode them before."""
        patches = {
            id(each.place[2]): each.patch for of_unit in self.overlaid.values() for each in of_unit
        }
        spans = [span for unit in self.units for span in unit.spans]
        return {
            id(span)
            for span in spans
            if all(id(s) in patches and patches[id(s)].covers for s in span.segments)
        }

    @property
    def divided(self) -> dict[str, list[Place]]:
        """Those in several places."""
        return {name: places for name, places in self.places.items() if len(places) > 1}

    @property
    def num_parameters(self) -> int:
        """Of the whole model; a tied one counts once."""
        return sum(unit.num_parameters for unit in self.everything)

    @property
    def forward_bytes(self) -> int:
        """Of all parameters in the dtypes that the forward computes in."""
        pairs = [pair for unit in self.everything for pair in unit.segments]
        return sum(segment.numel * span.dtype.itemsize for span, segment in pairs)


def map_model(
    model: nn.Module,
    unit: str | Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    master: str = "fp32",
    codec: str = IDENTITY,
    moving: Moving = ALWAYS,
) -> ModelMap:
    """Divide a model into units and ambient parameters, and lay each out flat.

    Args:
        model: Any module, on any device (``meta`` too).
        unit: How far blocks are divided (``GRANULARITIES``; None: not at all), or the names of the
            classes that are units.
        scales: Factor on z by parameter name (1.0 where absent).
        dtype: What the forward computes in, instead of each parameter's own dtype; the parameters
            that the model asks to keep in fp32 stay so.
        master: What updates of bfloat16 parameters accumulate in; see :class:`Span`.
        codec: How the units' matrices are packed where they cross the bus. Vectors never are.
        moving: What stays on the device, and what takes turns.

    Raises:
        ModelError: No unit was found, or a parameter's dtype cannot be trained.
        ConfigError: A class name matches nothing.
    """
    names, aliases = _parameter_names(model)
    laid_over = {overlay.name: overlay.parameter for overlay in moving.overlays}
    non_negative = {overlay.name for overlay in moving.overlays if overlay.non_negative}
    resident = {id(names[name]) for name in moving.resident}
    found = [_with_its_adapter(model, *each) for each in _find_units(model, unit)]
    blocks = [each for each in found if _holds_more(each[1], resident)]
    refuse_compiled(model, [path for path, _ in blocks])
    owner = _owners(model, [module for _, module in blocks]) | dict.fromkeys(resident, AMBIENT)
    owner |= {id(parameter): AMBIENT for parameter in laid_over.values()}
    turn_of = moving.rotation.group_of if moving.rotation is not None else {}
    pieces = _pieces(blocks, owner, divides=unit == "linear")
    dtypes = {
        name: forward_dtype(model, name, parameter, dtype) for name, parameter in names.items()
    } | dict.fromkeys(laid_over, torch.float32)
    names |= laid_over  # the last, so that nobody's number depends on them
    indices = {name: i for i, name in enumerate(names)}
    members: dict[int, list[str]] = {i: [] for i in range(AMBIENT, len(blocks))}
    for name, parameter in names.items():
        if parameter.is_floating_point() and parameter.numel():
            members[owner[id(parameter)]].append(name)

    def lay_out(index: int, piece: Piece) -> Unit:
        kinds: dict[Kind, list[str]] = {}
        for member in members[piece.block]:
            parameter, computes_in = names[member], dtypes[member]
            dither = (
                parameter.requires_grad and computes_in == torch.bfloat16 and parameter.ndim <= 1
            )
            packs = index != AMBIENT and parameter.ndim > 1
            packed_by = codec_for(codec, computes_in) if packs else IDENTITY
            low, trains = moving.low_rank, parameter.requires_grad
            factored = trains and low is not None and low.sides(parameter.shape) is not None
            kind = Kind(
                computes_in, trains, dither, packed_by, turn_of.get(member), factored,
                member in non_negative,
            )  # fmt: skip
            kinds.setdefault(kind, []).append(member)
        spans: list[Span] = []
        for kind, group in kinds.items():
            shapes = [
                (member, indices[member], *_part(names[member], piece.experts)) for member in group
            ]
            before = spans[-1] if spans else None
            spans.append(_lay_out_span(kind, shapes, scales or {}, before, master))
        wire_bytes, rest_bytes = sum(s.wire_bytes for s in spans), sum(s.rest_bytes for s in spans)
        return Unit(index, piece.name, tuple(spans), wire_bytes, rest_bytes)

    ambient = lay_out(AMBIENT, Piece(AMBIENT, "", model, None))
    units = [lay_out(index, piece) for index, piece in enumerate(pieces)]
    managed = {
        name: parameter
        for name, parameter in names.items()
        if parameter.is_floating_point() and parameter.numel()
    }
    modules = tuple(piece.module for piece in pieces)
    division = unit if isinstance(unit, str) else tuple(unit or ()) or "block"
    overlays = {overlay.matrix: overlay for overlay in moving.overlays}
    return ModelMap(
        tuple(units), ambient, modules, managed, aliases, division, moving.rotation, overlays,
        moving.low_rank,
    )  # fmt: skip


class BlockMap(NamedTuple):
    """A model's blocks, however they are divided into units.

    Attributes:
        paths: Of the blocks, in order.
        block_of: Number of the block that each parameter lies in, by first name; ``AMBIENT`` where
            it lies in none, or in two.
    """

    paths: list[str]
    block_of: dict[str, int]


def block_map(model: nn.Module, unit: str | Sequence[str] | None = None) -> BlockMap:
    """The blocks of a model; those of named classes where ``unit`` names classes."""
    blocks = _find_units(model, None if isinstance(unit, str) else unit)
    names, _ = _parameter_names(model)
    owner = _owners(model, [module for _, module in blocks])
    paths = [path for path, _ in blocks]
    return BlockMap(paths, {name: owner[id(p)] for name, p in names.items()})


def in_units(model: nn.Module, unit: str | Sequence[str] | None = None) -> set[str]:
    """First names of the parameters that travel with a unit where blocks are divided so."""
    names, _ = _parameter_names(model)
    owner = _owners(model, [module for _, module in _find_units(model, unit)])
    return {name for name, parameter in names.items() if owner[id(parameter)] != AMBIENT}


def _find_units(model: nn.Module, unit: str | Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    if unit is None or isinstance(unit, str):
        assert unit is None or unit in GRANULARITIES, unit
        return divide(repeated_blocks(model), unit or "block")
    return named_classes(model, unit)


class Piece(NamedTuple):
    """What becomes a unit: a block, or some experts of one."""

    block: int
    name: str
    module: nn.Module
    experts: range | None


def _pieces(
    blocks: Sequence[tuple[str, nn.Module]], owner: Mapping[int, int], divides: bool
) -> list[Piece]:
    """The units to be, in order; where asked for, experts in groups."""
    kept = [
        not (divides and holds_experts(module) and _owns_all(module, index, owner))
        for index, (_, module) in enumerate(blocks)
    ]
    most = max((_size(module) for (_, module), k in zip(blocks, kept, strict=True) if k), default=0)
    pieces: list[Piece] = []
    for index, (path, module) in enumerate(blocks):
        groups = [] if kept[index] else groups_of(module, most)
        if len(groups) < 2:
            pieces.append(Piece(index, path, module, None))
            continue
        refuse_compiled_experts(path, module)
        pieces += [
            Piece(index, f"{path}[{each.start}:{each.stop}]", module, each) for each in groups
        ]
    return pieces


def _owns_all(module: nn.Module, index: int, owner: Mapping[int, int]) -> bool:
    """Whether nobody else reads its parameters, and all of them are trained or read as floats."""
    return all(owner[id(p)] == index and p.is_floating_point() for p in module.parameters())


def _with_its_adapter(model: nn.Module, path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The layer that ``peft`` has put around a layer: adapters such as DoRA read its weight."""
    outside = path.removesuffix(WRAPPED)
    return (path, module) if outside == path else (outside, model.get_submodule(outside))


def _holds_more(module: nn.Module, resident: set[int]) -> bool:
    """Whether anything is left to travel where these parameters stay on the device."""
    return not resident or any(id(parameter) not in resident for parameter in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _part(parameter: nn.Parameter, experts: range | None) -> tuple[tuple[int, ...], int]:
    """Shape of the part that these experts are, and the elements before it."""
    shape = tuple(parameter.shape)
    if experts is None:
        return shape, 0
    return (len(experts), *shape[1:]), experts.start * (parameter.numel() // shape[0])


def _parameter_names(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Parameters by first name, in order, and the further names of tied ones."""
    first: dict[int, str] = {}
    names: dict[str, nn.Parameter] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
            names[name] = parameter
    return names, aliases


def _owners(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, int]:
    """For each parameter the one unit that reaches it, or ``AMBIENT``."""
    unit_of_module: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            unit_of_module.setdefault(id(module), set()).add(index)
    reached: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            reached.setdefault(id(parameter), set()).update(
                unit_of_module.get(id(module), {AMBIENT})
            )
    return {
        key: next(iter(owners)) if len(owners) == 1 else AMBIENT for key, owners in reached.items()
    }


def codec_for(name: str, dtype: torch.dtype) -> str:
    """The codec, or none where it would save nothing."""
    codec = codec_of(name)
    try:
        codec.check(dtype)
    except ConfigError as error:
        raise ConfigError(str(error).replace("codec", "zeroth_order.wire", 1)) from None
    return name if codec.shrinks(dtype) else IDENTITY


class Kind(NamedTuple):
    """What the parameters of a span have in common."""

    dtype: torch.dtype
    trainable: bool
    dither: bool
    codec: str
    turn: int | None
    low_rank: bool
    non_negative: bool


def _lay_out_span(
    kind: Kind,
    members: Sequence[tuple[str, int, tuple[int, ...], int]],
    scales: Mapping[str, float],
    before: Span | None,
    master: str,
) -> Span:
    """A span of ``(name, parameter index, shape, offset)`` of one kind, behind another one."""
    segments: list[Segment] = []
    start = 0
    for name, index, shape, offset in members:
        segment = Segment(name, index, shape, start, scales.get(name, 1.0), offset)
        segments.append(segment)
        start += segment.padded
    wire_offset = before.wire_offset + before.wire_bytes if before else 0
    rest_offset = before.rest_offset + before.rest_bytes if before else 0
    packed_offset = before.packed_offset + before.packed_bytes if before else 0
    plain_offset = before.plain_offset + before.plain_bytes if before else 0
    return Span(
        kind.dtype, tuple(segments), wire_offset, rest_offset, kind.trainable, kind.dither, master,
        kind.codec, packed_offset, plain_offset, kind.non_negative,
    )  # fmt: skip


def forward_dtype(
    model: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype | None
) -> torch.dtype:
    """What the forward computes in with a parameter, where it is asked to compute in ``dtype``.

    Raises:
        ModelError: The parameter is of none that it may compute in.
    """
    if not parameter.is_floating_point():
        return parameter.dtype
    if parameter.dtype not in FORWARD_DTYPES:
        raise ModelError(
            f"parameter {name} is {parameter.dtype}; the forward may compute in float32, bfloat16 "
            "or float16"
        )
    if dtype is None:
        return parameter.dtype
    exact = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        exact |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if exact & set(name.split(".")) else dtype
