"""How every chart looks: its size and letters, its legend, its axes; and a figure as SVG and PNG.

Letters are as large on a figure as they are to be read on a phone's screen, which a page shows it
across. A legend has rows of its own above the axes, so that it never lies on a curve.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.6, 2.9  # inches, of 72 units; some 320 to 350 pixels of a phone
LETTERS = 11.5  # units
LEGEND_ROW, LEGEND_COLUMNS = 0.22, 6
BARS, BAR = 0.7, 0.32  # inches: around all of them, and of each
# On a page, ink and colours stand for var(--ink), var(--c0), ...
COLOURS = ("#2563b0", "#c2570c", "#15803d", "#a21caf", "#b91c1c", "#0e7490", "#6d5a00", "#57606a")
INK = "#24292f"
UNLIKE = 20.0  # times as large, and no axis from 0 shows both
DECAYED = 100.0  # times as small a rate need not be shown beside others
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names come from files
    "svg.fonttype": "none",
    "font.size": LETTERS,
    "axes.labelsize": LETTERS,
    "xtick.labelsize": LETTERS,
    "ytick.labelsize": LETTERS,
    "legend.fontsize": LETTERS,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def colour_of(index: int) -> str:
    """Of a run or part, by its place."""
    return COLOURS[index % len(COLOURS)]


def letter(index: int) -> str:
    """A run's name in charts.

    Example:
        >>> letter(0), letter(27)
        ('A', 'B2')
    """
    turn, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(turn + 1) if turn else "")


def new_figure(bars: int | None = None) -> "tuple[Figure, Axes]":
    """An empty figure for curves, or for so many bars, one below the other."""
    from matplotlib.figure import Figure

    height = HEIGHT if bars is None else BARS + BAR * bars
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6, axis="both" if bars is None else "x")
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    return figure, axes


def add_legend(axes: "Axes", handles: "Sequence[Artist]", names: Sequence[str]) -> None:
    """Above the axes, for which the figure grows."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    columns = min(LEGEND_COLUMNS if max(map(len, names)) < 4 else 3, len(names))
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows)
    figure.legend(
        handles, names, loc="outside upper center", ncols=columns, frameon=False,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.2, labelspacing=0.3, borderpad=0.1,
    )  # fmt: skip


def are_unlike(sizes: Sequence[float]) -> bool:
    """Whether the largest of some runs' sizes dwarfs the smallest; those that are 0 do not count.

    Example:
        >>> are_unlike([1.0, 20.0]), are_unlike([0.0, 1.0, 21.0]), are_unlike([])
        (False, True, False)
    """
    found = [size for size in sizes if size > 0]
    return bool(found) and max(found) > UNLIKE * min(found)


def use_log(axes: "Axes") -> None:
    """A logarithmic axis of what was drawn, with numbers on it however short it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = map(float, axes.get_ylim())
    if high < 4 * low:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    elif high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def as_files(figure: "Figure", name: str) -> tuple[str, bytes]:
    """An ``svg`` element for a page, whose colours are the page's; and a PNG, on white.

    Each is drawn once: ``savefig`` would draw a figure that has a layout twice. The layout takes
    most of the time; it is found as the first is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text, content = io.StringIO(), io.BytesIO()
    figure.patch.set_visible(False)
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    figure.set_layout_engine("none")
    figure.patch.set_visible(True)
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(content)
    return _inline(text.getvalue(), name), content.getvalue()


def _inline(svg: str, name: str) -> str:
    """Of a file's text the element, with names of its own, for a page that holds several."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "var(--ink)")
    for index, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{index})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">',
                  svg, count=1)  # fmt: skip
