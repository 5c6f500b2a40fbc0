"""Charts of runs, as SVG that takes its colours from the page, and as PNG."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zo_offload.metrics import smooth
from zo_offload.report import figure, measured, series
from zo_offload.report.figure import INK, colour_of, letter
from zo_offload.report.found import Run
from zo_offload.telemetry import TIERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30


@dataclass(frozen=True)
class Chart:
    """One picture of all runs.

    Attributes:
        name: Of its file.
        title: Above it.
        text: What it shows, in a sentence or two.
        draw: On axes.
        rows: Bars, where it has some and no curves.
    """

    name: str
    title: str
    text: str
    draw: "Callable[[Axes, Sequence[Run]], None]"
    rows: int = 0


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Those that have something to show."""
    found = [
        _curve("loss", "Loss", "Mean loss of each step's lanes (thin), smoothed (thick), and on "
               "the dev set (dashed, with dots).", _draw_loss, any(r.steps for r in runs)),
        _curve("accuracy", "Accuracy", "On the dev set.", _draw_accuracy,
               any(r.evaluations for r in runs)),
        _curve("projected-grad", "Projected gradients", "Size of what was measured along each "
               "direction: median, and the bands that hold 50 % and 90 % of the probes. Zeros, and "
               "steps that were skipped, are left out.", _draw_grads,
               any(any(s.grads) for r in runs for s in r.steps)),
        _curve("noise", "Noise over signal", "Rounding in L+ - L-, as the first batch showed it, "
               "over the rest of L+ - L-. Above 0.5 (dotted) a step is more rounding than "
               "learning.", _draw_noise,
               any(series.noise_over_signal(r, measured.noise(r))[0] for r in runs)),
        _curve("lr", "Learning rate", "As it was applied.", _draw_lr, any(r.steps for r in runs)),
        _curve("seconds", "Seconds of a step", "Each step (thin), and smoothed (thick).",
               _draw_seconds, any(r.seconds for r in runs)),
        Chart("parts", "Where a step's seconds go", "Mean of a step. What is done beside the "
              "computing costs nothing until the step stands and waits for it.", _draw_parts,
              sum(bool(measured.seconds_by_part(r)) for r in runs)),
        Chart("memory", "Memory of weights against the plan", "By tier: planned (pale) and held "
              "at most (full).", _draw_memory, sum(len(_tiers(r)) for r in runs)),
    ]  # fmt: skip
    return [chart for chart in found if chart.rows]


def _curve(name: str, title: str, text: str, draw: Any, has_any: bool) -> Chart:
    return Chart(name, title, text, draw, -1 if has_any else 0)


def drawn(chart: Chart, runs: Sequence[Run]) -> tuple[str, bytes]:
    """An ``svg`` element for a page, whose colours are the page's; and a PNG, on white."""
    import matplotlib as mpl

    with mpl.rc_context({**figure.STYLE, "svg.hashsalt": chart.name}):
        paper, axes = figure.new_figure(chart.rows if chart.rows > 0 else None)
        chart.draw(axes, runs)
        return figure.as_files(paper, chart.name)


