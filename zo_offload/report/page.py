"""The page: everything that was found, in one HTML file that needs nothing else.

Everything that comes from a run's files is escaped by the template; the only markup that is not
the template's own is the charts', which matplotlib writes and escapes.
"""

import functools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from zo_offload import __version__
from zo_offload.report import tables
from zo_offload.report.charts import Chart
from zo_offload.report.figure import COLOURS, letter
from zo_offload.report.found import Run

DARK = ("#6cb6ff", "#f69d50", "#6bc46d", "#e28df0", "#ff938a", "#4fc4d6", "#d8b84a", "#9198a1")


def page(
    runs: Sequence[Run], pictures: Sequence[tuple[Chart, str]], now: datetime | None = None
) -> str:
    """The HTML text.

    Args:
        runs: What was found, at least one.
        pictures: Charts with their ``svg`` elements.
        now: When it is written (default: now).
    """
    settings = tables.settings(runs)
    written = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    shown = [_of_run(index, run) for index, run in enumerate(runs)]
    return _template().render(
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side",
        written=written,
        version=__version__,
        light=COLOURS,
        dark=DARK,
        runs=shown,
        results=tables.results(runs),
        warned=any(run["warnings"] for run in shown),
        charts=[_of_chart(chart, svg) for chart, svg in pictures],
        tables=[
            (
                "seconds-by-part",
                "Seconds by part",
                "Mean of a step; busy: of the thread that fetches, overlapped or not",
                tables.parts(runs),
            ),
            ("bytes-by-link", "Bytes by link", "Mean of a step", tables.links(runs)),
            ("bytes-of-memory", "Memory", "Bytes of weights", tables.memory(runs)),
        ],
        settings=settings,
        differing=tables.differing(settings),
    )


def _of_run(index: int, run: Run) -> dict[str, Any]:
    return {
        "letter": letter(index),
        "name": run.name,
        "state": run.state,
        "missing": run.missing,
        "warnings": tables.warnings(run),
    }


def _of_chart(chart: Chart, svg: str) -> dict[str, Any]:
    return {
        "name": chart.name,
        "title": chart.title,
        "text": chart.text,
        "svg": Markup(svg),
    }


def foldable(text: str) -> Markup:
    """Text that a narrow cell folds between the parts of a path or a name.

    Example:
        >>> foldable("config.seed <b> 1.5 MiB/s")
        Markup('config.<wbr>seed &lt;b&gt; 1.5 MiB/s')
    """
    return Markup(re.sub(r"(?<=[./_])(?=[^\W\d]\w)", "<wbr>", escape(text)))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["foldable"] = foldable
    return environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
