"""What a run shows of itself: a row a step in ``metrics.csv``, and the curve in ``curve.png``.

A row's ``step`` counts the steps taken before it: its loss, and its accuracy where the dev set was
evaluated, belong to the same weights. The file follows the journal: a run that continues drops rows
that the journal does not have and makes up those it missed. An evaluation, which the journal does
not have, is on the disk before the step that follows it, as a row of its own; with that step's row
in its place the file is written anew, so that no power cut finds a part of both.
"""

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zo_offload.estimator import mean_loss
from zo_offload.files import naming, write_file
from zo_offload.journal import Flags, Record
from zo_offload.journal.files import write_whole
from zo_offload.telemetry import Telemetry

if TYPE_CHECKING:
    from zo_offload.tasks import Evaluation

EVALUATION = ("accuracy", "dev_loss")
STEP = re.compile("[0-9]{1,10}")
COLUMNS = ("step", "loss", "lr", "projected_grad", "seconds", *EVALUATION)


class Metrics:
    """The rows of one run, on disk and in memory.

    Args:
        path: The CSV file; made, or reconciled with the journal.
        records: The journal's.
        metric: What the column ``accuracy`` holds, and is called in the file.
        objective: What the column ``loss`` is: the loss, or one less this score.

    Attributes:
        telemetry: What else follows the steps, if anything does.
    """

    def __init__(
        self,
        path: Path,
        records: Sequence[Record],
        metric: str = "accuracy",
        objective: str = "loss",
    ) -> None:
        self.metric = metric
        self.telemetry: Telemetry | None = None
        self.objective = objective if objective == "loss" else f"1 - {objective}"
        kept = {int(row["step"]): row for row in _read(path, metric)}
        self.rows = [kept.get(record.step, {}) | _row(record) for record in records]
        last = kept.get(len(self.rows), {})
        self._pending: dict[str, str] = {key: last.get(key, "") for key in EVALUATION}
        self._path = path
        self._make()

    def evaluation(self, step: int) -> tuple[float, float] | None:
        """``(accuracy, dev_loss)`` after ``step`` steps, where it was measured."""
        row = self._pending if step == len(self.rows) else self.rows[step]
        return (float(row["accuracy"]), float(row["dev_loss"])) if row.get("accuracy") else None

    def evaluations(self) -> list[tuple[int, float, float]]:
        """Every ``(step, accuracy, dev_loss)``."""
        found = [(step, self.evaluation(step)) for step in range(len(self.rows) + 1)]
        return [(step, *pair) for step, pair in found if pair is not None]

    def add_evaluation(self, evaluation: "Evaluation") -> None:
        """The dev set, before the next step."""
        self._pending = _evaluation_row(evaluation)
        if self.telemetry is not None:
            self.telemetry.skip()
        self._write(_lines([self._pending_row]))
        os.fsync(self._file.fileno())

    def mend_evaluation(self, step: int, evaluation: "Evaluation") -> None:
        """Of an earlier step, when the file that held it was lost."""
        self.rows[step].update(_evaluation_row(evaluation))
        self._file.close()
        self._make()

    def add_step(self, record: Record, seconds: float) -> None:
        """A step that was taken."""
        row = self._pending | _row(record) | {"seconds": f"{seconds:.4f}"}
        self.rows.append(row)
        evaluated = bool(self._pending["accuracy"])
        self._pending = dict.fromkeys(EVALUATION, "")
        if evaluated:
            self._file.close()
            self._make()
        else:
            line = _lines([row])
            self._write(line)
            self._end += len(line)
        if self.telemetry is not None:
            self.telemetry.add_step(seconds)

    def close(self) -> None:
        """Close the files; every row is in them."""
        self._file.close()
        if self.telemetry is not None:
            self.telemetry.close()

    def _write(self, lines: bytes) -> None:
        with naming(self._path):
            write_whole(self._file, lines, self._end)

    def _make(self) -> None:
        header: dict[str, str] = dict(zip(COLUMNS, _header(self.metric), strict=True))
        content = _lines([header, *self.rows])
        self._end = len(content)
        if self._pending["accuracy"]:
            content += _lines([self._pending_row])
        write_file(self._path, content)
        self._file = self._path.open("r+b", buffering=0)

    @property
    def _pending_row(self) -> dict[str, str]:
        return {"step": str(len(self.rows)), **self._pending}


