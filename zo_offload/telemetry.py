"""What a run measures of itself while it trains: ``telemetry.jsonl`` (``docs/report.md``).

A line of JSON each: ``begin`` where a process takes a run up, with the plan; ``steps`` for some
seconds of steps, with seconds by part, bytes by link and memory held; ``warning`` for what was said
on the way. As ``metrics.csv`` the file follows the journal: a run that continues drops the steps
that the journal does not have. To write costs a step some microseconds, and a line a few seconds.
"""

import json
import logging
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_offload.clock import PARTS
from zo_offload.files import naming, write_file
from zo_offload.journal.files import write_whole
from zo_offload.wording import one_line

NAME = "telemetry.jsonl"
BEGIN, STEPS, WARNING = "begin", "steps", "warning"
INTERVAL_SECONDS = 10.0  # of steps that a line sums up
MOST_EARLY = 1000  # warnings before there is a file
MOST_TEXT = 2000  # characters of a warning
LINKS = ("bus", "disk read", "disk written", "network")
TIERS = ("device", "host", "disk")

Numbers = dict[str, float]


@dataclass(frozen=True)
class Reading:
    """What counters stand at.

    Attributes:
        seconds: Of the thread that takes steps, by part; what is in none is computing.
        busy: Of the pipeline's worker, by part.
        bytes: That this rank has moved, by link.
    """

    seconds: Numbers
    busy: Numbers
    bytes: Numbers

    def since(self, before: "Reading") -> "Reading":
        """What has come since."""
        return Reading(
            _less(self.seconds, before.seconds),
            _less(self.busy, before.busy),
            _less(self.bytes, before.bytes),
        )

    def plus(self, other: "Reading") -> "Reading":
        """Both together."""
        return Reading(
            _sum(self.seconds, other.seconds),
            _sum(self.busy, other.busy),
            _sum(self.bytes, other.bytes),
        )


NOTHING = Reading({}, {}, {})


def reading(stepper: Any) -> Reading:
    """Of a stepper."""
    weights = stepper.weights
    seconds, busy = weights.clock.read()
    files, pipeline = weights.files, weights.pipeline
    moved = (
        pipeline.bytes_moved if pipeline is not None else 0,
        files.bytes_read if files is not None else 0,
        files.bytes_written if files is not None else 0,
        stepper.replica.step_bytes,
    )
    return Reading(seconds, busy, dict(zip(LINKS, moved, strict=True)))


def beginning(stepper: Any) -> dict[str, Any]:
    """What a process begins with: the plan, and where units rest."""
    plan, tiers = stepper.plan, list(stepper.weights.tiers.values())
    return {
        "device": str(stepper.weights.arena.device),
        "ranks": stepper.replica.world_size,
        "units": {tier: tiers.count(tier) for tier in dict.fromkeys(tiers)},
        "plan": {"device": plan.device_bytes, "host": plan.host_bytes, "disk": plan.nvme_bytes},
        "purposes": {k: v for k, v in asdict(plan).items() if v},
    }


