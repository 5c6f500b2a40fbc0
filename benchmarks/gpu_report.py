"""A GPU benchmark's figures as tables, a picture, and held against what is aimed at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_results import Results, same
from gpu_sessions import BARE, MEMORY, MEZO, ZO2

HEADS = (
    "contestant", "s a step", "spread", "tokens/s", "bare's speed", "device GB", "planned",
    "host GB", "bus GB", "GB/s", "of bus", "slowest bound", "over it",
)  # fmt: skip
PLANNED_AT = (("1.3b", 1.2e9), ("6.7b", 2.2e9), ("30b", 2.8e9))
"""Most bytes of device memory at 1 x 2048, bfloat16 over the bus."""


def show(results: Results) -> None:
    """Tables, by shape and batch."""
    machine, rates = results.last("machine"), results.last("rates")
    print(f"{machine.get('device')}; {machine.get('processor')}; {machine.get('versions')}")
    print(", ".join(f"{name} {_rate(value)}" for name, value in rates.items()))
    for title, rows in groups(results):
        print(f"\n{title}\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
        for row in rows:
            print(f"| {' | '.join(_cells(row))} |")
    for found in results.of("whole"):
        peak = _giga(found["device_peak_bytes"])
        print(
            f"\none whole step of {found['shape']}: {found['seconds']:.2f} s, built in "
            f"{found['build_seconds']:.0f} s; device {peak} GB, under 18: {found['under_18_gb']}; "
            f"host {found['host_peak_bytes']['system'] / 1e9:.1f} GB"
        )
    for aim in aims(results):
        met = "met" if aim["met"] else "not met"
        print(f"aimed at: {aim['what']}: {aim['aim']:g}, found {aim['found']:.3g}: {met}")


def groups(results: Results) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows by shape and batch; of a contestant in several sessions the first."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in results.of("row"):
        rows, length = row["batch"]
        key = row["title"], f"{rows} x {length}"
        found.setdefault(key, {}).setdefault(row["contestant"], row)
    for (title, batch), rows in found.items():
        yield f"{title}, {batch}", list(rows.values())


def aims(results: Results) -> Iterator[dict[str, Any]]:
    """What is aimed at and was measured: name, aim, figure, whether it is met."""
    for row in results.of("row"):
        name = f"{row['shape']}, {' x '.join(map(str, row['batch']))}, {row['contestant']}"
        for what, aim, found, most in _aims_of(row, results):
            if found is not None:
                met = found <= aim if most else found >= aim
                yield {"what": f"{name}: {what}", "aim": aim, "found": found, "met": met}
    for found in results.of("whole"):
        peak = found["device_peak_bytes"]
        if peak is not None:
            what = f"{found['shape']}: bytes of device memory in a whole step"
            yield {"what": what, "aim": 18e9, "found": peak, "met": peak < 18e9}


def _aims_of(
    row: dict[str, Any], results: Results
) -> Iterator[tuple[str, float, float | None, bool]]:
    """Name, aim, figure, and whether it should be at most or at least that."""
    short = row["batch"] == [16, 64]
    if row["contestant"] == MEMORY and row["shape"] == "13b":
        yield "over two bare forwards", 1.25 if short else 1.10, row["over_bare"], True
        if short:
            mezo = results.seconds(row, MEZO)
            yield "times faster than MeZO", 6.0, mezo and mezo / row["seconds"], False
    if "bounds" not in row:
        return
    yield "over the slowest bound", 1.05, row["over_bound"], True
    if row["bound_by"] == "bus":
        yield "of a bare pinned copy", 0.9, row["bus_share"], False
    if short:
        zo2 = results.seconds(row, ZO2)
        yield "times faster than ZO2", 2.0, zo2 and zo2 / row["seconds"], False
    most = dict(PLANNED_AT).get(row["shape"])
    small_head = row["contestant"].startswith("ours, identity, lag 0, head")
    if most and row["batch"] == [1, 2048] and small_head:
        yield "bytes of device memory", most, row["device_peak_bytes"], True


def draw(results: Results, path: Path) -> None:
    """Seconds of a step against its bounds, a panel for each shape and batch."""
    from matplotlib.figure import Figure

    found = list(groups(results))
    if not found:
        return
    heights = [len(rows) + 2 for _, rows in found]
    figure = Figure(figsize=(11, 0.34 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, found, strict=True):
        _draw(axes, title, rows, results)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, title: str, rows: list[dict[str, Any]], results: Results) -> None:
    names = [row["contestant"] for row in rows]
    colours = ["tab:gray" if "ours" not in name else "tab:blue" for name in names]
    axes.barh(names, [row["seconds"] for row in rows], color=colours, height=0.6)
    for place, row in enumerate(rows):
        axes.annotate(f" {row['seconds']:.3g}", (row["seconds"], place), va="center", fontsize=8)
        slowest = max(filter(None, row.get("bounds", {}).values()), default=None)
        if slowest is not None:
            axes.plot([slowest] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    bare = next((row["seconds"] for row in rows if same(row, rows[0], BARE)), None)
    if bare is not None:
        axes.axvline(bare, color="tab:gray", linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    marks = "across a bar: its slowest bound; dotted: two bare forwards"
    axes.set_title(f"{title}: seconds a step; {marks}", fontsize=9)
    axes.tick_params(labelsize=8)


def _cells(row: dict[str, Any]) -> list[str]:
    host, plan = row.get("host_peak_bytes", {}), row.get("planned_bytes", {})
    return [
        row["contestant"] + (f" ({row['master']})" if "master" in row else ""),
        f"{row['seconds']:.4g}",
        f"{row['spread']:.0%}",
        f"{row['tokens_per_second']:,.0f}",
        _share(row["bare_fraction"]),
        _giga(row["device_peak_bytes"]),
        _giga(plan.get("device")),
        _giga(host.get("system")),
        _giga(row.get("bus_bytes")),
        f"{row['bus_gbps']:.1f}" if row.get("bus_gbps") else "",
        _share(row.get("bus_share")),
        row.get("bound_by") or "",
        f"{row['over_bound']:.2f}" if row.get("over_bound") else "",
    ]


def _giga(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _rate(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_rate(each)}" for name, each in value.items()) + ")"
    return "not measured" if value is None else f"{value:.1f}"
