"""Tables and curves of `accuracy.py`."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # two-sided, by sample
BASELINE = "mezo"
Run = dict[str, Any]


def groups(found: Sequence[Run], search: bool) -> dict[str, list[Run]]:
    """Runs by method; in a search, by learning rate too."""
    grouped: dict[str, list[Run]] = {}
    for each in found:
        name = f"{each['method']}, lr {each['lr']:g}" if search else each["method"]
        grouped.setdefault(name, []).append(each)
    return grouped


def show(found: Sequence[Run], search: bool) -> None:
    """A row a method: medians over seeds, and how far they lie apart."""
    table = Table("method", "seeds", "forwards", "loss", "accuracy", "least", "most", "lr", "s")
    for name, same in groups(found, search).items():
        accuracies = [each["accuracy"] for each in same]
        table.add_row(
            name, str(len(same)), f"{median(each['spent'] for each in same):,.0f}",
            f"{median(each['loss'] for each in same):.4f}", f"{median(accuracies):.4f}",
            f"{min(accuracies):.4f}", f"{max(accuracies):.4f}", f"{same[0]['lr']:g}",
            f"{median(each['seconds'] for each in same):.0f}",
        )  # fmt: skip
    Console(width=110).print(table)


def paired(found: Sequence[Run]) -> None:
    """Differences to the baseline, seed by seed, with the 95 % interval of their mean."""
    by_seed = {each["seed"]: each for each in found if each["method"] == BASELINE}
    table = Table("method", "seeds", f"accuracy less {BASELINE}'s (points)", "loss less its")
    for name, same in groups(found, search=False).items():
        pairs = [(each, by_seed[each["seed"]]) for each in same if each["seed"] in by_seed]
        if name != BASELINE and len(pairs) > 1:
            differences = [100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs]
            losses = [a["loss"] - b["loss"] for a, b in pairs]
            table.add_row(name, str(len(pairs)), interval(differences, 2), interval(losses, 4))
    if table.row_count:
        Console(width=110).print(table)


def interval(differences: Sequence[float], digits: int) -> str:
    """Student's, of the mean of a few differences.

    >>> interval([1.0, 2.0, 3.0], 2)
    '+2.00 ± 2.48'
    """
    half = T_95.get(len(differences), 2.0) * stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.{digits}f} ± {half:.{digits}f}"


def draw(found: Sequence[Run], path: Path) -> None:
    """Loss and accuracy against forwards, a line a method (median of seeds, and their range)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, same in groups(found, search=False).items():
        curves = [each["curve"] for each in same if len(each["curve"]) == len(same[0]["curve"])]
        forwards = [point[0] for point in curves[0]]
        for panel, column in zip(panels, (1, 2), strict=True):
            values = [[curve[i][column] for curve in curves] for i in range(len(forwards))]
            (line,) = panel.plot(forwards, [median(v) for v in values], label=name)
            panel.fill_between(
                forwards, [min(v) for v in values], [max(v) for v in values],
                color=line.get_color(), alpha=0.15,
            )  # fmt: skip
    for panel, label in zip(panels, ("loss", "accuracy"), strict=True):
        panel.set_xscale("log")
        panel.set_xlabel("forwards")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
