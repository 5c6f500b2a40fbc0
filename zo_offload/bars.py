"""What a command shows while it works: bars on a terminal, lines elsewhere, by the first rank."""

import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from zo_offload import launched
from zo_offload.reporter import Item, Reporter
from zo_offload.wording import as_loss, as_speed, as_time

console = Console(
    highlight=False,
    markup=False,
    soft_wrap=True,
    # Open MPI gives ranks a terminal of their own, wherever its output goes.
    force_terminal=False if launched.by_mpi() else None,
)

HEARTBEAT_SECONDS = 30.0  # off a terminal, where there is no bar
FIRST_BEAT_SECONDS = 2.0  # into an evaluation
RECENT_STEPS = 50  # that a speed is the mean of


def shown() -> Reporter:
    """Bars on a terminal and nothing elsewhere: of commands whose output is read by programs."""
    return reporter() if console.is_terminal else Reporter()


def reporter() -> Reporter:
    """Of this process: among ranks only the first one shows what happens."""
    return Reporter() if launched.rank() else Bar()


class Bar(Reporter):
    """Progress bars on a terminal; elsewhere a line for each phase, evaluation and half minute."""

    def __init__(self) -> None:
        self.trained = False
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._loss: float | None = None
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._beat = time.monotonic()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str, quiet: bool = False) -> Generator[None, None, None]:
        """A spinner, or a line."""
        if not self._live and not quiet:
            console.print(name)
        task = self._progress.add_task(name, total=None, detail="")
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def say(self, line: str) -> None:
        """A line above the bars."""
        console.print(line)

    def counted(self, name: str, items: Iterable[Item], count: int) -> Iterator[Item]:
        """A bar that fills up with the items."""
        task = self._progress.add_task(name, total=count, detail=f"0/{count}")
        self._beat = time.monotonic() - HEARTBEAT_SECONDS + FIRST_BEAT_SECONDS
        try:
            for number, item in enumerate(items):
                self._progress.update(task, completed=number, detail=f"{number}/{count}")
                self._say_now_and_then(f"{name}: {number}/{count}")
                yield item
        finally:
            self._progress.remove_task(task)

    def on_start(self, first_step: int, steps: int) -> None:
        """A bar of steps."""
        self.trained = True
        self._steps = steps
        if first_step:
            console.print(f"continuing after {first_step} steps")
        self._task = self._progress.add_task(
            "training", total=steps, completed=first_step, detail=f"{first_step}/{steps}"
        )

    def on_evaluation(
        self, step: int, accuracy: float, loss: float, metric: str = "accuracy"
    ) -> None:
        """A line above the bar."""
        console.print(f"step {step}: dev {metric} {accuracy:.4f}, dev loss {loss:.4f}")
        self._ends.clear()  # an evaluation's time is not a step's
        self._beat = time.monotonic()

    def on_step(self, step: int, loss: float) -> None:
        """Loss (smoothed), speed and what remains."""
        if math.isfinite(loss):  # a step that was skipped has none
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._ends.append(time.monotonic())
        detail = f"{step + 1}/{self._steps}  loss {as_loss(self._loss)}"
        seconds = self._ends[-1] - self._ends[0]
        if seconds > 0:
            speed = (len(self._ends) - 1) / seconds
            remaining = round((self._steps - step - 1) / speed)
            detail += f"  {as_speed(speed)}  ETA {as_time(remaining)}"
        self._progress.update(self._task, completed=step + 1, detail=detail)
        self._say_now_and_then(f"step {detail}")

    def _say_now_and_then(self, line: str) -> None:
        if not self._live and time.monotonic() - self._beat > HEARTBEAT_SECONDS:
            console.print(line)
            self._beat = time.monotonic()
