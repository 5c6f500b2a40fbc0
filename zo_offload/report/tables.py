"""Tables of runs, a column each: rows of words. Text from files is text; the page escapes it."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zo_offload.metrics import smooth
from zo_offload.report import measured
from zo_offload.report.found import Run, number
from zo_offload.telemetry import LINKS, TIERS
from zo_offload.wording import as_bytes, as_speed, as_time

NOTHING = "-"
MOST_TEXT = 300


class Row(NamedTuple):
    """A name, and what each run has."""

    name: str
    cells: list[str]


def results(runs: Sequence[Run]) -> list[Row]:
    """What came out."""
    metric = " or ".join(dict.fromkeys(run.metric for run in runs))
    rows = {
        "state": [run.state for run in runs],
        "steps": [_steps(run) for run in runs],
        f"dev {metric}": [_ends(run, 1) for run in runs],
        "best": [_best(run) for run in runs],
        "dev loss": [_ends(run, 2) for run in runs],
        "loss, smoothed": [_loss(run) for run in runs],
        "speed": [_speed(run) for run in runs],
        "time in steps": [_time(run) for run in runs],
        "noise over signal": [_of_summary(run, "noise_over_signal") for run in runs],
        "probes with equal losses": [_equal(run) for run in runs],
        "skipped steps": [str(sum(step.skipped for step in run.steps)) for run in runs],
        "roll backs": [str(run.rollbacks) for run in runs],
        "ranks": [_begin(run, "ranks") for run in runs],
        "device": [_begin(run, "device") for run in runs],
        "largest process": [_bytes(measured.held(run).get("process")) for run in runs],
    }
    return _worth(rows)


def parts(runs: Sequence[Run]) -> list[Row]:
    """Seconds of a step by part: what the step took, and in brackets what the worker was busy."""
    steps = [measured.seconds_by_part(run) for run in runs]
    busy = [measured.busy_by_part(run) for run in runs]
    rows = {
        part: [_seconds(s.get(part), b.get(part)) for s, b in zip(steps, busy, strict=True)]
        for part in measured.SHOWN_PARTS
    }
    return _worth(rows | {"together": [_seconds(sum(s.values()) if s else None) for s in steps]})


def memory(runs: Sequence[Run]) -> list[Row]:
    """Bytes by tier."""
    rows = {}
    for tier in TIERS:
        for name, of in (("planned", measured.planned), ("held", measured.held)):
            rows[f"{tier}, {name}"] = [_bytes(of(run).get(tier)) for run in runs]
    purposes = [run.begins[-1].get("purposes") if run.begins else None for run in runs]
    names = ("slots", "scratch", "ambient", "ambient_copies", "resident", "overlays", "factors",
             "unit_copies")  # fmt: skip
    for name in names:
        found = [measured.numbers(each, names).get(name) for each in purposes]
        rows[f"of the device's: {name.replace('_', ' ')}"] = [_bytes(each) for each in found]
    return _worth(rows)


def links(runs: Sequence[Run]) -> list[Row]:
    """Bytes of a step by link, and the rate over the whole step."""
    moved = [measured.bytes_by_link(run) for run in runs]
    took = [sum(measured.seconds_by_part(run).values()) for run in runs]
    return _worth({
        link: [_moved(m.get(link), t) for m, t in zip(moved, took, strict=True)] for link in LINKS
    })  # fmt: skip


def settings(runs: Sequence[Run]) -> list[Row]:
    """What was asked for, by its path."""
    asked = [flat(run.asked) for run in runs]
    names = dict.fromkeys(name for each in asked for name in each)
    return [Row(name, [each.get(name, NOTHING) for each in asked]) for name in names]


def differing(rows: Sequence[Row]) -> list[Row]:
    """Those in which runs differ."""
    return [row for row in rows if len(set(row.cells)) > 1]


def flat(value: Any, path: str = "") -> dict[str, str]:
    """Values of nested objects by path.

    Example:
        >>> flat({"model": "m", "config": {"seed": 1, "steps": [2, 3]}})
        {'model': 'm', 'config.seed': '1', 'config.steps': '[2, 3]'}
    """
    if isinstance(value, Mapping) and value and path.count(".") < 8:
        found: dict[str, str] = {}
        for key, each in value.items():
            found |= flat(each, f"{path}.{key}" if path else str(key))
        return found
    text = value if isinstance(value, str) else json.dumps(value)
    return {path: text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."}


def warnings(run: Run) -> list[tuple[str, str, int]]:
    """``(step, text, times)``: what was said, each text once; and what the summary says of eps."""
    found: dict[str, tuple[str, str, int]] = {}
    for step, text in run.warnings:
        _, bare = _without_step(text)
        first, _, times = found.get(bare, (f"step {step}", text, 0))
        found[bare] = first, bare, times + 1
    told = run.summary.get("eps_warning")
    if isinstance(told, str) and told not in found:
        found[told] = "eps", told[:2000], 1
    skipped = [step.step for step in run.steps if step.skipped]
    if skipped:
        text = "recorded and not applied: losses were not finite or far too high"
        found["skipped"] = f"step {skipped[0]}", text, len(skipped)
    if run.rollbacks:
        text = "the run went back to a better step: a smaller learning rate is worth a try"
        found["rolled back"] = "journal", text, run.rollbacks
    return list(found.values())


def _without_step(text: str) -> tuple[str, str]:
    """A text that begins with its step, in two."""
    head, colon, tail = text.partition(": ")
    is_step = head.startswith("step ") and head[5:].isdigit()
    return (head, tail) if colon and is_step else ("", text)


def _worth(rows: Mapping[str, list[str]]) -> list[Row]:
    """Rows in which any run has something."""
    return [Row(n, cells) for n, cells in rows.items() if any(cell != NOTHING for cell in cells)]


def _steps(run: Run) -> str:
    asked = run.steps_asked
    return f"{len(run.steps):,}" + (f" of {asked:,}" if asked is not None else "")


def _ends(run: Run, index: int) -> str:
    found = [e for e in run.evaluations if math.isfinite(e[index])]
    if not found:
        return NOTHING
    return f"{found[0][index]:.4f} → {found[-1][index]:.4f}"


def _best(run: Run) -> str:
    found = [e for e in run.evaluations if math.isfinite(e[1])]
    best = max(found, key=lambda e: e[1], default=None)
    return f"{best[1]:.4f} after {best[0]:,} steps" if best else NOTHING


def _loss(run: Run) -> str:
    found = smooth([step.loss for step in run.steps])
    return f"{found[-1]:.4f}" if found and math.isfinite(found[-1]) else NOTHING


def _speed(run: Run) -> str:
    found = [s for s in run.seconds.values() if s > 0]
    return as_speed(1 / statistics.median(found)) + " (median)" if found else NOTHING


def _time(run: Run) -> str:
    total = sum(run.seconds.values())
    if not math.isfinite(total) or not run.seconds:
        return NOTHING
    missing = len(run.steps) - len(run.seconds)
    return as_time(round(total)) + (f", {missing:,} steps not timed" if missing > 0 else "")


def _of_summary(run: Run, name: str) -> str:
    found = number(run.summary.get(name))
    return f"{found:.2g}" if found is not None else NOTHING


def _equal(run: Run) -> str:
    tried = [grad for step in run.steps if not step.skipped for grad in step.grads]
    return f"{100 * sum(not grad for grad in tried) / len(tried):.3g} %" if tried else NOTHING


def _begin(run: Run, name: str) -> str:
    return str(run.begins[-1].get(name, NOTHING))[:80] if run.begins else NOTHING


def _bytes(count: float | None) -> str:
    return as_bytes(round(count)) if count else NOTHING


def _seconds(step: float | None, busy: float | None = None) -> str:
    if step is None:
        return NOTHING
    return f"{step:.4g}" + (f" (busy {busy:.4g})" if busy else "")


def _moved(count: float | None, seconds: float) -> str:
    if not count:
        return NOTHING
    return as_bytes(round(count)) + (f", {as_bytes(round(count / seconds))}/s" if seconds else "")
