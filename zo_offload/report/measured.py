"""What telemetry comes to: seconds by part, bytes by link, memory by tier. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

from zo_offload.clock import PARTS
from zo_offload.report.found import Run, number
from zo_offload.telemetry import LINKS, TIERS, computing

COMPUTE = "compute"
SHOWN_PARTS = (COMPUTE, *PARTS)

Numbers = dict[str, float]


def numbers(value: Any, names: Sequence[str]) -> Numbers:
    """Of an object in a file, what is there and is a number from 0.

    Example:
        >>> numbers({"bus": 2, "disk": "x", "host": -1}, ["bus", "disk", "host"])
        {'bus': 2.0}
    """
    found = {name: number(value.get(name)) for name in names} if isinstance(value, dict) else {}
    return {name: each for name, each in found.items() if each is not None and each >= 0}


def steps_measured(run: Run) -> int:
    """How many steps telemetry knows."""
    return sum(row["steps"] for row in run.telemetry)


def seconds_by_part(run: Run) -> Numbers:
    """Mean of a step, by part; they add up to the step."""
    total: Numbers = {}
    for row in run.telemetry:
        seconds = numbers(row["seconds"], ("step", *PARTS))
        for part, value in {**seconds, COMPUTE: computing(seconds)}.items():
            total[part] = total.get(part, 0.0) + value
    steps = steps_measured(run)
    return {part: total.get(part, 0.0) / steps for part in SHOWN_PARTS} if steps else {}


def busy_by_part(run: Run) -> Numbers:
    """Mean of a step that the pipeline's worker was busy, overlapped or not."""
    return _mean(run, "busy", PARTS)


def bytes_by_link(run: Run) -> Numbers:
    """Mean of a step."""
    return _mean(run, "bytes", LINKS)


def _mean(run: Run, name: str, keys: Sequence[str]) -> Numbers:
    steps, total = steps_measured(run), {}
    for row in run.telemetry:
        for key, value in numbers(row.get(name), keys).items():
            total[key] = total.get(key, 0.0) + value
    return {key: value / steps for key, value in total.items()} if steps else {}


def planned(run: Run) -> Numbers:
    """Bytes by tier, as the latest process had planned."""
    return numbers(_last(run.begins).get("plan"), TIERS)


def held(run: Run) -> Numbers:
    """Bytes by tier, as last seen; and of the process at its largest."""
    return numbers(_last(run.telemetry).get("held"), (*TIERS, "process"))


def noise(run: Run) -> float | None:
    """Standard deviation of the rounding in ``L+ - L-``, as the latest process measured it."""
    return number(_last(run.telemetry).get("noise"))


def _last(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return rows[-1] if rows else {}