def draw_curve(metrics: Metrics, path: Path) -> None:
    """Loss and accuracy against steps, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    steps = [int(row["step"]) for row in metrics.rows]
    losses = [float(row["loss"]) for row in metrics.rows]
    evaluations = metrics.evaluations()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot(steps, losses, color="0.8", linewidth=0.8, label=f"{metrics.objective} of a step")
    left.plot(steps, smooth(losses), color="tab:blue", label=f"{metrics.objective}, smoothed")
    left.plot(
        [s for s, _, _ in evaluations],
        [loss for _, _, loss in evaluations],
        "s--",
        color="tab:blue",
        markersize=4,
        label="dev loss",
    )
    left.set_xlabel("steps")
    left.set_ylabel(" and ".join(dict.fromkeys([metrics.objective, "loss"])), color="tab:blue")
    left.set_ylim(bottom=0, top=_top(losses, [loss for _, _, loss in evaluations]))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = left.twinx()
    right.plot(
        [s for s, _, _ in evaluations],
        [a for _, a, _ in evaluations],
        "o-",
        color="tab:orange",
        label=f"dev {metrics.metric}",
    )
    right.set_ylabel(metrics.metric, color="tab:orange")
    right.set_ylim(0, 1)
    lines = [*left.lines, *right.lines]
    names = [str(line.get_label()) for line in lines]
    figure.legend(lines, names, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def equal_share(records: Sequence[Record]) -> float | None:
    """The share of probes whose lanes had equal losses, of steps that were not skipped."""
    tried = [p.projected_grad for r in records if not r.flags & Flags.SKIPPED for p in r.probes]
    return sum(not grad for grad in tried) / len(tried) if tried else None


def num_skipped(records: Sequence[Record]) -> int:
    """Steps that were recorded and not applied."""
    return sum(bool(record.flags & Flags.SKIPPED) for record in records)


def _row(record: Record) -> dict[str, str]:
    loss = mean_loss(record.losses)
    if not record.probes:  # backprop
        return {"step": str(record.step), "loss": f"{loss:.6f}", "lr": f"{record.lr:.6g}"}
    norm = sum(p.projected_grad * p.projected_grad for p in record.probes) ** 0.5  # inf, no error
    sign = -1.0 if len(record.probes) == 1 and record.probes[0].projected_grad < 0 else 1.0
    return {
        "step": str(record.step),
        "loss": f"{loss:.6f}",
        "lr": f"{record.lr:.6g}",
        "projected_grad": f"{sign * norm:.6g}",
    }


def _evaluation_row(evaluation: "Evaluation") -> dict[str, str]:
    # Twelve digits: an accuracy is a quotient of integers, and rounds from here as from itself.
    return {"accuracy": f"{evaluation.accuracy:.12g}", "dev_loss": f"{evaluation.loss:.6f}"}


def _lines(rows: Sequence[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([row.get(column, "") for column in COLUMNS] for row in rows)
    return text.getvalue().encode()


def _header(metric: str) -> tuple[str, ...]:
    return tuple(metric if name == "accuracy" else name for name in COLUMNS)


def _read(path: Path, metric: str) -> list[dict[str, str]]:
    """The file's whole rows; what was cut off, or is not ours, is made up from the journal."""
    if not path.exists():
        return []
    whole = path.read_bytes().decode("utf-8", errors="replace").rpartition("\n")[0]
    try:
        rows = list(csv.reader(io.StringIO(whole)))
    except csv.Error:
        return []
    if not rows or tuple(rows[0]) != _header(metric):
        return []
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:] if _is_whole(row)]


def _is_whole(row: list[str]) -> bool:
    try:
        numbers = [float(value) for value in row if value]
    except ValueError:
        return False
    return len(row) == len(COLUMNS) and bool(STEP.fullmatch(row[0])) and bool(numbers)


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average without start-up bias; a step without a loss changes nothing."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight if weight else math.nan)
    return smoothed


def _top(losses: Sequence[float], dev_losses: Sequence[float]) -> float | None:
    """Where to end the loss axis: a few outliers of single steps must not flatten the curve."""
    losses = sorted(filter(math.isfinite, losses))
    ends = [1.3 * losses[int(0.98 * (len(losses) - 1))]] if losses else []
    ends += [1.1 * loss for loss in dev_losses]
    return max((end for end in ends if math.isfinite(end)), default=0.0) or None
