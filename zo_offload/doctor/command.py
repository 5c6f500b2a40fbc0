"""``zo-offload doctor``: everything that was looked at, as a table or as a line of JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zo_offload.doctor import machine, rates
from zo_offload.doctor.row import Row
from zo_offload.errors import KernelError, StoreError
from zo_offload.reporter import Reporter

DISK_SECONDS = 6.0  # of all paths, writing and reading
OF_A_PLAN = {"host_gbps": "host updates", "pcie_gbps": "bus", "tflops": "products"}


def examine(paths: Sequence[Path], reporter: Reporter | None = None) -> list[Row]:
    """Look at everything, and measure.

    Args:
        paths: Directories where weights, or a run's files, are to lie.
        reporter: Told of what is done.
    """
    reporter = reporter or Reporter()
    with reporter.phase("looking at the machine"):
        rows = [*machine.installed(), *machine.devices(), *machine.limits(), *machine.processor()]
    with reporter.phase("measuring memory"):
        rows += _rates()
    return [*rows, *_disks(paths, reporter), *machine.launchers()]


def plan_options(rows: Sequence[Row]) -> dict[str, float]:
    """What was measured, by the names of the options of ``zo-offload plan``."""
    values = {row.name: row.value for row in rows if row.section == "rates"}
    found = {option: values.get(name) for option, name in OF_A_PLAN.items()}
    disks = [row.value for row in rows if row.section == "disks" and row.value is not None]
    if disks:
        found["nvme_gbps"] = disks[-1]["both_gbps"]  # the last is of all together
    return {name: float(f"{value:.3g}") for name, value in found.items() if value is not None}


def as_table(rows: Sequence[Row]) -> str:
    """For a reader: what was found, then what to do."""
    width = max(len(row.name) for row in rows) + 2
    lines, section = [], None
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append(section)
        lines.append(f"  {row.name:<{width}}{row.text}")
    options = " ".join(
        f"--{name.replace('_', '-')} {value:g}" for name, value in plan_options(rows).items()
    )
    lines += ["", f"for zo-offload plan: {options}"]
    for row in rows:
        if row.mend:
            lines.append(f"{'stops runs' if row.prevents else 'mend'}: {row.name}: {row.mend}")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> str:
    """One line."""
    found: dict[str, Any] = {"ok": not any(row.prevents for row in rows)}
    for row in rows:
        found.setdefault(row.section, {})[row.name] = row.value
    found["plan"] = plan_options(rows)
    found["mends"] = [
        {"name": row.name, "found": row.text, "mend": row.mend, "prevents": row.prevents}
        for row in rows
        if row.mend
    ]
    return json.dumps(found)


def _rates() -> Iterator[Row]:
    try:
        copied, updated = rates.copying(), rates.updating()
    except KernelError:  # said beside the kernels
        return
    yield Row("rates", "host copy", copied, f"{copied:.1f} GB/s, read and written")
    yield Row("rates", "host updates", updated, f"{updated:.1f} GB/s of masters, read and written")
    if torch.cuda.is_available():  # untested: needs CUDA
        bus, products = rates.over_the_bus(), rates.multiplying()
        yield Row("rates", "bus", bus, f"{bus:.1f} GB/s to the device")
        yield Row("rates", "products", products, f"{products:.0f} TFLOP/s, bfloat16")


def _disks(paths: Sequence[Path], reporter: Reporter | None = None) -> Iterator[Row]:
    paths = list({path.resolve(): path for path in paths}.values())  # one named twice is one
    tried = [[path] for path in paths] + ([list(paths)] if len(paths) > 1 else [])
    for folders in (reporter or Reporter()).counted("measuring disks", tried, len(tried)):
        name = ", ".join(map(str, folders))
        try:
            found = rates.disk(folders, DISK_SECONDS / 2 / len(tried))
        except StoreError as error:
            wrong, _, mend = str(error).partition("; ")
            yield Row("disks", name, None, wrong, mend or "name another directory", True)
            continue
        shown = (
            f"{found.read_gbps:.2f} read, {found.write_gbps:.2f} written, "
            f"{found.both_gbps:.2f} in turn, GB/s"
        )
        mend = ""
        if not found.direct:
            shown += ", through the page cache"
            mend = "this file system has no direct I/O: name a local disk (ext4, xfs)"
        yield Row("disks", name, vars(found), shown, mend)
