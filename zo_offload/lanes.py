"""Lanes: many ordinary model calls that pass each unit together, so that it is moved once.

Every lane runs the *unmodified* model on a stack of its own (``lane.py``), and exactly one runs at
a time. A forward pre-hook on each unit makes the lane hand the baton back and wait; when all lanes
stand somewhere, the scheduler takes the unit where most of them wait, writes it once for each
direction and sign, and lets the lanes of that sign through, one after another. Lanes may stand at
different units (generation, early exits); models that visit one block many times wait at it many
times. In a module whose experts are divided among units, lanes stop where the forward reads an
expert.

Each lane has its own inference mode, autocast, torch modes (``torch_state.py``) and context
variables. Random generators are swapped with the baton (``generators.py``); the caller's are left
as they were.

Why not a rewritten forward: the model's own code stays the only statement of what the model
computes, for every architecture, at some microseconds a handoff.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from zo_offload import leftovers, ops
from zo_offload.ambient import AmbientCopies, AmbientMode
from zo_offload.errors import ConfigError, StoreError
from zo_offload.experts import read_one_by_one
from zo_offload.generators import Generators
from zo_offload.joined import SharedMatrices, gather
from zo_offload.lane import Call, InlineLane, Lane, TurnLane, Ways, current_lane
from zo_offload.objective import shapes_of
from zo_offload.units import Unit
from zo_offload.views import owned
from zo_offload.weights import Weights


class Lanes:
    """Runs model calls on weights that live in a store.

    Args:
        model: Its units get hooks.
        weights: The model's weights.
        num_draws: Directions and signs of a step.
        max_live: Most lanes alive at once (each holds activations and a stack); more calls than
            that take further visits, with the same results.
        head_chunk: Rows of the head that are perturbed at a time (None: all).
        joined_rows: Rows of an input up to which lanes share a product (None: they do not).
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        num_draws: int = 2,
        max_live: int = 64,
        head_chunk: int | None = None,
        joined_rows: int | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self.copies = AmbientCopies(model, weights, num_draws, head_chunk)
        self._joins = joined_rows is not None
        if joined_rows is not None:
            self.copies.shared = SharedMatrices(weights, joined_rows)
        self._device = weights.arena.device
        self._max_live = max_live
        self._closed = False
        self._generators = Generators(weights.arena.device)
        self._leave_nothing: set[Hashable] = set()  # shapes whose forwards were looked at
        self._state_before: dict | None = None
        self._hooks: list[Any] = []
        divided = []
        for module, units in _units_of(weights.map.modules).items():
            before, after = self._arrival(units.start), self._departure
            if len(units) > 1:
                divided.append(module)
                before, after = self._entry(units), self._exit
            self._hooks.append(module.register_forward_pre_hook(before, prepend=True))
            self._hooks.append(module.register_forward_hook(after, always_call=True))
        self._serve_calls_from_outside(model)
        self._forwards = ExitStack()
        self._forwards.enter_context(read_one_by_one(divided))

    @property
    def current(self) -> Lane | None:
        """The lane that is running."""
        lane = current_lane()
        return lane if lane is not None and lane.owner is self else None

    def run(
        self, calls: Sequence[Call], shapes: Sequence[Hashable] = (), looks: bool = False
    ) -> list[Any]:
        """Results of all calls, in order.

        Calls of one draw should be neighbours: each perturbed copy is then built once a unit. An
        exception in one lane ends all and is raised as itself.

        Args:
            calls: What to run, each in a lane.
            shapes: Of the inputs of micro-batches; each is looked at closely when it is new.
            looks: Lanes see the weights as they are, and take no step.

        Raises:
            ModelError: The forward leaves state on a module.
            ConfigError: Lanes that share products would not all be alive.
        """
        self._refuse()
        if self._joins and len(calls) > self._max_live and not looks:
            raise ConfigError(
                f"zeroth_order.joined_rows: all {len(calls)} lanes of a visit must be alive to "
                f"share products, and live_lanes is {self._max_live}; raise it, or leave "
                "joined_rows out"
            )
        results: list[Any] = []
        with self._leaving_nothing(shapes):
            for first in range(0, len(calls), self._max_live):
                with self._visit(looks), self._generators.kept():
                    results += self._run_together(calls[first : first + self._max_live])
        return results

    def run_one(self, run: Callable[[], Any], shapes: Sequence[Hashable] = ()) -> Any:
        """The result of one call on the current weights, on the caller's own stack.

        Args:
            run: What to run.
            shapes: Of its inputs, if it is what training lanes run: whatever it leaves on a module
                would be there when they come by. Other code (``generate`` with a static cache) may
                leave what only it reads.

        Raises:
            ModelError: The forward leaves state on a module.
        """
        self._refuse()
        self._model.eval()  # whatever the caller did to it meanwhile
        with self._leaving_nothing([("one", each) for each in shapes]), self._visit(looks=True):
            return InlineLane(Call(run), self, self._weights).run(self.copies)

    @contextmanager
    def _leaving_nothing(self, shapes: Sequence[Hashable]) -> Iterator[None]:
        """Refuse a forward that leaves state on a module; asked once for inputs of one shape."""
        new = [each for each in shapes if each not in self._leave_nothing]
        if not shapes or (not new and self._state_before is None):
            yield
            return
        if self._state_before is None:  # what an earlier, refused forward left is still refused
            self._state_before = leftovers.state_of(self._model)
        yield
        leftovers.refuse_changes(self._model, self._state_before)
        self._leave_nothing.update(new)
        self._state_before = None

    def _serve_calls_from_outside(self, model: Any) -> None:
        """Code that knows the bare model only, such as an evaluation, makes a visit of its own."""
        forward = model.forward

        @wraps(forward)
        def serve(*args: Any, **kwargs: Any) -> Any:
            if self.current is not None:
                return forward(*args, **kwargs)
            shapes = shapes_of((args, kwargs))
            return self.run_one(lambda: forward(*args, **kwargs), [shapes])

        model.forward = serve

    def _refuse(self) -> None:
        if current_lane() is not None:
            raise StoreError(
                "code inside a visit asked for a visit of its own; call the model, not the engine, "
                "and no model of another engine"
            )
        if self._closed:
            raise StoreError("this Stepper or engine is closed; make a new one on the model")

    @contextmanager
    def _visit(self, looks: bool = False) -> Iterator[None]:
        self.copies.invalidate()
        try:
            self._weights.begin_visit(looks)
            yield
            ops.refuse_damage(self._device)
        finally:
            self._weights.finish_visit()

    def _run_together(self, calls: Sequence[Call]) -> list[Any]:
        states, ways = self._generators.seeded([call.generator_seed for call in calls]), Ways()
        kind = self._device.type
        lanes = [
            TurnLane(call, self, ways, kind, start)
            for call, start in zip(calls, states, strict=True)
        ]
        ranks = {draw: rank for rank, draw in enumerate(dict.fromkeys(c.draw for c in calls))}
        try:
            for lane in lanes:
                draw = lane.call.draw
                lane.mode = AmbientMode(self.copies, draw, ranks[draw], lane)
                self._turn(lane)
            self._serve(lanes)
        finally:
            for lane in lanes:
                lane.stop()
        return [lane.result for lane in lanes]

    def _serve(self, lanes: list[TurnLane]) -> None:
        """Until all lanes have ended: the unit with most waiters, one written copy a draw.

        Waiters are counted by module. Of its groups of experts the first is next: a lane that waits
        there comes to the others later, and none need come twice.
        """
        modules = self._weights.map.modules
        while waiting := [lane for lane in lanes if lane.waits_for is not None]:
            at: dict[nn.Module, list[int]] = {}
            for lane in waiting:
                assert lane.waits_for is not None
                at.setdefault(modules[lane.waits_for], []).append(lane.waits_for)
            index = min(max(at.values(), key=len))  # the first lane's module where equal
            there = [lane for lane in waiting if lane.waits_for == index]
            self._pass(self._weights.map.units[index], there)

    def _pass(self, unit: Unit, lanes: list[TurnLane]) -> None:
        """Let lanes through a unit, one after another, in as many rounds as they meet in it."""
        while lanes:
            for lane in lanes:
                self._weights.load_scratch(unit, lane.call.draw)
                self._turn(lane)
            lanes = [lane for lane in lanes if lane.meeting is not None]
            gather([lane.meeting for lane in lanes if lane.meeting is not None])

    def _turn(self, lane: TurnLane) -> None:
        self._generators.set(lane.generators)
        lane.resume()
        lane.generators = self._generators.states()
        if lane.error is not None:
            raise lane.error

    def _arrival(self, index: int) -> Callable[[nn.Module, Any], None]:
        def arrive(module: nn.Module, args: Any) -> None:
            self._lane_in(module).arrive(index)

        return arrive

    def _entry(self, units: range) -> Callable[[nn.Module, Any], None]:
        """Of a module whose experts are divided: a lane stops when it reads one."""

        def enter(module: nn.Module, args: Any) -> None:
            self._lane_in(module).experts = units

        return enter

    def _lane_in(self, module: nn.Module) -> Lane:
        lane = self.current
        if lane is None:
            raise StoreError(
                f"{type(module).__name__} was called outside a visit, where its weights are "
                "not on the device; call the engine instead: engine(...), engine.generate(...)"
            )
        return lane

    def _exit(self, module: nn.Module, args: Any, output: Any) -> Any:
        lane = self.current
        if lane is not None:
            lane.experts = range(0)
        return self._departure(module, args, output)

    def _departure(self, module: nn.Module, args: Any, output: Any) -> Any:
        lane = self.current
        if lane is not None:
            lane.leave()
        with torch._C.DisableTorchFunction():
            output = owned(output, (self._weights.scratch_address,))
            if self._weights.poison:
                self._weights.empty_scratch()
        return output

    def close(self) -> None:
        """Remove the hooks."""
        if self._closed:
            return  # the model may be another's by now
        self._closed = True
        vars(self._model).pop("forward", None)
        self._forwards.close()
        for hook in self._hooks:
            hook.remove()


def _units_of(modules: Sequence[nn.Module]) -> dict[nn.Module, range]:
    """Of every module its units; of one whose experts are divided several, neighbours."""
    found: dict[nn.Module, range] = {}
    for index, module in enumerate(modules):
        first = found[module].start if module in found else index
        found[module] = range(first, index + 1)
    return found
