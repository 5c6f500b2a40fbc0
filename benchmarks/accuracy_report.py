"""Tables and curves of `accuracy.py`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # two-sided, by sample
BASELINE = "mezo"
SPENT = {"forwards": 0, "tokens": 3, "seconds": 4}  # columns of a curve's points
REACHED = {"loss": 1, "accuracy": 2}
Run = dict[str, Any]


def groups(found: Sequence[Run], search: bool) -> dict[str, list[Run]]:
    """Runs by method; in a search, by learning rate too."""
    grouped: dict[str, list[Run]] = {}
    for each in found:
        name = f"{each['method']}, lr {each['lr']:g}" if search else each["method"]
        grouped.setdefault(name, []).append(each)
    return grouped


def loss_of(run: Run) -> float:
    """Infinite where it diverged, whatever was written."""
    return run["loss"] if math.isfinite(run["loss"]) else math.inf


def has_diverged(run: Run) -> bool:
    """Whether it has no loss."""
    return math.isinf(loss_of(run))


def finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def show(found: Sequence[Run], search: bool, notes: Mapping[tuple[str, float], str]) -> None:
    """A row a method: medians over seeds, and how far they lie apart.

    Args:
        found: Runs.
        search: Whether learning rates are compared, a row each.
        notes: To a method's learning rate.
    """
    table = Table("method", "seeds", "forwards", "loss", "accuracy", "least", "most", "lr", "s")
    for name, same in groups(found, search).items():
        accuracies = [each["accuracy"] for each in same]
        note = notes.get((same[0]["method"], same[0]["lr"]))
        table.add_row(
            name, f"{len(same)}{_diverged(same)}",
            f"{median(each['spent'] for each in same):,.0f}",
            f"{median(map(loss_of, same)):.4f}", f"{median(accuracies):.4f}",
            f"{min(accuracies):.4f}", f"{max(accuracies):.4f}",
            f"{same[0]['lr']:g}{f' ({note})' if note else ''}",
            f"{median(each['seconds'] for each in same):.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


def _diverged(same: Sequence[Run]) -> str:
    count = sum(map(has_diverged, same))
    return f" ({count} diverged)" if count else ""


def paired(found: Sequence[Run]) -> None:
    """Differences to the baseline, seed by seed, with the 95 % interval of their mean."""
    by_seed = {each["seed"]: each for each in found if each["method"] == BASELINE}
    table = Table("method", "seeds", f"accuracy less {BASELINE}'s (points)", "loss less its")
    for name, same in groups(found, search=False).items():
        both = [(each, by_seed[each["seed"]]) for each in same if each["seed"] in by_seed]
        pairs = [pair for pair in both if not any(map(has_diverged, pair))]
        if name != BASELINE and len(both) > 1:
            differences = [100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs]
            losses = [a["loss"] - b["loss"] for a, b in pairs]
            left_out = [str(a["seed"]) for a, b in both if has_diverged(a) or has_diverged(b)]
            seeds = f"{len(pairs)}" + (
                f" (seed {', '.join(left_out)} left out: diverged)" if left_out else ""
            )
            table.add_row(name, seeds, interval(differences, 2), interval(losses, 4))
    if table.row_count:
        Console(width=130).print(table)


def interval(differences: Sequence[float], digits: int) -> str:
    """Student's, of the mean of a few differences.

    >>> interval([1.0, 2.0, 3.0], 2), interval([1.0], 2), interval([], 2)
    ('+2.00 ± 2.48', '+1.00 (one)', 'none')
    """
    if len(differences) < 2:
        return f"{differences[0]:+.{digits}f} (one)" if differences else "none"
    half = T_95.get(len(differences), 2.0) * stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.{digits}f} ± {half:.{digits}f}"


def points(same: Sequence[Run], across: int, up: int) -> list[tuple[float, list[float]]]:
    """A method's line: at each number of forwards that half of its runs reached, where they were.

    Args:
        same: Runs of the method. One that diverged has the points before that.
        across: Column of a point whose median is the place on the line; without it a point is left
            out, as of runs that did not yet record it.
        up: Column whose values are drawn.
    """
    reached: dict[float, list[list[float]]] = {}
    for point in (point for each in same for point in each["curve"]):
        if len(point) > max(across, up):
            reached.setdefault(point[0], []).append(point)
    return [
        (median(point[across] for point in there), [point[up] for point in there])
        for _, there in sorted(reached.items())
        if 2 * len(there) >= len(same)
    ]


def draw(found: Sequence[Run], path: Path) -> None:
    """Loss and accuracy against what they cost, a line a method (median of seeds, their range)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(len(REACHED), len(SPENT), sharex="col", sharey="row")
    for row, (label, up) in zip(panels, REACHED.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, (cost, across) in zip(row, SPENT.items(), strict=True):
            lacking = _draw_lines(panel, found, across, up)
            if len(lacking) < len(groups(found, search=False)):
                panel.set_xscale("log")
            panel.grid(alpha=0.3)
            if label == [*REACHED][-1]:
                panel.set_xlabel(
                    f"{cost} (not recorded: {', '.join(lacking)})" if lacking else cost
                )
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def _draw_lines(panel: Any, found: Sequence[Run], across: int, up: int) -> list[str]:
    """One a method; those that have none."""
    lacking = []
    for name, same in groups(found, search=False).items():
        drawn = points(same, across, up)
        places, values = [place for place, _ in drawn], [values for _, values in drawn]
        label = f"{name}{_diverged(same)}"
        (line,) = panel.plot(places, [median(v) for v in values], ".-", label=label)
        low, high = [min(v) for v in values], [max(v) for v in values]
        panel.fill_between(places, low, high, color=line.get_color(), alpha=0.15)
        lacking += [] if drawn else [name]
    return lacking
