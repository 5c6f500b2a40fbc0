"""What a run shows of itself: a row a step in ``metrics.csv``, and the curve in ``curve.png``.

A row's ``step`` counts the steps taken before it: its loss, and its accuracy where the dev set was
evaluated, belong to the same weights. The file follows the journal: a run that continues drops rows
that the journal does not have and makes up those it missed.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from zo_offload.journal import Record
from zo_offload.tasks import Evaluation

COLUMNS = ("step", "loss", "lr", "projected_grad", "seconds", "accuracy", "dev_loss")


class Metrics:
    """The rows of one run, on disk and in memory.

    Args:
        path: The CSV file; made, or reconciled with the journal.
        records: The journal's.
    """

    def __init__(self, path: Path, records: Sequence[Record]) -> None:
        kept = {row["step"]: row for row in _read(path)}
        rows = [_row(record) | kept.get(str(record.step), {}) for record in records]
        last = kept.get(str(len(records)), {})
        self._pending = {key: last[key] for key in ("accuracy", "dev_loss") if last.get(key)}
        self.rows: list[dict[str, str]] = rows
        aside = path.with_suffix(".csv.new")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(aside, path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def evaluation(self, step: int) -> tuple[float, float] | None:
        """``(accuracy, dev_loss)`` after ``step`` steps, where it was measured."""
        row = self._pending if step == len(self.rows) else self.rows[step]
        return (float(row["accuracy"]), float(row["dev_loss"])) if row.get("accuracy") else None

    def evaluations(self) -> list[tuple[int, float, float]]:
        """Every ``(step, accuracy, dev_loss)``."""
        found = [(step, self.evaluation(step)) for step in range(len(self.rows) + 1)]
        return [(step, *pair) for step, pair in found if pair is not None]

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """The dev set, before the next step."""
        self._pending = {
            "accuracy": f"{evaluation.accuracy:.6f}",
            "dev_loss": f"{evaluation.loss:.6f}",
        }

    def add_step(self, record: Record, seconds: float) -> None:
        """A step that was taken."""
        self._write(_row(record) | {"seconds": f"{seconds:.4f}"} | self._pending)
        self._pending = {}

    def close(self) -> None:
        """Write an evaluation that no step follows, and close the file."""
        if self._pending and not self._file.closed:
            self._writer.writerow({"step": str(len(self.rows))} | self._pending)
        self._file.close()

    def _write(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        self._writer.writerow(row)
        self._file.flush()


def draw_curve(metrics: Metrics, path: Path) -> None:
    """Loss and accuracy against steps, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    steps = [int(row["step"]) for row in metrics.rows]
    losses = [float(row["loss"]) for row in metrics.rows]
    evaluations = metrics.evaluations()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot(steps, losses, color="0.8", linewidth=0.8, label="loss of a step")
    left.plot(steps, _smooth(losses), color="tab:blue", label="loss, smoothed")
    left.plot(
        [s for s, _, _ in evaluations],
        [loss for _, _, loss in evaluations],
        "s--",
        color="tab:blue",
        markersize=4,
        label="dev loss",
    )
    left.set_xlabel("steps")
    left.set_ylabel("loss", color="tab:blue")
    left.set_ylim(bottom=0, top=_top(losses))
    right = left.twinx()
    right.plot(
        [s for s, _, _ in evaluations],
        [a for _, a, _ in evaluations],
        "o-",
        color="tab:orange",
        label="dev accuracy",
    )
    right.set_ylabel("accuracy", color="tab:orange")
    right.set_ylim(0, 1)
    handles, labels = (
        a + b
        for a, b in zip(
            left.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True
        )
    )
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _row(record: Record) -> dict[str, str]:
    loss = sum(record.losses) / len(record.losses) if record.losses else float("nan")
    norm = sum(probe.projected_grad**2 for probe in record.probes) ** 0.5
    sign = -1.0 if len(record.probes) == 1 and record.probes[0].projected_grad < 0 else 1.0
    return {
        "step": str(record.step),
        "loss": f"{loss:.6f}",
        "lr": f"{record.lr:.6g}",
        "projected_grad": f"{sign * norm:.6g}",
    }


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in COLUMNS if row.get(key)} for row in rows if _is_whole(row)]


def _is_whole(row: dict) -> bool:
    """A row that was cut off, or is not ours, is made up from the journal."""
    try:
        return (
            all(float(row[key]) is not None for key in COLUMNS if row.get(key))
            and row.get("step", "").isdigit()
        )
    except (KeyError, TypeError, ValueError):
        return False


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average without start-up bias."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def _top(losses: Sequence[float]) -> float | None:
    """Where to end the loss axis, so that a few outliers do not flatten the curve."""
    return 1.3 * sorted(losses)[int(0.98 * (len(losses) - 1))] if losses else None
