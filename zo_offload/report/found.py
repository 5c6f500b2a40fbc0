"""What a run's directory holds, as far as it can be read.

A directory may be of a run that is under way, was killed, or is damaged in part: what cannot be
read is told (:attr:`Run.missing`) and the rest is shown. Contents are untrusted: a number that is
none is left out, and text is text.
"""

import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_offload.errors import ConfigError, JournalError
from zo_offload.estimator import mean_loss
from zo_offload.files import LOCK
from zo_offload.journal import Flags, Journal, Record
from zo_offload.run_directory import journal_path
from zo_offload.telemetry import BEGIN, NAME, STEPS, WARNING, parsed

FINISHED, UNDER_WAY, ENDED = "finished", "under way", "not finished, and no process works on it"
COLUMNS = ("step", "loss", "lr", "projected_grad", "seconds", None, "dev_loss")
ACCURACY_COLUMN = COLUMNS.index(None)
MOST_BYTES = 1 << 28  # of a file of text
MOST_STEP = 2**32


@dataclass(frozen=True)
class Step:
    """One step that was taken.

    Attributes:
        step: Its number, from 0.
        loss: Mean over its lanes; may be no number.
        lr: Learning rate.
        grads: Projected gradients, one a probe; none of backprop.
        differences: ``L+ - L-``, one a probe, where lanes are pairs.
        skipped: Whether it was recorded and not applied.
    """

    step: int
    loss: float
    lr: float
    grads: tuple[float, ...] = ()
    differences: tuple[float, ...] = ()
    skipped: bool = False


@dataclass
class Run:
    """One directory.

    Attributes:
        directory: Where.
        state: ``FINISHED``, ``UNDER_WAY`` or ``ENDED``.
        asked: What ``run.json`` says.
        summary: What ``summary.json`` says; empty before the end.
        steps: In order, of the journal; where that cannot be read, of ``metrics.csv``.
        rollbacks: How often the journal went back to go along other directions.
        metric: What the accuracy is called.
        evaluations: ``(steps taken, accuracy, dev loss)``.
        seconds: Of a step, by its number.
        begins: Lines of the telemetry, of its three kinds, in order.
        telemetry: Those of steps.
        warnings: ``(step, text)``.
        missing: A line for each part that is not there or damaged.
    """

    directory: Path
    state: str = ENDED
    asked: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    rollbacks: int = 0
    metric: str = "accuracy"
    evaluations: Sequence[tuple[int, float, float]] = ()
    seconds: Mapping[int, float] = field(default_factory=dict)
    begins: Sequence[Mapping[str, Any]] = ()
    telemetry: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[tuple[int, str]] = ()
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the directory."""
        return self.directory.absolute().name or str(self.directory)

    @property
    def steps_asked(self) -> int | None:
        """How many the run is to take."""
        found = number(self.asked.get("steps"))
        return int(found) if found is not None and found >= 0 else None


def read_run(directory: Path) -> Run:
    """What is there.

    Raises:
        ConfigError: It is no directory, or nothing of a run is in it.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no directory; give the --output of zo-offload train")
    if not any((directory / name).exists() for name in ("run.json", "metrics.csv", "journal")):
        raise ConfigError(
            f"{directory}: no run.json, metrics.csv or journal is in it, so it holds no run; "
            "give the --output of zo-offload train"
        )
    run = Run(directory)
    run.asked = _read_json(directory / "run.json", run.missing)
    run.state = read_state(directory)
    if run.state == FINISHED:
        run.summary = _read_json(directory / "summary.json", run.missing)
    _read_metrics(run)
    _read_journal(run)
    _read_telemetry(run)
    return run


def number(value: Any) -> float | None:
    """A finite number, if it is one.

    Example:
        >>> number(2), number("2"), number(True), number(float("nan")), number(10**400)
        (2.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def is_at_work(directory: Path) -> bool:
    """Whether a process holds the run: its lock goes with it, also by ``kill -9``."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def read_state(directory: Path) -> str:
    """Of a run: ``FINISHED``, ``UNDER_WAY`` or ``ENDED``."""
    at_work = is_at_work(directory)  # asked first: it lets go after the summary is there
    if (directory / "summary.json").exists():
        return FINISHED
    return UNDER_WAY if at_work else ENDED