def _over_steps(axes: "Axes", runs: Sequence[Run]) -> None:
    """What all curves have: whole steps below, and runs named where there are several."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if len(runs) > 1:
        places = range(len(runs))
        lines = [Line2D([], [], color=colour_of(index), linewidth=2.5) for index in places]
        figure.add_legend(axes, lines, [letter(index) for index in places])


def _draw_loss(axes: "Axes", runs: Sequence[Run]) -> None:
    tops, middles = [], []
    for index, run in enumerate(runs):
        steps, losses = [s.step for s in run.steps], [s.loss for s in run.steps]
        colour = colour_of(index)
        axes.plot(*series.thinned(steps, losses), color=colour, alpha=0.3, linewidth=0.6)
        smoothed = series.thinned(steps, smooth(losses))
        axes.plot(*smoothed, color=colour, linewidth=1.8)
        middles += [statistics.median(smoothed[1])] if smoothed[1] else []
        taken, dev = series.finite([e[0] for e in run.evaluations], [e[2] for e in run.evaluations])
        axes.plot(taken, dev, "o--", color=colour, markersize=4, linewidth=1)
        kept = sorted(series.finite(steps, losses)[1])
        tops += ([1.3 * kept[int(0.98 * (len(kept) - 1))]] if kept else []) + [1.1 * d for d in dev]
    if figure.are_unlike(middles) and min(middles) > 0:
        figure.use_log(axes)
    else:
        top = max(tops, default=0.0)
        axes.set_ylim(0, top if 0 < top < 1e300 else None)
    axes.set_ylabel("loss")
    _over_steps(axes, runs)


def _draw_accuracy(axes: "Axes", runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        taken, found = series.finite(*[[e[i] for e in run.evaluations] for i in (0, 1)])
        axes.plot(taken, found, "o-", color=colour_of(index), markersize=4)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("dev " + " or ".join(dict.fromkeys(run.metric for run in runs))[:40])
    _over_steps(axes, runs)


def _draw_grads(axes: "Axes", runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        xs, rows = series.grad_quantiles(run)
        if not rows:
            continue
        low, quarter, middle, three, high = map(list, zip(*rows, strict=True))
        colour = colour_of(index)
        axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.fill_between(xs, quarter, three, color=colour, alpha=0.25, linewidth=0)
        axes.plot(xs, middle, color=colour, marker="o" if len(xs) == 1 else None)
    figure.use_log(axes)
    axes.set_ylabel("|projected_grad|")
    _over_steps(axes, runs)


def _draw_noise(axes: "Axes", runs: Sequence[Run]) -> None:
    axes.axhline(0.5, color=INK, linestyle=":", linewidth=1)
    any_noise = False
    for index, run in enumerate(runs):
        xs, ys = series.noise_over_signal(run, measured.noise(run))
        if any(ys):
            axes.plot(xs, ys, color=colour_of(index), marker="o" if len(xs) == 1 else None)
            any_noise = True
    if any_noise:
        figure.use_log(axes)
    axes.set_ylabel("noise / signal")
    _over_steps(axes, runs)


def _draw_lr(axes: "Axes", runs: Sequence[Run]) -> None:
    peaks = []
    for index, run in enumerate(runs):
        steps, rates = series.thinned([s.step for s in run.steps], [s.lr for s in run.steps])
        axes.plot(steps, rates, color=colour_of(index))
        peaks.append(max(rates, default=0.0))
    if figure.are_unlike(peaks):
        figure.use_log(axes)
        least = min(peak for peak in peaks if peak > 0) / figure.DECAYED
        axes.set_ylim(bottom=max(least, axes.get_ylim()[0]))
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    _over_steps(axes, runs)


def _draw_seconds(axes: "Axes", runs: Sequence[Run]) -> None:
    tops, middles = [0.0], []
    for index, run in enumerate(runs):
        steps, found = list(run.seconds), list(run.seconds.values())
        axes.plot(*series.thinned(steps, found), color=colour_of(index), alpha=0.3, linewidth=0.6)
        axes.plot(*series.thinned(steps, smooth(found)), color=colour_of(index), linewidth=1.8)
        tops += [1.5 * sorted(found)[int(0.98 * (len(found) - 1))]] if found else []
        middles += [statistics.median(found)] if found else []
    if figure.are_unlike(middles):
        figure.use_log(axes)
    else:
        axes.set_ylim(0, max(tops) or None)
    axes.set_ylabel("seconds")
    _over_steps(axes, runs)


def _draw_parts(axes: "Axes", runs: Sequence[Run]) -> None:
    from matplotlib.patches import Patch

    bars = [(letter(i), found) for i, run in enumerate(runs)
            if (found := measured.seconds_by_part(run))]  # fmt: skip
    shown = {part: colour_of(index) for index, part in enumerate(measured.SHOWN_PARTS)
             if any(found[part] for _, found in bars)}  # fmt: skip
    for place, (_, found) in enumerate(bars):
        left = 0.0
        for part, colour in shown.items():
            axes.barh(place, found[part], left=left, color=colour, height=0.6)
            left += found[part]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step")
    if shown:
        figure.add_legend(axes, [Patch(color=colour) for colour in shown.values()], list(shown))


def _tiers(run: Run) -> list[tuple[str, float, float]]:
    """``(tier, planned, held)`` where there is anything."""
    plan, held = measured.planned(run), measured.held(run)
    found = [(tier, plan.get(tier, 0.0), held.get(tier, 0.0)) for tier in TIERS]
    return [row for row in found if row[1] or row[2]]


def _draw_memory(axes: "Axes", runs: Sequence[Run]) -> None:
    bars = [(f"{letter(i)} {tier}", i, plan, held)
            for i, run in enumerate(runs) for tier, plan, held in _tiers(run)]  # fmt: skip
    largest = max(max(plan, held) for _, _, plan, held in bars)
    unit, name = (GIB, "GiB") if largest >= GIB else (2**20, "MiB")
    for place, (_, index, plan, held) in enumerate(bars):
        axes.barh(place, plan / unit, color=colour_of(index), alpha=0.35, height=0.7)
        axes.barh(place, held / unit, color=colour_of(index), height=0.3)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel(name)
