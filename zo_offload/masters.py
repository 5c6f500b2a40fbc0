"""Every unit's exact weights in a store, and the step that they carry.

Updates are applied when a unit is next needed, so the order of visits, the tier and a resumed run
never change a bit. With ``lag`` L, masters move on the grid of L alone: at the visit of step t they
carry the largest multiple of L not above t - 1, and what the forward sees takes the missing steps
in fp32 on the way. So a unit can be fetched before the last step is known, and masters are read and
written every L steps. Whoever looks between is given a copy brought to the current step.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock

import torch

from zo_offload import ops, update
from zo_offload.offload.packing import Packer
from zo_offload.offload.store import Lease, Store
from zo_offload.offload.streamer import Sent
from zo_offload.ops import Draw, Point, Segment, Span, StepUpdate
from zo_offload.parts import together
from zo_offload.units import AMBIENT, IDENTITY, ModelMap, Place, Unit


class Masters:
    """Brings units to the step that is asked for, and reads them.

    Args:
        model_map: The units.
        stores: Who holds a unit, by its index.
        direction: Distribution of z.
        lag: Steps that the masters of a unit may be behind; ambient parameters, which every visit
            reads first, never are.

    Attributes:
        history: Every step's update since the initial values, by step number.
    """

    def __init__(
        self, model_map: ModelMap, stores: Mapping[int, Store], direction: str, lag: int
    ) -> None:
        self.map = model_map
        self.direction = direction
        self.lag = lag
        self.history: Sequence[StepUpdate] = ()
        self._stores = stores
        self._current_to = {unit.index: 0 for unit in model_map.everything}
        self._packer: Packer | None = None  # where units are packed on their way
        self._moving = Lock()

    # -- moving --

    def goal(self, unit: Unit, step: int | None = None) -> int:
        """Number of steps that the unit's masters carry at a step's visit (default: the next's)."""
        step = len(self.history) if step is None else step
        return update.settled(step, 0 if unit.index == AMBIENT else self.lag)

    def ahead(self, unit: Unit) -> Sequence[StepUpdate]:
        """What the unit's masters do not carry at the next step's visit."""
        return self.history[self.goal(unit) :]

    def carried(self, unit: Unit) -> int:
        """Number of steps that the unit's masters carry."""
        return self._current_to[unit.index]

    def settle(self, unit: Unit, draw: Draw | None = None, out: torch.Tensor | None = None) -> None:
        """Bring the unit's masters to their goal, in place.

        Args:
            unit: Which.
            draw: Where a perturbed copy at the current step is to be written in the same pass, of
                what no codec packs.
            out: Memory of that copy, as the unit's wire bytes.
        """
        with self.lent(unit) as lease:
            self._settle(unit, lease, draw, out)

    def expect(self, unit: Unit, step: int) -> None:
        """The unit will soon be asked for at ``step``."""
        self._stores[unit.index].expect(unit, whole=self.is_behind(unit, step))

    def brought(self, unit: Unit, step: int) -> Sent:
        """The unit's wire bytes after ``step`` steps, in the store or room of its own."""
        with self._moving:
            whole = self.is_behind(unit, step)
            lease = self._stores[unit.index].lend(unit, whole)
            try:
                wire = lease.wire
                if step >= self.goal(unit):
                    self._settle(unit, lease)
                if self.is_behind(unit, step):
                    wire = lease.spare_wire()
                    self._copy_at(unit, lease, step, wire)
                if not unit.is_packed:
                    return Sent([(0, wire)], None, step, lease.end)
                assert self._packer is not None
                pieces, number = self._packer.pack(unit, wire)
            except BaseException:
                lease.end()
                raise
            lease.end()
            return Sent(pieces, None, step, partial(self._packer.release, number), packed=True)

    def as_it_rests(self, unit: Unit, step: int) -> Sent:
        """The unit for a device that brings it to ``step`` itself."""
        behind = self.is_behind(unit, step)
        lease = self._stores[unit.index].lend(unit, whole=behind)
        if not behind:
            return Sent([(0, lease.wire)], None, step, lease.end)
        return Sent([(0, lease.wire)], lease.rest, self._current_to[unit.index], lease.end)

    def taken_back(self, unit: Unit, step: int) -> Sent:
        """Where to write the unit's masters, which a device has brought to ``step``."""
        lease = self._stores[unit.index].lend(unit)
        self._current_to[unit.index] = step
        lease.keep(step)
        return Sent([(0, lease.wire)], lease.rest, step, lease.end)

    def load_current(self, unit: Unit, wire: torch.Tensor) -> None:
        """Write the unit's wire bytes at the current step to memory beside the store."""
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            self._copy_at(unit, lease, len(self.history), wire)

    def settle_all(self) -> None:
        """Bring the masters in memory to the current step, at the end of a run."""
        self.lag = 0
        for unit in self.map.everything:
            if self.in_memory(unit):
                self.settle(unit)

    def in_memory(self, unit: Unit) -> bool:
        """Whether the unit rests in memory."""
        return True

    def rebase(self, history: Sequence[StepUpdate]) -> None:
        """Take the weights after a history, part of which they carry, as a beginning."""
        lag, self.lag = self.lag, 0
        self.history = history
        for unit in self.map.everything:
            self.settle(unit)
            self._current_to[unit.index] = 0
        self.lag, self.history = lag, ()

    def restore(self, unit: Unit, masters: Mapping[str, torch.Tensor], step: int) -> None:
        """Replace a unit's weights.

        Args:
            unit: Which.
            masters: fp32 values by parameter name; of a divided one the unit's part.
            step: Number of steps that they carry.
        """
        with self.lent(unit, anew=True) as lease:
            fill_unit(unit, masters, lease.wire, lease.rest)
            self._current_to[unit.index] = step
            lease.keep(step)

    @contextmanager
    def lent(self, unit: Unit, anew: bool = False) -> Iterator[Lease]:
        """The whole unit, for this thread alone: the pipeline's worker may want it meanwhile.

        Args:
            unit: Which.
            anew: All of it will be written.
        """
        self.let_arrive(unit)
        store = self._stores[unit.index]
        with self._moving:
            lease = store.fresh(unit) if anew else store.lend(unit)
            try:
                yield lease
            finally:
                lease.end()

    def _settle(
        self,
        unit: Unit,
        lease: Lease,
        draw: Draw | None = None,
        out: torch.Tensor | None = None,
    ) -> None:
        carried, goal = self._current_to[unit.index], self.goal(unit)
        assert carried <= goal, f"{unit.name}: carries {carried} steps, the goal is {goal}"
        behind = self.is_behind(unit, goal)
        due = self.history[carried:goal] if behind else ()
        ahead = self.ahead(unit) if out is not None else ()
        for span in unit.spans:
            points = []
            if draw is not None and out is not None and span.codec == IDENTITY:
                points = [Point(span.wire(out), draw)] if self.map.moves(span, draw.step) else []
            moved = self.steps_of(span, due)
            if moved or points:
                wire, rest = span.wire(lease.wire), span.rest(lease.rest)
                later = self.steps_of(span, ahead)
                ops.update(span, wire, rest, self.direction, moved, points, later)
        self._current_to[unit.index] = goal
        if behind:
            lease.keep(goal)

    def is_behind(self, unit: Unit, step: int) -> bool:
        """Whether the unit's masters lack a step before ``step`` that moves any of it."""
        carried = self._current_to[unit.index]
        if carried >= step or unit.is_frozen:
            return False
        if self.map.rotation is None:
            return True
        missing = self.history[carried:step]
        return any(self.steps_of(span, missing) for span in unit.spans)

    def steps_of(self, span: Span, updates: Sequence[StepUpdate]) -> Sequence[StepUpdate]:
        """Those updates that move a span. Decay is of all weights, at any turn."""
        if not span.trainable:
            return ()
        if self.map.rotation is None:
            return updates
        return [
            each if self.map.moves(span, each.step) else replace(each, draws=())
            for each in updates
            if each.decay != 1.0 or self.map.moves(span, each.step)
        ]

    def _copy_at(self, unit: Unit, lease: Lease, step: int, wire: torch.Tensor) -> None:
        wire.copy_(lease.wire)
        if not self.is_behind(unit, step):
            return
        missing = self.history[self._current_to[unit.index] : step]
        rest = lease.spare_rest()
        rest.copy_(lease.rest)
        for span in unit.spans:
            due = self.steps_of(span, missing)
            if due:
                ops.update(span, span.wire(wire), span.rest(rest), self.direction, due)

    def let_arrive(self, unit: Unit) -> None:
        """Wait for what is on its way to or from where the unit rests."""

    # -- reading --

    def master(self, name: str) -> torch.Tensor:
        """A parameter's exact fp32 value at the current step, on the CPU."""
        return self._whole(name, map(self._master_at, self._places(name)))

    def value(self, name: str) -> torch.Tensor:
        """A parameter as the forward sees it at the current step (a copy, on the CPU)."""
        return self._whole(name, map(self._value_at, self._places(name)))

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every managed parameter's name and exact value, in the model's order."""
        for name in self.map.parameters:
            yield name, self.master(name)

    def held(self, unit: Unit) -> dict[str, torch.Tensor]:
        """The unit's masters as they stand, after :meth:`carried` steps: fp32, on the CPU.

        Of a divided parameter there is the unit's part.
        """
        found = {}
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            for span, segment in unit.segments:
                part = slice(segment.start, segment.start + segment.numel)
                wire, rest = span.wire(lease.wire), span.rest(lease.rest)
                found[segment.name] = _master(span, segment, wire, rest, part)
        return found

    def digest(self) -> str:
        """SHA-256 of every parameter's name, shape and exact value."""
        total = hashlib.sha256()
        for name, parameter in self.map.parameters.items():
            total.update(f"{name} {tuple(parameter.shape)}\n".encode())
            for place in self._places(name):  # a divided one is never together in memory
                total.update(self._master_at(place).contiguous().numpy().data)
        return total.hexdigest()

    def _places(self, name: str) -> list[Place]:
        return self.map.places[self.map.aliases.get(name, name)]

    def _master_at(self, place: Place) -> torch.Tensor:
        with self._current_part(place) as part:
            return _master(*part)

    def _value_at(self, place: Place) -> torch.Tensor:
        with self._current_part(place) as (_, segment, wire, _, part):
            return wire[part].to("cpu", copy=True).view(segment.shape)

    def _whole(self, name: str, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """A parameter of its parts, in order; the part itself where that is all of it."""
        shape = self.map.parameters[self.map.aliases.get(name, name)].shape
        return together(shape, parts)

    @contextmanager
    def _current_part(self, place: Place) -> Iterator["Part"]:
        """Where a place's elements are at the current step: a copy where masters lag."""
        unit, span, segment = place
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            wire, rest = span.wire(lease.wire), span.rest(lease.rest)
            ahead = self.steps_of(span, self.ahead(unit))
            if not ahead:
                part = slice(segment.start, segment.start + segment.numel)
                yield span, segment, wire, rest, part
                return
            padded = slice(segment.start, segment.start + segment.padded)
            wire = wire[padded].clone()
            rest = rest[padded if span.rest_bytes else slice(0)].clone()
            ops.update(span.alone(segment), wire, rest, self.direction, ahead)
            yield span, segment, wire, rest, slice(0, segment.numel)


# A span and one of its parameters, wire and rest elements that hold it, and which of them do.
Part = tuple[Span, Segment, torch.Tensor, torch.Tensor, slice]


def _master(
    span: Span, segment: Segment, wire: torch.Tensor, rest: torch.Tensor, part: slice
) -> torch.Tensor:
    """fp32 values of a parameter, on the CPU."""
    if span.trainable:
        values = ops.load_master(span, wire[part], rest[part] if span.rest_bytes else rest)
    else:
        values = wire[part].to(torch.float32, copy=True)
    return values.cpu().view(segment.shape)


def fill_unit(
    unit: Unit, values: Mapping[str, torch.Tensor], wire: torch.Tensor, rest: torch.Tensor
) -> None:
    """Write a unit's initial values, by parameter name; of a divided one the unit's part."""
    for span, segment in unit.segments:
        fill(span, segment, values[segment.name], span.wire(wire), span.rest(rest))


def fill(
    span: Span, segment: Segment, values: torch.Tensor, wire: torch.Tensor, rest: torch.Tensor
) -> None:
    """Write a parameter's initial values: the master where it is trainable, else the wire alone."""
    part = slice(segment.start, segment.start + segment.numel)
    flat = values.reshape(-1).to(wire.device)
    if span.trainable:
        resting = rest[part] if span.rest_bytes else rest
        ops.store_master(span, flat.float(), wire[part], resting)
    else:
        ops.encode(span.dtype, flat.float(), wire[part])
