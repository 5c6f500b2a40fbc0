"""``zo-offload watch``: a run in the terminal, while another process works on it.

A snapshot is a pure function of what the directory holds; the loop reads again only what has
changed. Nothing here writes to the run.
"""

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zo_offload.metrics import smooth
from zo_offload.report import measured, tables
from zo_offload.report.found import ENDED, FINISHED, Run, read_run, read_state
from zo_offload.wording import as_speed, as_time

BARS = "▁▂▃▄▅▆▇█"
SPARKS, LEAST_SPARKS = 40, 8
BESIDE_SPARKS = 24  # columns: names, and the loss itself
RECENT_STEPS = 50  # that a speed is the mean of
LAST_EVALUATIONS = 3
LAST_WARNINGS = 4
MOST_SHARE = 10.0  # times as long as a look takes is the pause: the machine is the run's
FILES = ("run.json", "summary.json", "metrics.csv", "telemetry.jsonl")


def watch(directory: Path, console: Console, once: bool, interval: float) -> Run:
    """Show a run until it is finished, or no process works on it any more.

    Args:
        directory: Of the run.
        console: To write to; where it is no terminal, one snapshot is all.
        once: Whether one snapshot is all.
        interval: Seconds between two looks; Ctrl-C ends them, and what was seen last stays.

    Returns:
        What was seen last.

    Raises:
        ConfigError: The directory holds no run.
    """
    run = read_run(directory)
    if not once and console.is_terminal:
        run = _watched(run, directory, console, interval)
    console.print(snapshot(run, console.width))
    return run


def _watched(run: Run, directory: Path, console: Console, interval: float) -> Run:
    """On a screen of its own: a terminal that is made narrower folds what stands on the other."""
    stamp, took = _stamp(directory), 0.0
    screen = Live(snapshot(run, console.width), console=console, auto_refresh=False, screen=True)
    with suppress(KeyboardInterrupt), screen as live:
        while run.state not in (FINISHED, ENDED):
            time.sleep(max(interval, MOST_SHARE * took))
            began = time.monotonic()
            before, stamp = stamp, _stamp(directory)
            if stamp == before:
                run.state = read_state(directory)
            else:
                run = read_run(directory)
            live.update(snapshot(run, console.width), refresh=True)
            took = time.monotonic() - began
    return run


def snapshot(run: Run, width: int = 80) -> Group:
    """What there is to say of a run now, in so many columns."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in lines(run, max(LEAST_SPARKS, min(SPARKS, width - BESIDE_SPARKS))):
        shown.add_row(name, Text(_plain(value)))
    return Group(Text(_plain(str(run.directory)), style="bold"), shown)


def lines(run: Run, sparks: int = SPARKS) -> list[tuple[str, str]]:
    """Names and values, in order; the curve of losses has so many bars at most."""
    asked = run.steps_asked
    losses = smooth([step.loss for step in run.steps])
    found = [("state", run.state)]
    taken = f"{len(run.steps):,}"
    if asked:
        taken += f" of {asked:,} ({100 * len(run.steps) / asked:.3g} %)"
    found.append(("step", taken))
    if losses and math.isfinite(losses[-1]):
        found.append(("loss", f"{losses[-1]:.4f}  {sparkline(losses, sparks)}"))
    if run.steps:
        found.append(("lr", f"{run.steps[-1].lr:.4g}"))
    found += _pace(run, asked)
    for step, accuracy, loss in run.evaluations[-LAST_EVALUATIONS:]:
        text = f"dev {run.metric} {accuracy:.4f}, dev loss {loss:.4f}"
        found.append((f"after {step:,}", text))
    parts = measured.seconds_by_part(run)
    if together := sum(parts.values()):
        shares = [f"{p} {100 * s / together:.2g} %" for p, s in parts.items() if s > together / 200]
        found.append(("a step is", ", ".join(shares)))
    for step, text, times in tables.warnings(run)[-LAST_WARNINGS:]:
        found.append(("warning", f"{step}: {text}" + (f" ({times} times)" if times > 1 else "")))
    found += [("missing", line) for line in run.missing if not _is_young(run)]
    if run.state == ENDED:
        found.append(("", "the same zo-offload train command continues it"))
    return found


def sparkline(values: Sequence[float], width: int = SPARKS) -> str:
    """Values from the least to the largest, as bars; the last value of each stretch.

    Example:
        >>> sparkline([1, 2, 3, 4, 8]), sparkline([5.0, 5.0])
        ('▁▂▃▄█', '▁▁')
    """
    kept = [value for value in values if math.isfinite(value)]
    number = min(width, len(kept))
    chosen = [kept[(i + 1) * len(kept) // number - 1] for i in range(number)]
    low, high = min(chosen, default=0.0), max(chosen, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in chosen)


def _pace(run: Run, asked: int | None) -> list[tuple[str, str]]:
    recent = list(run.seconds.values())[-RECENT_STEPS:]
    mean = statistics.fmean(recent) if recent else 0.0
    if not 0 < mean < math.inf:
        return []
    found = [("speed", as_speed(1 / mean))]
    left = mean * (asked - len(run.steps)) if asked else 0.0
    if left > 0 and run.state not in (FINISHED, ENDED):
        found.append(("ETA", as_time(round(left)) + ", without evaluations"))
    return found


def _is_young(run: Run) -> bool:
    """Whether files may not be there yet."""
    return not run.steps and run.state not in (FINISHED, ENDED)


def _plain(text: str) -> str:
    """Without what would move the terminal's cursor: files are untrusted."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _stamp(directory: Path) -> list[tuple[int, int] | None]:
    """Changes when a file that is shown does."""
    found: list[tuple[int, int] | None] = []
    for name in FILES:
        try:
            status = (directory / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size))
    return found
