"""A lane: one ordinary model call, in a greenlet of its own, which stops before each unit.

Greenlets take turns in one thread. Lanes that were threads had an OpenMP pool and a memory arena
each, and woke on another processor than the one whose caches were warm.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import greenlet
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._C._functorch import peek_interpreter_stack

from zo_offload.ambient import AmbientCopies, AmbientMode
from zo_offload.errors import ModelError
from zo_offload.generators import States
from zo_offload.joined import Meeting, Product
from zo_offload.lazy_logits import made
from zo_offload.ops import Draw
from zo_offload.torch_state import LaneState
from zo_offload.units import AMBIENT
from zo_offload.weights import Weights

Way = tuple[int | None, int]  # a micro-batch, and the number of the way to a unit
_current = threading.local()


def current_lane() -> "Lane | None":
    """The lane that this thread runs, of whichever model."""
    return getattr(_current, "lane", None)


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


class Ways:
    """By which units the lanes of a visit came to where they are."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self.plain: set[Way] = set()  # to units whose forward needs no lane's mode

    def on(self, path: int, unit: int) -> int:
        """Number of the way to a unit by a path, the same for all lanes of the visit that take it.

        Lanes that have come the same way were always let through together. Whether others are at a
        unit together hangs on what else is in the visit, so they share no product.
        """
        return self._numbers.setdefault((path, unit), len(self._numbers) + 1)


class _Stopped(BaseException):
    """Unwinds a lane after another one failed."""


class Lane(ABC):
    """One model call, and where it is.

    Args:
        call: What it runs.
        owner: Whose lane it is.
    """

    def __init__(self, call: Call, owner: object) -> None:
        self.call = call
        self.owner = owner
        self.inside = AMBIENT
        self.experts = range(0)  # units of the module with divided experts that it is in
        self._passes_by = False

    @abstractmethod
    def arrive(self, unit: int) -> None:
        """Go on when the unit has been written."""

    def leave(self) -> None:
        """Go on outside the unit, or unwind."""
        self.inside = AMBIENT

    @abstractmethod
    def join(self, matrix: Hashable, input: torch.Tensor, product: Product) -> torch.Tensor:
        """A product, which may be computed together with other lanes'."""

    @contextmanager
    def passing_by(self) -> Iterator[None]:
        """Stop before no unit: forwards that read no weights run meanwhile."""
        self._passes_by = True
        try:
            yield
        finally:
            self._passes_by = False


class TurnLane(Lane):
    """One of several that take turns: it stops before each unit.

    Before its first turn it needs a ``mode``.

    Args:
        call: What it runs.
        owner: Whose lane it is.
        ways: Of the visit.
        kind: Of the device.
        generators: Where its random generators start.
    """

    def __init__(
        self, call: Call, owner: object, ways: Ways, kind: str, generators: States
    ) -> None:
        super().__init__(call, owner)
        self.generators = generators
        self.mode: AmbientMode | None = None  # by which it reads
        self.waits_for: int | None = None
        self.meeting: Meeting | None = None  # at a product, inside a unit
        self.result: Any = None
        self.error: BaseException | None = None
        self._ways = ways
        self._path = 0  # number of the way it came
        self._stopped = False
        self._looked_at: Way | None = None  # the unit that it is in, for what its forward needs
        self._is_alone = False  # its mode has stepped aside
        self._compiler: Any = None  # of frames, while it is in a compiled module
        self._torch_state = LaneState(kind)
        self._greenlet = greenlet(self._run)
        self._greenlet.gr_context = copy_context()

    def resume(self) -> None:
        """Give the lane its turn; returns when it stands before a unit or has ended."""
        self.waits_for = self.meeting = None
        with self._torch_state.installed():
            _current.lane = self
            # a compiler of frames is set in this frame: it would compile another
            callers = set_eval_frame(self._compiler)
            try:
                self._greenlet.switch()
            finally:
                self._compiler = set_eval_frame(callers)
                _current.lane = None

    def stop(self) -> None:
        """Unwind it, wherever it stands."""
        self._stopped = True
        if self._greenlet:  # has begun, and not ended
            self.resume()
        self.mode = None  # which holds the lane: nothing is left to a collector of garbage

    def _run(self) -> None:
        """The greenlet's body."""
        assert self.mode is not None
        try:
            with self.mode:
                self.result = self.call.run()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error

    def _hand_back(self) -> None:
        """Let the scheduler go on, and wait for it."""
        scheduler = self._greenlet.parent
        assert scheduler is not None
        scheduler.switch()
        self._refuse_to_go_on()

    def _refuse_to_go_on(self) -> None:
        if self._stopped:  # its own clean-up may call a unit while it unwinds
            raise _Stopped

    def arrive(self, unit: int) -> None:
        """Stand before the unit until the scheduler has written it."""
        self._refuse_to_go_on()
        if self._passes_by:
            return
        if peek_interpreter_stack() is not None:
            raise ModelError(
                f"unit {unit} is called under torch.func (vmap, grad, jvp), and so would other "
                "lanes be, which stand elsewhere; call blocks outside of it"
            )
        self.waits_for = unit
        self._hand_back()
        self.inside = unit
        self._path = self._ways.on(self._path, unit)
        self._enter()

    def _enter(self) -> None:
        """Go on without the mode where it is known not to be needed.

        It is where another lane of the micro-batch came the same way and did not need it.
        """
        assert self.mode is not None
        way = self.call.micro_batch, self._path
        if way in self._ways.plain:
            self._is_alone = self.mode.step_aside()
        else:
            self._looked_at, self.mode.was_needed = way, False

    def leave(self) -> None:
        """Go on outside, with the mode."""
        assert self.mode is not None
        if self._is_alone:
            self.mode.come_back()
        elif self._looked_at is not None and not self.mode.was_needed:
            self._ways.plain.add(self._looked_at)
        self._is_alone, self._looked_at = False, None
        super().leave()

    def join(self, matrix: Hashable, input: torch.Tensor, product: Product) -> torch.Tensor:
        """A product, computed together with other lanes' of the micro-batch."""
        self._refuse_to_go_on()
        if self._passes_by or self.call.micro_batch is None or torch.is_grad_enabled():
            return product(input)
        key = self.call.micro_batch, self._path, matrix, input.shape, input.dtype
        self.meeting = meeting = Meeting(key, input)
        self._hand_back()
        return meeting.take(product)


class InlineLane(Lane):
    """A single one, on the caller's own stack: each unit is served as it is reached."""

    def __init__(self, call: Call, owner: object, weights: Weights) -> None:
        super().__init__(call, owner)
        self._weights = weights

    def run(self, copies: AmbientCopies) -> Any:
        """What the call gives."""
        _current.lane = self
        try:
            with (
                torch.no_grad(),  # not inference mode: callers may go on with what they are given
                AmbientMode(copies, self.call.draw, 0, self),
            ):
                return made(self.call.run())  # the caller wants whole logits, and now
        finally:
            _current.lane = None

    def arrive(self, unit: int) -> None:
        """Write the unit."""
        if self._passes_by:
            return
        with torch._C.DisableTorchFunction():  # the lane's mode is for the model's code, not ours
            self._weights.load_scratch(self._weights.map.units[unit], self.call.draw)
        self.inside = unit

    def join(self, matrix: Hashable, input: torch.Tensor, product: Product) -> torch.Tensor:
        """A product of its own."""
        return product(input)
