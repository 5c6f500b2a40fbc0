"""Every unit's exact weights in a store, and the step that they carry.

Updates are applied when a unit is next needed, so the order of visits, the tier and a resumed run
never change a bit. With ``lag`` L, masters move on the grid of L alone: at the visit of step t they
carry the largest multiple of L not above t - 1, and what the forward sees takes the missing steps
in fp32 on the way. So a unit can be fetched before the last step is known, and masters are read and
written every L steps. Whoever looks between is given a copy brought to the current step.

Matrices that move by products of small factors are on the grid of the factors' interval, wherever
they are: between, what their steps have done is in the small factor, which is made of the history.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from threading import Lock

import torch

from zo_offload import ops, update
from zo_offload.clock import DISK, KERNEL, Clock
from zo_offload.offload.carried import Carried, Pieces
from zo_offload.offload.packing import Packer, resting_pieces
from zo_offload.offload.staged import FirstValues
from zo_offload.offload.store import Lease, Store
from zo_offload.offload.streamer import Sent
from zo_offload.ops import Draw, Point, Segment, Span, StepUpdate, rank_sums
from zo_offload.parts import together
from zo_offload.resting import digest_of, exact, fill, seen
from zo_offload.trainable.overlay import Base
from zo_offload.units import AMBIENT, IDENTITY, ModelMap, Place, Unit

AT_ONCE = 1024
"""Steps that a long replay unpacks at once: with momentum each goes along many directions."""


class Masters:
    """Brings units to the step that is asked for, and reads them.

    Args:
        model_map: The units.
        stores: Who holds a unit, by its index.
        direction: Distribution of z.
        lag: Steps that the masters of a unit may be behind; ambient parameters, which every visit
            reads first, never are.
        carried: Steps that units carry (default: none do, and nobody else moves them).

    Attributes:
        history: Every step's update since the initial values, by step number.
        clock: Knows where a step's seconds go.
        joins: Whether units' masters take the steps from one point of the lag's grid to the next in
            one sum (:func:`update.joined`).
    """

    def __init__(
        self,
        model_map: ModelMap,
        stores: Mapping[int, Store],
        direction: str,
        lag: int,
        carried: Carried | None = None,
    ) -> None:
        self.map = model_map
        self.direction = direction
        self.lag = lag
        self.history: Sequence[StepUpdate] = ()
        self.joins = False
        self.clock = Clock()
        self._grain = max(lag, 1)  # of the grid, which masters may leave at a run's end
        self._stores = stores
        self._carried = carried or Carried(unit.index for unit in model_map.everything)
        self._frozen_sha256: str | None = None
        self._packer: Packer | None = None  # where units are packed on their way
        self._ends = False  # matrices leave the grid of their factors
        self._off_grid: set[int] = set()  # units whose matrices have
        self._gathered: tuple[int, int, tuple[Draw, ...]] = -1, -1, ()  # of the last look-up
        self._moving = Lock()

    # -- moving --

    def goal(self, unit: Unit, step: int | None = None) -> int:
        """Number of steps that the unit's masters carry at a step's visit (default: the next's).

        None moves what is frozen: it carries 0 at every visit.
        """
        if unit.is_frozen:
            return 0
        step = len(self.history) if step is None else step
        return step if unit.index == AMBIENT else self.carried_at(step)

    def carried_at(self, step: int) -> int:
        """The same of all units: which step they carry at the visit of a step."""
        if self.map.low_rank is not None and not self._ends:
            return self.map.low_rank.grid(step)
        return update.settled(step, self.lag)

    def ahead(self, unit: Unit) -> Sequence[StepUpdate]:
        """What the unit's masters do not carry at the next step's visit."""
        return self.history[self.goal(unit) :]

    def taken(self, unit: Unit, span: Span, updates: Sequence[StepUpdate]) -> Sequence[StepUpdate]:
        """Those of the updates that move a span of the unit, as its elements take them."""
        found = self.steps_of(span, updates)
        if not self.joins or unit.index == AMBIENT:  # which never lags
            return found
        return update.joined(found, self._grain)

    def carried(self, unit: Unit) -> int:
        """Number of steps that the unit's masters carry."""
        return self._carried[unit.index]

    def settle(self, unit: Unit, draw: Draw | None = None, out: torch.Tensor | None = None) -> None:
        """Bring the unit's masters to their goal, in place.

        Args:
            unit: Which.
            draw: Where a perturbed copy at the current step is to be written in the same pass, of
                what no codec packs.
            out: Memory of that copy, as the scratch has it.
        """
        with self.lent(unit) as lease:
            self._settle(unit, lease, draw, out)

    def expect(self, unit: Unit, step: int) -> None:
        """The unit will soon be asked for at ``step``."""
        whole = self.is_behind(unit, step)
        if self.in_memory(unit):
            self._stores[unit.index].expect(unit, whole)
            return
        with self.clock.stepping.part(DISK):  # a buffer may have to be written first
            self._stores[unit.index].expect(unit, whole)

    def brought(self, unit: Unit, step: int) -> Sent:
        """The unit's wire bytes after ``step`` steps, in the store or room of its own."""
        if unit.is_frozen:
            return self._as_always(unit)
        with self._moving:
            lease = self._fetched(unit, self.is_behind(unit, step))
            try:
                wire = lease.wire
                if step >= self.goal(unit):
                    self._settle(unit, lease)
                else:
                    lease.hold()
                if self.is_behind(unit, step):
                    with self._asking(unit):
                        wire = lease.spare_wire()
                    wire.copy_(lease.wire)
                    self._advance(unit, lease, step, [span.wire(wire) for span in unit.spans])
                if not unit.packs_on_its_way:
                    pieces = resting_pieces(unit, wire)
                    release = partial(self._give_back, unit, lease)
                    return Sent(pieces, None, step, release, unit.is_packed)
                assert self._packer is not None
                pieces, number = self._packer.pack(unit, wire)
            except BaseException:
                lease.end()
                raise
            self._give_back(unit, lease)
            return Sent(pieces, None, step, partial(self._packer.release, number), packed=True)

    def as_it_rests(self, unit: Unit, step: int) -> Sent:
        """The unit for a device that brings it to ``step`` itself."""
        if unit.is_frozen:
            return self._as_always(unit)
        lease = self._fetched(unit, self.is_behind(unit, step))
        lease.hold(until_read=True)
        if not self._carried.is_even(unit):  # another rank has moved a part of it
            lease.let_go()
            self._settle(unit, lease)
            lease.hold(until_read=True)
        carried = self._carried[unit.index]
        rest = lease.rest if self.is_behind(unit, step) else None
        return Sent([(0, lease.wire)], rest, carried, partial(self._give_back, unit, lease))

    def _as_always(self, unit: Unit) -> Sent:
        """A frozen unit: what rests is what travels."""
        with self._moving:
            lease = self._fetched(unit, whole=False)
            if lease.is_made and self.history:  # no other run's journal will be taken up now
                lease.keep(0)  # on the disk it is read as it is, ever after
        release = partial(self._give_back, unit, lease)
        return Sent(resting_pieces(unit, lease.wire), None, 0, release, unit.is_packed)

    def taken_back(self, unit: Unit, step: int) -> Sent:
        """Where to write the unit's masters, which a device has brought to ``step``."""
        lease = self._fetched(unit)
        lease.hold_alone()
        self._carried.will_carry(unit, step)
        lease.keep(step)
        return Sent([(0, lease.wire)], lease.rest, step, partial(self._give_back, unit, lease))

    def _fetched(self, unit: Unit, whole: bool = True) -> Lease:
        """For the pipeline's worker: what it waits for a disk is the disk's time."""
        with self._asking(unit):
            return self._stores[unit.index].lend(unit, whole)

    def _give_back(self, unit: Unit, lease: Lease, after: "torch.Event | None" = None) -> None:
        """The same of the end of a lease."""
        with self._asking(unit):
            lease.end(after)

    def _asking(self, unit: Unit) -> AbstractContextManager[None]:
        return self.clock.fetching.part(KERNEL if self.in_memory(unit) else DISK)

    def load_current(self, unit: Unit, out: torch.Tensor) -> None:
        """Write what is trained of a unit, at the current step, to memory as the scratch's."""
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            plain = [span.plain(out) for span in unit.spans]
            for span, target in zip(unit.spans, plain, strict=True):
                if span.trainable:
                    target.copy_(span.wire(lease.wire))
            self._advance(unit, lease, len(self.history), plain)

    def settle_all(self) -> None:
        """Bring the masters in memory to the current step, at the end of a run."""
        self.lag, self._ends = 0, True
        for unit in self.map.everything:
            if self.in_memory(unit):
                self.settle(unit)

    def in_memory(self, unit: Unit) -> bool:
        """Whether the unit rests in memory."""
        return True

    def rebase(self, history: Sequence[StepUpdate]) -> None:
        """Take the weights after a history, part of which they carry, as a beginning."""
        lag, self.lag, self._ends = self.lag, 0, True
        self.history = history
        for unit in self.map.everything:
            self.settle(unit)
        self._carried.meet()
        for unit in self.map.everything:
            if self._carried.is_mine(unit):
                self._carried[unit.index] = 0
        self._carried.meet()
        self._off_grid.clear()
        self.lag, self.history, self._ends = lag, (), False

    def restore(self, unit: Unit, masters: Mapping[str, torch.Tensor], step: int) -> None:
        """Replace a unit's weights, inside :meth:`Weights.replacing`, where it :meth:`is_mine`.

        Args:
            unit: Which.
            masters: fp32 values by parameter name; of a divided one the unit's part. What is
                frozen stays as it is.
            step: Number of steps that they carry.
        """
        with self.lent(unit, anew=all(span.trainable for span in unit.spans)) as lease:
            for span in unit.spans:
                if span.trainable:
                    fill(span, masters, lease.wire, lease.rest)
            self._carried[unit.index] = step
            lease.keep(step)

    def is_mine(self, unit: Unit) -> bool:
        """Whether this rank replaces the unit's weights, for all that share them."""
        return self._carried.is_mine(unit)

    def digests(self, unit: Unit) -> bool:
        """Whether this rank is the first of those that share the unit, or has it alone."""
        return self._carried.is_first(unit)

    def meet(self) -> None:
        """Wait for the ranks that share units with this one."""
        self._carried.meet()

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
        changed = self._bring(unit, lease, self.goal(unit), draw, out)
        lease.hold()
        if not self._carried.is_even(unit):
            # A rank that has recorded the last step already is between two parts of the unit.
            further = self._carried.furthest(unit)
            if further <= len(self.history):  # else this is a fetch in vain of the step before
                lease.let_go()
                changed = self._bring(unit, lease, further) or changed
                lease.hold()
        if changed:
            lease.keep(self._carried[unit.index])

    def _bring(
        self,
        unit: Unit,
        lease: Lease,
        goal: int,
        draw: Draw | None = None,
        out: torch.Tensor | None = None,
    ) -> bool:
        """Bring the unit's masters to a goal; whether this rank is to say that they changed."""
        leaves = self._ends and self.map.low_rank is not None and not self._is_off_grid(unit)
        ahead = self.ahead(unit) if out is not None else ()

        def move(pieces: Pieces, carried: int) -> bool:
            behind = self.is_behind(unit, goal, carried) or leaves
            if behind:
                lease.settle()
            for span, piece in pieces:
                wire, rest = piece.wire(lease.wire), piece.rest(lease.rest)
                moved: Sequence[StepUpdate] = ()
                for first, last in self.stretches(carried, goal) if behind else ():
                    if moved:
                        ops.update(piece, wire, rest, self.direction, moved)
                    moved = self.due(unit, span, last, self._ends, first)
                if self.map.is_low_rank(span):
                    self.bring(span, wire, rest, moved)
                    continue
                points = []
                if draw is not None and out is not None and span.codec == IDENTITY:
                    moves = self.map.moves(span, draw.step)
                    points = [Point(span.plain(out), draw)] if moves else []
                if moved or points:
                    later = self.taken(unit, span, ahead)
                    ops.update(piece, wire, rest, self.direction, moved, points, later)
            return behind

        changed = self._carried.bring(unit, goal, move)
        if leaves:
            self._off_grid.add(unit.index)
        return changed

    def _is_off_grid(self, unit: Unit) -> bool:
        return unit.is_frozen or unit.index in self._off_grid

    def is_behind(self, unit: Unit, step: int, carried: int | None = None) -> bool:
        """Whether the unit's masters lack a step before ``step`` that moves any of it.

        ``carried`` steps are in them; by default, as many as in all of it.
        """
        carried = self._carried[unit.index] if carried is None else carried
        if carried >= step or unit.is_frozen:
            return False
        if self.map.rotation is None:
            return True
        missing = self.history[carried:step]
        return any(self.steps_of(span, missing) for span in unit.spans)

    def steps_of(self, span: Span, updates: Sequence[StepUpdate]) -> Sequence[StepUpdate]:
        """Those updates that move a span. Decay is of all weights, at any turn.

        At its turn it goes along directions of its turns alone: momentum rests meanwhile.
        """
        if not span.trainable:
            return ()
        if self.map.rotation is None:
            return updates
        return [
            replace(each, draws=tuple(d for d in each.draws if self.map.moves(span, d.step)))
            if self.map.moves(span, each.step)
            else replace(each, draws=())
            for each in updates
            if each.decay != 1.0 or self.map.moves(span, each.step)
        ]

    def due(
        self,
        unit: Unit,
        span: Span,
        step: int,
        whole: bool = True,
        carried: int | None = None,
    ) -> Sequence[StepUpdate]:
        """What brings a span to ``step``.

        Args:
            unit: Whose.
            span: Which.
            step: At most the next.
            whole: To the step itself; else what is on a grid of its own stays there.
            carried: Steps that the unit carries, where it is no longer where it rests.
        """
        carried = self._carried[unit.index] if carried is None else carried
        low_rank = self.map.low_rank
        if not span.trainable:
            return ()
        if low_rank is None or not self.map.is_low_rank(span):
            return self.taken(unit, span, self.history[carried:step])
        first = carried if unit.index in self._off_grid else low_rank.grid(carried)
        return self.history[first : step if whole else low_rank.grid(step)]

    def stretches(self, carried: int, step: int) -> Iterator[tuple[int, int]]:
        """Steps from one number to another, part by part, from grid to grid."""
        stride = -(-AT_ONCE // self._grain) * self._grain
        if self.map.low_rank is not None or step - carried <= stride:
            yield carried, step
            return
        for first in range(carried, step, stride):
            yield first, min(first + stride, step)

    def bring(
        self, span: Span, wire: torch.Tensor, rest: torch.Tensor, due: Sequence[StepUpdate]
    ) -> None:
        """Take steps that are due, in place."""
        if not self.map.is_low_rank(span):
            ops.update(span, wire, rest, self.direction, due)
            return
        assert self.map.low_rank is not None
        interval = self.map.low_rank.interval
        for number, steps in groupby(due, key=lambda each: each.step // interval):
            self._merge(span, wire, rest, number, list(steps))

    def _merge(
        self,
        span: Span,
        wire: torch.Tensor,
        rest: torch.Tensor,
        number: int,
        steps: Sequence[StepUpdate],
    ) -> None:
        """Add what steps of an interval have gathered to matrices; at its end they decay first."""
        low_rank = self.map.low_rank
        assert low_rank is not None
        decays = [StepUpdate(each.decay, ()) for each in steps if each.decay != 1.0]
        if decays and len(steps) == low_rank.interval:
            ops.update(span, wire, rest, self.direction, decays)
        draws = update.in_factor(steps, low_rank.momentum)
        for segment in span.segments if draws else ():
            layout = self.map.factors_of([segment])
            left = rank_sums.gathered(layout, self.direction, draws)
            right = rank_sums.basis(layout, self.direction, draws[0].seed, number)
            rank_sums.merge(
                span, segment, wire, rest,
                layout.lefts(left, segment.name).to(wire.device, non_blocking=True),
                layout.rights(right, segment.name).to(wire.device, non_blocking=True),
            )  # fmt: skip

    def forget_gathered(self) -> None:
        """The history is another than before, maybe of as many steps."""
        self._gathered = -1, -1, ()

    def in_factor(self) -> tuple[Draw, ...]:
        """What the small factors of all matrices hold at the next step's visit."""
        low_rank, step = self.map.low_rank, len(self.history)
        assert low_rank is not None
        first = low_rank.grid(step)
        if self._gathered[:2] != (first, step):
            draws = update.in_factor(self.history[first:step], low_rank.momentum)
            self._gathered = first, step, draws
        return self._gathered[2]

    def _advance(self, unit: Unit, lease: Lease, step: int, copies: Sequence[torch.Tensor]) -> None:
        """Bring copies of a unit's wire elements, one a span, to ``step``."""
        if not self.is_behind(unit, step):
            return
        rest = lease.spare_rest()
        rest.copy_(lease.rest)
        for span, wire in zip(unit.spans, copies, strict=True):
            due = self.due(unit, span, step)
            if due:
                self.bring(span, wire, span.rest(rest), due)

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

    def held(self, unit: Unit) -> tuple[dict[str, torch.Tensor], int]:
        """The unit's masters as they stand, fp32, on the CPU; and how many steps they carry.

        Of a divided parameter there is the unit's part; of what is frozen, nothing.
        """
        found = {}
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            for span, segment in unit.segments:
                if span.trainable:
                    wire, rest = span.wire(lease.wire), span.rest(lease.rest)
                    found[segment.name] = exact(span, segment, wire, rest)
            return found, self.carried(unit)  # once it is given back others may move it

    def digest(self) -> str:
        """SHA-256 of every parameter's name, shape and exact value."""
        total = hashlib.sha256()
        for name, parameter in self.map.parameters.items():
            total.update(f"{name} {tuple(parameter.shape)}\n".encode())
            for place in self._places(name):  # a divided one is never together in memory
                total.update(self._master_at(place).contiguous().numpy().data)
        return total.hexdigest()

    def fingerprint(self, unit: Unit) -> tuple[int, int]:
        """Steps that the unit's masters carry, at their goal, and a digest of their bytes."""
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            return self.carried(unit), digest_of(unit, lease.wire, lease.rest)

    def bytes_of(self, unit: Unit) -> bytes:
        """The unit's masters at their goal, as they rest."""
        with self.lent(unit) as lease:
            self._settle(unit, lease)
            return torch.cat([lease.wire.cpu(), lease.rest.cpu()]).numpy().tobytes()

    def parts_of(self, unit: Unit, data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Wire and rest of what :meth:`bytes_of` gave."""
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        wire, rest = whole.split([unit.wire_bytes, unit.rest_bytes])
        return wire, rest

    def replayed(
        self, unit: Unit, first: FirstValues, carries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Wire and rest of the unit at its goal, from values that carry so many steps."""
        wire, rest = (torch.zeros(n, dtype=torch.uint8) for n in (unit.wire_bytes, unit.rest_bytes))
        first(wire, rest)
        for start, stop in self.stretches(carries, self.goal(unit)):
            for span in unit.spans:
                due = self.due(unit, span, stop, carried=start)
                if due:
                    self.bring(span, span.wire(wire), span.rest(rest), due)
        return wire, rest

    def overwrite(self, unit: Unit, wire: torch.Tensor, rest: torch.Tensor) -> None:
        """Replace the unit's masters by those at its goal."""
        with self.lent(unit) as lease:
            lease.hold_alone()
            self._carried.will_carry(unit, self.goal(unit))
            lease.wire.copy_(wire)
            lease.rest.copy_(rest)
            lease.keep(self.goal(unit))

    def frozen_sha256(self) -> str:
        """SHA-256 of all that is frozen, as it rests; empty where nothing is. Read once."""
        if self._frozen_sha256 is None:
            self._frozen_sha256 = self._read_frozen()
        return self._frozen_sha256

    def _read_frozen(self) -> str:
        total, found = hashlib.sha256(), False
        for unit in self.map.everything:
            spans = [span for span in unit.spans if not span.trainable]
            if not spans:
                continue
            found = True
            with self.lent(unit) as lease:
                for span in spans:
                    names = [(s.name, s.shape, s.offset) for s in span.segments]
                    total.update(repr((span.codec, str(span.dtype), names)).encode())
                    total.update(span.wire(lease.wire).view(torch.uint8).cpu().numpy().data)
        return total.hexdigest() if found else ""

    def _places(self, name: str) -> list[Place]:
        return self.map.places[self.map.aliases.get(name, name)]

    def _master_at(self, place: Place) -> torch.Tensor:
        with self._current_part(place) as part:
            return exact(*part)

    def _value_at(self, place: Place) -> torch.Tensor:
        lay_over = self._overlay_of(place)
        with self._current_part(place) as (span, segment, wire, _):
            value = seen(span, segment, wire).to("cpu", copy=True)
            lay_over(value, wire)
            return value

    def _overlay_of(self, place: Place) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """What writes the current values of an overlay, if there is one, into a frozen part.

        It is given the part, decoded, and its span as it rests.
        """
        overlaid = self.map.overlaid_at(place)
        if overlaid is None:
            return lambda target, wire: None
        (_, span, segment), patch = place, overlaid.patch
        values = self._master_at(overlaid.values).view(-1)[patch.values.start : patch.values.stop]

        def lay_over(target: torch.Tensor, wire: torch.Tensor) -> None:
            places = patch.places.to(target.device) if patch.places is not None else None
            here = values.to(target.device)
            patch.write(target.view(-1), here, places, Base(span, segment, wire))

        return lay_over

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
            ahead = self.due(unit, span, len(self.history))
            if not ahead:
                yield span, segment, wire, rest
                return
            padded = slice(segment.start, segment.start + segment.padded)
            wire = wire[padded].clone()
            rest = rest[padded if span.rest_bytes else slice(0)].clone()
            alone = span.alone(segment)
            self.bring(alone, wire, rest, ahead)
            yield alone, alone.segments[0], wire, rest


# A span and one of its parameters, and the span's wire and rest.
Part = tuple[Span, Segment, torch.Tensor, torch.Tensor]
