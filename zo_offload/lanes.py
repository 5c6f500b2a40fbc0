"""Lanes: many ordinary model calls that pass each unit together, so that it is moved once.

Every lane runs the *unmodified* model in a thread of its own, and exactly one lane runs at a time.
A forward pre-hook on each unit makes the lane hand the baton back and wait; when all lanes stand
somewhere, the scheduler takes the unit where most of them wait, writes it once for each direction
and sign, and lets the lanes of that sign through, one after another. Lanes may stand at different
units (generation, early exits); models that visit one block many times wait at it many times. In a
module whose experts are divided among units, lanes stop where the forward reads an expert.

What a thread owns is set in each lane: inference mode, autocast, thread count, device and stream,
context variables. Random generators are swapped with the baton (``generators.py``); the caller's
are left as they were.

Why threads and not a rewritten forward: the model's own code stays the only statement of what the
model computes, for every architecture, at some ten microseconds a handoff.
"""

import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from zo_offload import leftovers, ops
from zo_offload.ambient import AmbientCopies, AmbientMode
from zo_offload.errors import ConfigError, StoreError
from zo_offload.experts import read_one_by_one
from zo_offload.generators import Generators, States
from zo_offload.joined import Meeting, Product, SharedMatrices, gather
from zo_offload.lazy_logits import made
from zo_offload.objective import shapes_of
from zo_offload.ops import Draw
from zo_offload.units import AMBIENT, Unit
from zo_offload.views import owned
from zo_offload.weights import Weights

Way = tuple[int, int]  # a micro-batch, and the number of the way to a unit
_current = threading.local()


@dataclass(frozen=True)
class Call:
    """One forward.

    Attributes:
        run: What to run.
        draw: Where the weights stand meanwhile (None: unperturbed).
        generator_seed: What its random generators start from.
        micro_batch: Calls of one may share products (None: this one shares none).
    """

    run: Callable[[], Any]
    draw: Draw | None = None
    generator_seed: int = 0
    micro_batch: int | None = None


class _Stopped(BaseException):
    """Unwinds a lane after another one failed."""


class Lane:
    """One model call that stops before each unit."""

    def __init__(self, call: Call, owner: "Lanes", generators: States | None = None) -> None:
        self.call = call
        self.owner = owner
        self.generators = generators
        self.inside = AMBIENT
        self.experts = range(0)  # units of the module with divided experts that it is in
        self.waits_for: int | None = None
        self.meeting: Meeting | None = None  # at a product, inside a unit
        self.path = 0  # number of the way it came
        self.mode: AmbientMode | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended: Future | None = None
        self.stopped = False
        self._passes_by = False
        self._looked_at: Way | None = None  # the unit that it is in, for what its forward needs
        self._is_alone = False  # its mode has stepped aside
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)

    def resume(self) -> None:
        """Give the baton to the lane; returns when it stands before a unit or has ended."""
        self.waits_for = self.meeting = None
        self._go.release()
        self._back.acquire()

    def arrive(self, unit: int) -> None:
        """Called in the lane: stand before a unit until it has been written."""
        if self.stopped:  # it is unwinding, and its own clean-up calls a unit
            raise _Stopped
        if self._passes_by:
            return
        self.waits_for = unit
        self._hand_back()
        self.inside = unit
        self.path = self.owner.way_on(self.path, unit)

    def enter(self) -> None:
        """Called in the lane, in a unit: its mode steps aside where it is known not to be needed.

        It is where another lane of the micro-batch came the same way and did not need it.
        """
        if self.mode is None or self.call.micro_batch is None or self._passes_by:
            return
        way = self.call.micro_batch, self.path
        if way in self.owner.plain_ways:
            self._is_alone = self.mode.step_aside()
        else:
            self._looked_at, self.mode.was_needed = way, False

    def leave(self) -> None:
        """Called in the lane, out of a unit."""
        if self.mode is not None and self._is_alone:
            self.mode.come_back()
        elif self.mode is not None and self._looked_at is not None and not self.mode.was_needed:
            self.owner.plain_ways.add(self._looked_at)
        self._is_alone, self._looked_at = False, None

    def join(self, matrix: Hashable, input: torch.Tensor, product: Product) -> torch.Tensor:
        """Called in the lane: a product, computed together with other lanes' of the micro-batch."""
        if self.stopped:  # as in arrive
            raise _Stopped
        if self._passes_by or self.call.micro_batch is None or torch.is_grad_enabled():
            return product(input)
        key = self.call.micro_batch, self.path, matrix, input.shape, input.dtype
        self.meeting = meeting = Meeting(key, input)
        self._hand_back()
        return meeting.take(product)

    def _hand_back(self) -> None:
        """Give the baton to the scheduler, and wait for it."""
        self._back.release()
        self._go.acquire()
        if self.stopped:
            raise _Stopped

    @contextmanager
    def passing_by(self) -> Iterator[None]:
        """Stop before no unit: forwards that read no weights run meanwhile."""
        self._passes_by = True
        try:
            yield
        finally:
            self._passes_by = False

    def run(self, scope: "Callable[[Lane], ExitStack]") -> None:
        """The thread's body."""
        self._go.acquire()
        _current.lane = self
        try:
            if not self.stopped:
                with scope(self):
                    self.result = self.call.run()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            _current.lane = None
            self._back.release()


