"""Charts of runs: letters a phone shows, legends beside the curves, axes that show every run."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zo_offload.report import charts, figure
from zo_offload.report.found import Run, Step

CHART_ON_A_PHONE = 340  # pixels of 390, within the margins of page and chart
READABLE = 11  # pixels


def run_of(lr: float = 0.1, seconds: float = 1.0, num_steps: int = 20, loss: float = 1.0) -> Run:
    """A run whose rate falls to nothing."""
    taken = [(i, loss * (1 + i % 3), lr * (1 - i / num_steps)) for i in range(num_steps)]
    return Run(
        Path("run"),
        steps=[Step(*step, grads=(0.1 + step[0],), differences=(0.2,)) for step in taken],
        seconds=dict.fromkeys(range(num_steps), seconds),
        evaluations=[(0, 0.5, 1.0), (num_steps, 0.9, 0.5)],
        begins=[{"plan": {"device": 2**20, "host": 2**21}}],
        telemetry=[
            {
                "steps": num_steps,
                "seconds": {"step": seconds, "bus": seconds / 4, "disk": seconds / 8},
                "held": {"device": 2**20},
                "noise": 0.01,
            }
        ],
    )


def drawn(name: str, runs: Sequence[Run]) -> tuple[Figure, Axes]:
    """A chart as it is laid out."""
    (chart,) = (each for each in charts.charts(runs) if each.name == name)
    paper, axes = figure.new_figure(chart.rows if chart.rows > 0 else None)
    chart.draw(axes, runs)
    FigureCanvasAgg(paper).draw()
    return paper, axes


@pytest.mark.parametrize("count", [1, 3])
def test_every_letter_is_large_enough_for_a_phone(count: int):
    runs = [run_of() for _ in range(count)]
    found = charts.charts(runs)
    assert len(found) == 8
    for chart in found:
        svg, _ = charts.drawn(chart, runs)
        (width,) = re.findall(r'viewBox="0 0 ([\d.]+) [\d.]+"', svg)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert len(sizes) == svg.count("<text") > 4
        assert min(sizes) * CHART_ON_A_PHONE / float(width) >= READABLE, chart.name


@pytest.mark.parametrize("name", ["loss", "accuracy", "projected-grad", "lr", "seconds", "parts"])
@pytest.mark.parametrize("count", [2, 26])
def test_no_legend_lies_on_a_curve(name: str, count: int):
    paper, axes = drawn(name, [run_of() for _ in range(count)])
    assert axes.get_legend() is None
    (legend,) = paper.legends
    above, inside = legend.get_window_extent(), axes.get_window_extent()
    assert above.y0 >= inside.y1
    assert paper.bbox.x0 <= above.x0
    assert above.x1 <= paper.bbox.x1
    assert inside.height > 100 or name == "parts"


def test_rates_of_runs_that_are_unlike_stand_on_a_log_axis():
    _, axes = drawn("lr", [run_of(lr=2.0), run_of(lr=2e-3)])
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 2e-4
    assert high > 2.0
    assert low >= 2e-3 / figure.DECAYED
    assert drawn("seconds", [run_of(seconds=2.0), run_of(seconds=0.02)])[1].get_yscale() == "log"
    assert drawn("loss", [run_of(loss=1.0), run_of(loss=1e6)])[1].get_yscale() == "log"


def test_losses_below_nothing_stand_on_a_plain_axis():
    assert drawn("loss", [run_of(loss=-1.0), run_of(loss=1e6)])[1].get_yscale() == "linear"


@pytest.mark.parametrize("name", ["loss", "lr", "seconds"])
def test_rates_of_runs_that_are_alike_begin_at_nothing(name: str):
    alike = [run_of(lr=1.0, seconds=1.0), run_of(lr=0.1, seconds=0.1)]
    for runs in (alike, alike[:1], [run_of(lr=0.0, seconds=0.0), *alike]):
        _, axes = drawn(name, runs)
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize("values", [(0.3, 0.5), (2.0, 9.0), (0.4, 30.0), (1e-6, 1e3), (5.0, 5.0)])
def test_a_log_axis_has_numbers_however_short_it_is(values: tuple[float, float]):
    paper, axes = figure.new_figure()
    axes.plot([0, 1], values)
    figure.use_log(axes)
    FigureCanvasAgg(paper).draw()
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 10
    assert all(label.get_text() for label in axes.get_yticklabels())


def test_parts_that_took_no_time_are_left_out():
    paper, _ = drawn("parts", [run_of(seconds=0.0)])
    assert not paper.legends
    paper, _ = drawn("parts", [run_of()])
    assert [text.get_text() for text in paper.legends[0].get_texts()] == ["compute", "bus", "disk"]
