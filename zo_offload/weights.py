"""A model whose weights live in a store: take it over, keep units current, read them back.

After :class:`Weights` takes a model over, its parameters hold no values outside a visit. Those of a
unit point, permanently, into one scratch buffer at a fixed address, into which the perturbed copy
of the unit at hand is written; ambient parameters are substituted when code reads them
(``ambient.py``), and so are single experts of parameters that units divide. What remains in them
reads as NaN. ``state_dict()`` is served from the masters (``masters.py``).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from zo_offload import ops
from zo_offload.clock import KERNEL
from zo_offload.converted import Base
from zo_offload.factors import UnitFactors
from zo_offload.masters import Masters
from zo_offload.offload.arena import Arena
from zo_offload.offload.memory import give_back_freed
from zo_offload.offload.packing import Packer
from zo_offload.offload.residency import DEVICE, NVME
from zo_offload.offload.run_files import RunFiles
from zo_offload.offload.slot import Identity
from zo_offload.offload.streamer import Slot, Streamer
from zo_offload.offload.trial import Trial
from zo_offload.ops import Draw, Segment, Span
from zo_offload.overlays import Overlays
from zo_offload.parts import joined, part_of
from zo_offload.placement import Placement
from zo_offload.resting import fill_unit, seen
from zo_offload.served import serve_state_dict
from zo_offload.tiers import Tiers
from zo_offload.units import AMBIENT, IDENTITY, ModelMap, Place, Unit
from zo_offload.unmanageable import taken
from zo_offload.views import address_of, nothing

NAN_BYTE = 0xFF  # repeated, it is NaN in every floating-point format


class Weights(Masters):
    """Takes a model's parameters over.

    Args:
        model: Holds the initial values; its parameters are emptied unit by unit.
        model_map: Its units.
        placement: Where weights rest.
        direction: Distribution of z.
        lag: Steps that units' masters may be behind.
        base: Holds the units' initial values, where the model is a converted one and does not.

    Attributes:
        tiers: Where each unit rests, by index.
        at: Their stores.
        base: The files of a converted model that it began as.
        base_sha256: Digest of the base weights, where it is known without reading them.
        poison: Overwrite the scratch with NaN after every pass through a unit (for tests; costs a
            pass over the scratch).
    """

    def __init__(
        self,
        model: nn.Module,
        model_map: ModelMap,
        placement: Placement,
        direction: str,
        lag: int = 0,
        base: Base | None = None,
    ) -> None:
        self.poison = False
        self.base_sha256 = base.sha256 if base is not None else None
        self.base = base
        self._closed = False
        self.arena = Arena(placement.device, placement.device_budget)
        self.tiers = placement.tiers
        self._pins = placement.pin_memory and placement.device.type == "cuda"
        self.at = Tiers(model_map, placement, self.arena, self._pins, base)
        super().__init__(model_map, self.at.stores, direction, lag, self.at.carried)
        largest = max(unit.plain_bytes for unit in model_map.units)
        self._scratch = self.arena.take("scratch", largest)
        self._scratch_holds: tuple[int, int, Draw | None] | None = None
        self._holds_unmoved: tuple[int, int, int] | None = None  # spans of a unit at a step
        self._wires: list[torch.Tensor] = []  # what the unit in the scratch was decoded from
        self._overlays = Overlays(model_map, self.arena, direction)
        self._overlaid_along: tuple[Draw | None] | None = None
        self.factors = UnitFactors(self) if model_map.low_rank is not None else None
        self._packed_here: torch.Tensor | None = None
        self.pipeline: Streamer | None = None  # where all units rest on the device, nothing moves
        streamed = [unit for unit in model_map.units if not self._is_resident(unit)]
        if streamed:
            travels = placement.updates_on_device is not False
            if placement.updates_on_device is not True and any(
                unit.packs_on_its_way for unit in streamed
            ):
                largest = max(unit.packed_bytes for unit in streamed)
                self._packer = Packer(largest, self._pins)
            self.pipeline = Streamer(
                streamed,
                self.brought,
                self.arena,
                placement.num_slots,
                with_rest=travels,
                announce=self.expect,
                read_ahead=self.at.read_ahead,
                clock=self.clock,
            )
        self._updates_on_device = bool(placement.updates_on_device)
        self._trial: Trial | None = None
        if placement.updates_on_device is None and not all(unit.is_frozen for unit in streamed):
            self._trial = Trial(("updates on the host", "on the device"), max(lag, 1))
        self._hooks: list[Any] = []
        self._given: dict[str, tuple[torch.dtype, torch.device]] = {}  # what was, before emptied
        self._owners = [model, *(module for module in model.modules() if module._parameters)]
        try:
            self._take_over()
            self._ambient_wire = self._place_ambient(placement.device)
            self._hooks += serve_state_dict(model, self.map.parameters, self.value)
        except BaseException:
            self._undo()
            raise
        taken.update(self._owners)

    def _is_resident(self, unit: Unit) -> bool:
        return self.tiers[unit.index] == DEVICE

    # -- visits --

    def begin_visit(self, looks: bool = False) -> None:
        """Make the ambient values current and let the pipeline run ahead.

        Args:
            looks: Lanes see the weights as they are; else perturbed, to train.
        """
        if self.pipeline is not None:
            self._choose_place(looks)
            step = len(self.history)
            if looks:
                self.pipeline.begin(step, step)
            else:
                following = self.carried_at(step + 1)
                self.pipeline.begin(self.carried_at(step), following if following <= step else None)
        if self._is_resident(self.map.ambient):
            self.settle(self.map.ambient)
            return
        with self.clock.stepping.part(KERNEL):
            self.settle(self.map.ambient)
        with self.lent(self.map.ambient) as lease:
            self._ambient_wire.copy_(lease.wire)

    def _choose_place(self, looks: bool) -> None:
        """Of updates, for this visit."""
        assert self.pipeline is not None
        if self._trial is not None and looks:
            self._trial.disturb()
        elif self._trial is not None:
            chosen = bool(self._trial.choose())
            if chosen != self._updates_on_device:
                self.pipeline.forget()
            self._updates_on_device = chosen
        self.pipeline.prepare = self.as_it_rests if self._updates_on_device else self.brought

    def load_scratch(self, unit: Unit, draw: Draw | None) -> None:
        """Write the unit's weights, perturbed along ``draw``, where its parameters point."""
        along = draw
        if unit.is_frozen:
            along = None  # once a visit, for every draw
        elif along is not None and not any(self._is_perturbed(s, along) for s in unit.spans):
            along = _still(along)  # one copy serves every probe and sign
        wanted = (unit.index, len(self.history), along)
        if self._scratch_holds != wanted:
            unmoved = None if along is None else (unit.index, len(self.history), along.step)
            if along is None:
                self._load_as_it_is(unit)
            else:
                self._load_perturbed(unit, along, anew=self._holds_unmoved != unmoved)
            self._scratch_holds, self._holds_unmoved = wanted, unmoved
            self._overlaid_along = None
        if draw is not None and self.factors is not None:
            self.factors.load(unit, draw)
        if unit.index in self.map.overlaid and self._overlaid_along != (draw,):
            self._overlays.write(unit, draw, self.ambient_values, self._wires, self._scratch)
            self._overlaid_along = (draw,)

    def _is_perturbed(self, span: Span, draw: Draw) -> bool:
        """Whether the scratch has a copy a draw: not where a small factor is perturbed instead."""
        return self.map.moves(span, draw.step) and not self.map.is_low_rank(span)

    def _load_as_it_is(self, unit: Unit) -> None:
        if self._is_resident(unit):
            self.load_current(unit, self._scratch)
            wire = self._stores[unit.index].lend(unit).wire
            self._wires = [span.wire(wire) for span in unit.spans]
            for span, source in zip(unit.spans, self._wires, strict=True):
                if not span.trainable:
                    self._look_at_base(span, source)
                elif span.codec != IDENTITY:
                    self._look(span, span.plain(self._scratch))
        else:
            slot = self._acquire(unit, len(self.history))
            self._wires = [_sent(span, slot) for span in unit.spans]
            for span, source in zip(unit.spans, self._wires, strict=True):
                self._look_at_base(span, source)

    def _load_perturbed(self, unit: Unit, draw: Draw, anew: bool) -> None:
        """Along a draw; what it does not move was written for another one, unless ``anew``."""
        ahead = self.ahead(unit)
        at_hand = self._is_resident(unit)
        if at_hand:  # one pass moves masters and perturbs what no codec packs
            self.settle(unit, draw, self._scratch)
            wire = self._stores[unit.index].lend(unit).wire
            sources = [span.wire(wire) for span in unit.spans]
        else:
            slot = self._acquire(unit, self.goal(unit))
            sources = [_sent(span, slot) for span in unit.spans]
        for span, source in zip(unit.spans, sources, strict=True):
            moves = self._is_perturbed(span, draw)
            if not moves and not anew:
                continue
            low_rank = self.map.is_low_rank(span)
            due = () if low_rank else self.taken(unit, span, ahead)
            if not moves and not due:
                self._look(span, source)
            elif not (moves and at_hand and span.codec == IDENTITY):
                source, target = self._as_sent(span, source), span.plain(self._scratch)
                along = draw if moves else _still(draw)
                ops.perturb(span, source, target, self.direction, along, ahead=due)

    def _look_at_base(self, span: Span, source: torch.Tensor) -> None:
        """The same, of what overlays are written over unless they write all of it."""
        if id(span) not in self.map.covered:
            self._look(span, source)

    def _look(self, span: Span, source: torch.Tensor) -> None:
        """Write a span unperturbed to the scratch."""
        source, target = self._as_sent(span, source), span.plain(self._scratch)
        if span.codec != IDENTITY:
            ops.unpack(span.layout, source, span.elements, span.dtype, target)
        else:
            target.copy_(source)

    def _as_sent(self, span: Span, source: torch.Tensor) -> torch.Tensor:
        """A span as the bus would have brought it: elements that have a codec are packed here."""
        if span.codec == IDENTITY or source.dtype == torch.uint8:
            return source
        if self._packed_here is None:
            most = max(each.packed_bytes for each in self.map.units if each.packs_on_its_way)
            self._packed_here = self.arena.take("packed", most)
        packed = span.packed(self._packed_here)
        ops.pack(span.layout, source, packed)
        return packed

    def _acquire(self, unit: Unit, step: int) -> Slot:
        """A slot with the unit after ``step`` steps."""
        assert self.pipeline is not None
        slot = self.pipeline.acquire(unit, step)
        if slot.carries < step and not unit.is_frozen:  # it came as it rests
            for first, last in self.stretches(slot.carries, step):
                for span in unit.spans:
                    due = self.due(unit, span, last, carried=first)
                    if due:
                        self.bring(span, span.wire(slot.wire), span.rest(slot.rest), due)
            slot.carries = step
            if step == self.goal(unit) and self.is_mine(unit):
                self.pipeline.give_back(unit, partial(self.taken_back, unit, step))
        return slot

    def in_memory(self, unit: Unit) -> bool:
        """See :meth:`Masters.in_memory`."""
        return self.tiers[unit.index] != NVME

    def let_arrive(self, unit: Unit) -> None:
        """See :meth:`Masters.let_arrive`: what travels is not moved under way."""
        if self._updates_on_device and self.pipeline is not None and not self._is_resident(unit):
            self.pipeline.wait()

    def empty_scratch(self) -> None:
        """Leave NaN where units' parameters point."""
        self._scratch.fill_(NAN_BYTE)
        self._scratch_holds = self._holds_unmoved = None
        if self.factors is not None:
            self.factors.invalidate()

    @property
    def scratch_address(self) -> int:
        """Where the memory begins that units' parameters point into."""
        return self._scratch.untyped_storage().data_ptr()

    def scratch_view(self, span: Span, segment: Segment) -> torch.Tensor:
        """A parameter, or the part of it, while the scratch holds its unit."""
        flat = span.plain(self._scratch)[segment.start : segment.start + segment.numel]
        return flat.view(segment.shape)

    @property
    def ambient_address(self) -> int | None:
        """Where the memory of the ambient parameters' unperturbed values begins."""
        return address_of(self._ambient_wire)

    def finish_visit(self) -> None:
        """Leave nothing of this visit in flight, and no values in the scratch."""
        if self.pipeline is not None:
            self.pipeline.finish()
        self.empty_scratch()

    def ambient_values(self, span: Span) -> torch.Tensor:
        """The ambient span's unperturbed elements on the device."""
        return span.wire(self._ambient_wire)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Around calls of :meth:`restore`: nobody looks at the weights meanwhile."""
        self.forget_fetched()
        self.base_sha256 = None
        self._carried.meet()
        yield
        self._carried.meet()

    def adopt(self, identity: Identity) -> None:
        """Belong to a run, and take what an earlier process of it left on a disk."""
        units = {unit.index: unit for unit in self.map.units}
        adopted = self.at.adopt(identity, len(self.history), lambda index: self.goal(units[index]))
        for index, step in adopted.items():
            if self.is_mine(units[index]):
                self._carried[index] = step
        self._carried.meet()

    def forget_fetched(self) -> None:
        """Call when the history is another than before: nothing fetched ahead may serve."""
        self.forget_gathered()
        if self.pipeline is not None:
            self.pipeline.forget()

    @property
    def files(self) -> RunFiles | None:
        """The files on a disk, if there are any."""
        return self.at.files

    @property
    def host_bytes(self) -> int:
        """Bytes that rest in host memory."""
        packing = self._packer.held_bytes if self._packer is not None else 0
        return self.at.host_bytes + packing

    @contextmanager
    def kept(self, model: nn.Module) -> Iterator[None]:
        """Undo what a framework does meanwhile to parameters and buffers (casts, moves)."""
        values = [(parameter, parameter.data) for parameter in self.map.parameters.values()]
        buffers = [(module, dict(module._buffers)) for module in model.modules()]
        yield
        for parameter, value in values:
            parameter.data = value
        for module, kept in buffers:
            module._buffers.update(kept)

    def close(self) -> None:
        """Stop the pipeline and give the model its weights back.

        As the forward sees them and where they rest, uncopied; divided parameters are put together,
        one by one. What rests on a disk stays there, and what rests packed stays so, because nobody
        has room for all of it decoded: both read as NaN. So does everything where the record has
        gone back behind the weights.
        Before the first step, exactly as they were given, so that a construction that fails costs
        nothing; but what rests packed in memory is let go.
        """
        if self._closed or self._owners[0] not in taken:
            return  # the model may be another's by now, or is being collected together with this
        if not self.history and not self._carried.most:
            self._undo()
            return
        self.forget_fetched()
        if self.map.low_rank is not None:
            self._take_own()  # others go on between two merges, where these weights leave
        is_ahead = self._carried.most > len(self.history)
        if not is_ahead:
            self.settle_all()
        self._take_own()
        for name, (dtype, _) in self._given.items():
            parameter = self.map.parameters[name]
            if is_ahead or NVME in self._tiers_of(name) or self._rests_packed(name):
                parameter.data = nothing(tuple(parameter.shape), dtype, self.arena.device)
            else:
                parts = [self._resting_whole(place) for place in self.map.places[name]]
                parameter.data = joined(parameter.shape, parts)
            self._drop_parts(name)
        self._let_go()

    # -- taking over --

    def _take_over(self) -> None:
        for unit in self.map.everything:
            given = self.map.parameters
            self._add(unit, {s.name: part_of(given[s.name].detach(), s) for _, s in unit.segments})
            for span, segment in unit.segments:
                parameter = given[segment.name]
                if segment.offset + segment.numel < parameter.numel():
                    continue  # other units take the rest of it
                self._given[segment.name] = parameter.dtype, parameter.device
                parameter.data = self._empty_view(unit, span, segment)
        self._carried.meet()
        self.empty_scratch()
        give_back_freed()

    def _add(self, unit: Unit, values: Mapping[str, torch.Tensor]) -> None:
        base = self.base if unit.index != AMBIENT else None
        fill = partial(base.fill, unit) if base is not None else Given(unit, values)
        on_disk = self.tiers[unit.index] == NVME
        self.at.add(unit, None if on_disk and base is not None else fill)
        if on_disk or not self._carried.is_mine(unit):
            return
        with self.lent(unit, anew=True) as lease:
            fill(lease.wire, lease.rest)

    def _undo(self) -> None:
        """The model is as it was given, in dtype and device, too."""
        self.forget_fetched()  # a copy may be on its way out of memory that is unlocked now
        self._take_own()
        for name, (dtype, device) in self._given.items():
            self.map.parameters[name].data = self._as_given(name, dtype).to(device, dtype)
        self._let_go()

    def _as_given(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape, places = self.map.parameters[name].shape, self.map.places[name]
        came_empty = self.base_sha256 is not None and places[0][0].index != AMBIENT
        if came_empty or (self._rests_packed(name) and self._tiers_of(name) != {NVME}):
            return nothing(tuple(shape), dtype, torch.device("cpu"))
        return joined(shape, [self._part_as_given(place, dtype) for place in places])

    def _part_as_given(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        unit, _, segment = place
        if self.tiers[unit.index] == NVME:
            given = self.at.base_of(unit)
            return given.values[segment.name] if isinstance(given, Given) else self._value_at(place)
        values = self._resting(place)  # the wire may have rounded
        return values if values.dtype == dtype else self._master_at(place)

    def _rests_packed(self, name: str) -> bool:
        return any(span.rests_packed for _, span, _ in self.map.places[name])

    def _tiers_of(self, name: str) -> set[str]:
        return {self.tiers[unit.index] for unit, _, _ in self.map.places[name]}

    def _let_go(self) -> None:
        self._closed = True
        if self.pipeline is not None:
            self.pipeline.close()
        self.at.close()
        if self.base is not None:
            self.base.files.close()
        for hook in self._hooks:
            hook.remove()
        taken.difference_update(self._owners)

    def _take_own(self) -> None:
        """Go on without the ranks that share memory."""
        self.at.take_own()
        self._carried = self.at.carried

    def _drop_parts(self, name: str) -> None:
        """Units whose parts have been put together are let go: two models may be too much."""
        places = self.map.places[name]
        for unit, _, segment in places if len(places) > 1 else ():
            if segment is unit.segments[-1][1] and self.tiers[unit.index] != NVME:
                self.at.drop(unit)

    def _resting(self, place: Place) -> torch.Tensor:
        """Wire elements where they rest."""
        unit, span, segment = place
        return seen(span, segment, span.wire(self._stores[unit.index].lend(unit, whole=False).wire))

    def _resting_whole(self, place: Place) -> torch.Tensor:
        """They, with what lies over them written into them: nobody trains any more."""
        unit, span, _ = place
        resting = self._resting(place)
        lease = self._stores[unit.index].lend(unit, whole=False)
        self._overlay_of(place)(resting, span.wire(lease.wire))
        return resting

    def _empty_view(self, unit: Unit, span: Span, segment: Segment) -> torch.Tensor:
        shape = tuple(self.map.parameters[segment.name].shape)
        if unit.index == AMBIENT or segment.shape != shape:
            return nothing(shape, span.dtype, self.arena.device)
        return self.scratch_view(span, segment)

    def _place_ambient(self, device: torch.device) -> torch.Tensor:
        ambient = self.map.ambient
        if self._is_resident(ambient):
            return self._stores[AMBIENT].lend(ambient).wire
        return self.arena.take("ambient", ambient.wire_bytes)


def _still(draw: Draw) -> Draw:
    """For what does not move: the same for all draws of a step."""
    return replace(draw, probe=0, coefficient=0.0)


def _sent(span: Span, slot: Slot) -> torch.Tensor:
    """A span in a slot: elements, or packed bytes."""
    return span.packed(slot.wire) if slot.packed else span.wire(slot.wire)


@dataclass(frozen=True)
class Given:
    """The values that a unit came with, until it is on the disk.

    Attributes:
        unit: Which.
        values: By parameter name, of a divided one the unit's part; they may be views of a
            checkpoint's files.
    """

    unit: Unit
    values: Mapping[str, torch.Tensor]

    def __call__(self, wire: torch.Tensor, rest: torch.Tensor) -> None:
        """Write them to zeroed memory."""
        fill_unit(self.unit, self.values, wire, rest)