def held(stepper: Any) -> dict[str, int]:
    """Bytes of weights by tier, and of the whole process at its largest."""
    weights = stepper.weights
    return {
        "device": weights.arena.peak_bytes,
        "host": weights.host_bytes,
        "disk": weights.files.held_bytes if weights.files is not None else 0,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class Telemetry:
    """Writes the file of one run.

    Args:
        path: The file; made, or cut to what the journal has.
        steps: That the journal holds.
        begin: Of :func:`beginning`.
        read: Gives what counters stand at.
        more: Gives what else belongs into a line of steps.

    Attributes:
        step: Number of the next step.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        begin: Mapping[str, Any],
        read: Callable[[], Reading],
        more: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.step = steps
        self._path, self._read, self._more = path, read, more
        kept = [row for row in read_rows(path)[0] if _belongs(row, steps)]
        content = b"".join(map(_line, [*kept, {"kind": BEGIN, "step": steps, **begin}]))
        write_file(path, content)
        self._writing = threading.Lock()  # any thread may warn
        self._file, self._end = path.open("r+b", buffering=0), len(content)
        self._since, self._sum = read(), NOTHING
        self._first, self._seconds = steps, 0.0

    def add_step(self, seconds: float) -> None:
        """A step was taken, in so many seconds."""
        now = self._read()
        self._sum, self._since = self._sum.plus(now.since(self._since)), now
        self._seconds += seconds
        self.step += 1
        if self._seconds >= INTERVAL_SECONDS:
            self.flush()

    def skip(self) -> None:
        """What was done since the last step belongs to none: an evaluation."""
        self._since = self._read()

    def warn(self, text: str) -> None:
        """Somebody said this."""
        self._write({"kind": WARNING, "step": self.step, "text": one_line(text)[:MOST_TEXT]})

    def flush(self) -> None:
        """Write the steps that no line holds yet."""
        if self.step == self._first:
            return
        found, self._sum = self._sum, NOTHING
        row = {
            "kind": STEPS,
            "first": self._first,
            "steps": self.step - self._first,
            "seconds": _rounded({"step": self._seconds, **found.seconds}),
            "busy": _rounded(found.busy),
            "bytes": found.bytes,
            **self._more(),
        }
        self._first, self._seconds = self.step, 0.0
        self._write(row)

    def close(self) -> None:
        """Everything is in the file."""
        self.flush()
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        line = _line(row)
        with self._writing, naming(self._path):
            write_whole(self._file, line, self._end)
            self._end += len(line)


class _Listens(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.telemetry: Telemetry | None = None
        self._early: deque[str] = deque(maxlen=MOST_EARLY)

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or keep it until there is a file."""
        text = record.getMessage()
        if self.telemetry is None:
            self._early.append(text)
            return
        with suppress(OSError):  # which the next line of steps meets, and raises
            self.telemetry.warn(text)

    def tell(self, telemetry: Telemetry | None) -> None:
        """Where to write from now on; None where a file is closed."""
        self.telemetry = telemetry
        if telemetry is not None:
            while self._early:
                telemetry.warn(self._early.popleft())


@contextmanager
def listening() -> Iterator[Callable[[Telemetry | None], None]]:
    """Our own warnings meanwhile go to the telemetry that the function is told."""
    handler, logger = _Listens(), logging.getLogger("zo_offload")
    logger.addHandler(handler)
    try:
        yield handler.tell
    finally:
        logger.removeHandler(handler)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The file's whole lines that are ours, and how many are damaged.

    What follows the last line end is being written, or was cut off by a kill.
    """
    if not path.is_file():
        return [], 0
    return parsed(path.read_bytes().decode("utf-8", errors="replace"))


def parsed(text: str) -> tuple[list[dict[str, Any]], int]:
    r"""The same of a text.

    Example:
        >>> parsed('{"kind": "warning", "step": 1, "text": "hot"}\n7\n{"kind": "st')
        ([{'kind': 'warning', 'step': 1, 'text': 'hot'}], 1)
    """
    rows, damaged = [], 0
    for line in text.rpartition("\n")[0].split("\n"):
        try:
            row = json.loads(line) if line else None
        except (ValueError, RecursionError):
            row = 0
        if isinstance(row, dict) and _is_ours(row):
            rows.append(row)
        else:
            damaged += row is not None
    return rows, damaged


def _is_ours(row: Mapping[str, Any]) -> bool:
    def counts(*names: str) -> bool:
        return all(type(row.get(name)) is int and 0 <= row[name] < 2**40 for name in names)

    if row.get("kind") == STEPS:
        return counts("first", "steps") and isinstance(row.get("seconds"), dict)
    if row.get("kind") == WARNING:
        return counts("step") and isinstance(row.get("text"), str)
    return row.get("kind") == BEGIN and counts("step")


def _belongs(row: Mapping[str, Any], steps: int) -> bool:
    """Whether the journal has the steps of a row; what was said stays said."""
    if row["kind"] == STEPS:
        return row["first"] + row["steps"] <= steps
    return row["kind"] == WARNING or row["step"] <= steps


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, separators=(",", ":")) + "\n").encode()


def _rounded(numbers: Numbers) -> Numbers:
    return {name: round(value, 6) for name, value in numbers.items()}


def _less(now: Numbers, before: Numbers) -> Numbers:
    return {name: value - before.get(name, 0) for name, value in now.items()}


def _sum(one: Numbers, other: Numbers) -> Numbers:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def computing(seconds: Mapping[str, float]) -> float:
    """What is left of a step's seconds beside the parts that are told.

    Example:
        >>> computing({"step": 3.0, "bus": 0.5, "exchange": 0.25})
        2.25
    """
    return max(0.0, seconds.get("step", 0.0) - sum(seconds.get(part, 0.0) for part in PARTS))
