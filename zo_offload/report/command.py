"""``zo-offload report``: reads runs, writes the page and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zo_offload.errors import ConfigError
from zo_offload.files import write_file
from zo_offload.report import charts
from zo_offload.report.found import Run, read_run
from zo_offload.reporter import Reporter

MOST_RUNS = 26
PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        page: The HTML file.
        pictures: PNG files beside it.
        runs: What they show.
    """

    page: Path
    pictures: list[Path]
    runs: list[Run]


def report(
    directories: Sequence[str], output: str | None = None, reporter: Reporter | None = None
) -> Written:
    """Write a page on some runs.

    Args:
        directories: Of the runs, at most ``MOST_RUNS``.
        output: The page (default: ``report.html`` in the run's directory; of several runs, here).
        reporter: Told of what is done.

    Raises:
        ConfigError: A directory holds no run, or the page cannot be written.
    """
    from zo_offload.report.page import page

    if len(directories) > MOST_RUNS:
        raise ConfigError(
            f"RUN_DIR: {len(directories)} runs, and a page shows at most {MOST_RUNS}; give fewer"
        )
    place = Path(output) if output else Path(directories[0] if len(directories) == 1 else ".", PAGE)
    if place.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: {place} is to be a page; give a name that ends in .html")
    reporter = reporter or Reporter()
    asked = reporter.counted("reading runs", directories, len(directories))
    runs = [read_run(Path(each)) for each in asked]
    if not place.parent.is_dir():
        raise ConfigError(f"--output: {place.parent} is no directory; make it, or give another")
    wanted = charts.charts(runs)
    drawn = reporter.counted("drawing charts", wanted, len(wanted))
    found = [(chart, *charts.drawn(chart, runs)) for chart in drawn]
    text = page(runs, [(chart, svg) for chart, svg, _ in found])
    pictures = {place.with_name(f"{place.stem}-{c.name}.png"): png for c, _, png in found}
    try:
        for picture, content in pictures.items():
            write_file(picture, content)
        write_file(place, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(
            f"--output: cannot write {error.filename2 or error.filename or place}: {error.strerror}"
            "; give a place that this user may write"
        ) from error
    return Written(place, list(pictures), runs)