class _InlineLane(Lane):
    """A single lane in the caller's own thread: each unit is served as it is reached."""

    def __init__(self, call: Call, owner: "Lanes", weights: Weights) -> None:
        super().__init__(call, owner)
        self._weights = weights

    def arrive(self, unit: int) -> None:
        if self._passes_by:
            return
        with torch._C.DisableTorchFunction():  # the lane's mode is for the model's code, not ours
            self._weights.load_scratch(self._weights.map.units[unit], self.call.draw)
        self.inside = unit

    def join(self, matrix: Hashable, input: torch.Tensor, product: Product) -> torch.Tensor:
        return product(input)


class Lanes:
    """Runs model calls on weights that live in a store.

    Args:
        model: Its units get hooks.
        weights: The model's weights.
        num_draws: Directions and signs of a step.
        max_live: Most lanes alive at once (each holds activations and a thread); more calls than
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
        self._threads: ThreadPoolExecutor | None = None
        self._generators = Generators(weights.arena.device)
        self._ways: dict[tuple[int, int], int] = {}
        self.plain_ways: set[Way] = set()  # to units whose forward needs no mode
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
    def current(self) -> "Lane | None":
        """The lane that this thread runs."""
        lane = getattr(_current, "lane", None)
        return lane if lane is not None and lane.owner is self else None

    def way_on(self, path: int, unit: int) -> int:
        """Number of the way to a unit by a path, the same for all lanes of a visit that take it.

        Lanes that have come the same way were always let through together. Whether others are at a
        unit together hangs on what else is in the visit, so they share no product.
        """
        return self._ways.setdefault((path, unit), len(self._ways) + 1)

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
        """The result of one call on the current weights, in the caller's own thread.

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
            return self._run_inline(Call(run))

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
            lane = getattr(_current, "lane", None)
            if lane is not None and lane.owner is self:
                return forward(*args, **kwargs)
            shapes = shapes_of((args, kwargs))
            return self.run_one(lambda: forward(*args, **kwargs), [shapes])

        model.forward = serve

    def _refuse(self) -> None:
        if getattr(_current, "lane", None) is not None:
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

    def _run_inline(self, call: Call) -> Any:
        lane = _InlineLane(call, self, self._weights)
        _current.lane = lane
        try:
            with (
                torch.no_grad(),  # not inference mode: callers may go on with what they are given
                AmbientMode(self.copies, call.draw, 0, lane),
            ):
                return made(call.run())  # the caller wants whole logits, and now
        finally:
            _current.lane = None

    def _run_together(self, calls: Sequence[Call]) -> list[Any]:
        self._ways.clear()
        self.plain_ways.clear()
        states = self._generators.seeded([call.generator_seed for call in calls])
        lanes = [Lane(call, self, start) for call, start in zip(calls, states, strict=True)]
        draws = list(dict.fromkeys(call.draw for call in calls))
        caller = _CallerState(self._device)

        def scope(lane: Lane) -> ExitStack:
            stack = caller.enter()
            rank = draws.index(lane.call.draw)
            lane.mode = AmbientMode(self.copies, lane.call.draw, rank, lane)
            stack.enter_context(lane.mode)
            return stack

        try:
            for lane in lanes:
                self._start(lane, scope)
            for lane in lanes:
                self._turn(lane)
            self._serve(lanes)
        finally:
            for lane in lanes:  # one whose thread could not start, too: it is in the pool's queue
                lane.stopped = True
                lane._go.release()
            for lane in lanes:
                if lane.ended is not None:
                    lane.ended.result()
        return [lane.result for lane in lanes]

    def _start(self, lane: Lane, scope: "Callable[[Lane], ExitStack]") -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._max_live, thread_name_prefix="zo-lane")
        try:
            lane.ended = self._threads.submit(contextvars.copy_context().run, lane.run, scope)
        except RuntimeError:  # no more threads: the pool now counts one that does not exist
            self._threads.shutdown(wait=False)
            self._threads = None
            raise

    def _serve(self, lanes: list[Lane]) -> None:
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

    def _pass(self, unit: Unit, lanes: list[Lane]) -> None:
        """Let lanes through a unit, one after another, in as many rounds as they meet in it."""
        while lanes:
            for lane in lanes:
                self._weights.load_scratch(unit, lane.call.draw)
                self._turn(lane)
            lanes = [lane for lane in lanes if lane.meeting is not None]
            gather([lane.meeting for lane in lanes if lane.meeting is not None])

    def _turn(self, lane: Lane) -> None:
        assert lane.generators is not None
        self._generators.set(lane.generators)
        lane.resume()
        lane.generators = self._generators.states()
        if lane.error is not None:
            raise lane.error

    def _arrival(self, index: int) -> Callable[[nn.Module, Any], None]:
        def arrive(module: nn.Module, args: Any) -> None:
            lane = self._lane_in(module)
            lane.arrive(index)
            lane.enter()

        return arrive

    def _entry(self, units: range) -> Callable[[nn.Module, Any], None]:
        """Of a module whose experts are divided: a lane stops when it reads one."""

        def enter(module: nn.Module, args: Any) -> None:
            self._lane_in(module).experts = units

        return enter

    def _lane_in(self, module: nn.Module) -> Lane:
        lane = getattr(_current, "lane", None)
        if lane is None or lane.owner is not self:
            raise StoreError(
                f"{type(module).__name__} was called outside a visit, where its weights are "
                "not on the device; call the engine instead: engine(...), engine.generate(...)"
            )
        return lane

    def _exit(self, module: nn.Module, args: Any, output: Any) -> Any:
        lane = getattr(_current, "lane", None)
        if lane is not None and lane.owner is self:
            lane.experts = range(0)
        return self._departure(module, args, output)

    def _departure(self, module: nn.Module, args: Any, output: Any) -> Any:
        lane = getattr(_current, "lane", None)
        if lane is not None and lane.owner is self:
            lane.leave()
            lane.inside = AMBIENT
        with torch._C.DisableTorchFunction():
            output = owned(output, (self._weights.scratch_address,))
            if self._weights.poison:
                self._weights.empty_scratch()
        return output

    def close(self) -> None:
        """Remove the hooks and end the threads."""
        if self._closed:
            return  # the model may be another's by now
        self._closed = True
        vars(self._model).pop("forward", None)
        self._forwards.close()
        for hook in self._hooks:
            hook.remove()
        if self._threads is not None:
            self._threads.shutdown()


def _units_of(modules: Sequence[nn.Module]) -> dict[nn.Module, range]:
    """Of every module its units; of one whose experts are divided several, neighbours."""
    found: dict[nn.Module, range] = {}
    for index, module in enumerate(modules):
        first = found[module].start if module in found else index
        found[module] = range(first, index + 1)
    return found


class _CallerState:
    """What belongs to the caller's thread and every lane must see alike."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self._device = device
        self._num_threads = torch.get_num_threads()
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def enter(self) -> ExitStack:
        stack = ExitStack()
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        stack.enter_context(torch.inference_mode())
        kind, dtype, enabled = self._autocast
        if enabled:  # never cached: a cast copy would outlive the weights it was made from
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        if self._stream is not None:
            stack.enter_context(torch.cuda.device(self._device))
            stack.enter_context(torch.cuda.stream(self._stream))
        return stack