def read_text(path: Path) -> str:
    """Of a plain file; what is no UTF-8 is replaced.

    Raises:
        OSError: It cannot be read, is no plain file, or holds too much for text.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(f"holds more than {MOST_BYTES:,} bytes")
    return content.decode("utf-8", errors="replace")


def _read_json(path: Path, missing: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        missing.append(f"{path.name}: not there")
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.name}: cannot be read ({_short(error)})")
    else:
        if isinstance(found, dict):
            return found
        missing.append(f"{path.name}: holds no JSON object")
    return {}


def _read_metrics(run: Run) -> None:
    """Evaluations and seconds; losses too, which the journal then replaces."""
    path = run.directory / "metrics.csv"
    try:
        text = read_text(path)
    except FileNotFoundError:
        run.missing.append(f"{path.name}: not there, so no evaluations and no seconds")
        return
    except OSError as error:
        run.missing.append(f"{path.name}: cannot be read ({_short(error)})")
        return
    header, _, text = text.partition("\n")
    names = header.split(",")
    expected = [name or names[ACCURACY_COLUMN] for name in COLUMNS] if len(names) == 7 else []
    if names != expected:
        run.missing.append(f"{path.name}: its first line is not that of a run's metrics")
        return
    run.metric = names[ACCURACY_COLUMN]
    rows, damaged = _rows(text.rpartition("\n")[0])
    if damaged:
        run.missing.append(f"{path.name}: {damaged} rows are damaged and left out")
    run.steps = [Step(s, row[1], row[2] or 0.0) for s, row in rows.items() if row[1] is not None]
    run.seconds = {s: row[4] for s, row in rows.items() if row[4] is not None and row[4] >= 0}
    run.evaluations = [
        (s, row[ACCURACY_COLUMN], math.nan if row[6] is None else row[6])
        for s, row in rows.items()
        if row[ACCURACY_COLUMN] is not None
    ]


def _rows(text: str) -> tuple[dict[int, list[Any]], int]:
    """Whole rows by step, in order, and how many are damaged."""
    rows: dict[int, list[Any]] = {}
    damaged = 0
    reader = csv.reader(io.StringIO(text.replace("\0", "")))
    while True:
        try:
            cells = next(reader)
            values = [float(cell) if cell else None for cell in cells]
            step = int(cells[0])
            if len(values) != len(COLUMNS) or not 0 <= step <= MOST_STEP:
                raise ValueError
        except StopIteration:
            return dict(sorted(rows.items())), damaged
        except (ValueError, IndexError, csv.Error):
            damaged += 1
        else:
            rows[step] = values


def _read_journal(run: Run) -> None:
    if run.asked.get("first_order"):
        return  # backprop keeps none
    try:
        path = journal_path(run.asked.get("config") or {}, run.directory)
        journal = Journal.read(path)
        size = path.stat().st_size
    except (JournalError, OSError, ValueError, TypeError, AttributeError) as error:
        run.missing.append(f"journal: {_short(error)}; losses are those of metrics.csv")
        return
    run.steps = [_step(record) for record in journal.records]
    run.rollbacks = journal.records.stream
    tail = size - len(journal.content)
    if tail > 0 and run.state != UNDER_WAY:
        run.missing.append(
            f"journal: {tail} bytes of an unfinished record lie at its end, as a kill leaves them; "
            f"step {len(run.steps)} is next"
        )


def _read_telemetry(run: Run) -> None:
    if run.asked.get("first_order"):
        return
    try:
        rows, damaged = parsed(read_text(run.directory / NAME))
    except FileNotFoundError:
        run.missing.append(f"{NAME}: not there, so no seconds by part, bytes and memory")
        return
    except OSError as error:
        run.missing.append(f"{NAME}: cannot be read ({_short(error)})")
        return
    if damaged:
        run.missing.append(f"{NAME}: {damaged} lines are damaged and left out")
    run.begins = [row for row in rows if row["kind"] == BEGIN]
    run.telemetry = [row for row in rows if row["kind"] == STEPS]
    run.warnings = [(row["step"], row["text"]) for row in rows if row["kind"] == WARNING]


def _step(record: Record) -> Step:
    losses, probes = record.losses, record.probes
    paired = bool(probes) and len(losses) == 2 * len(probes)
    differences = [a - b for a, b in zip(losses[::2], losses[1::2], strict=True)] if paired else []
    return Step(
        record.step,
        mean_loss(losses),
        record.lr,
        tuple(probe.projected_grad for probe in probes),
        tuple(differences),
        bool(record.flags & Flags.SKIPPED),
    )


def _short(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason if len(reason) < 400 else f"{reason[:400]}..."
