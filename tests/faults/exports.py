"""What a report and an export read of a directory, for the table of parsers: one file, changed."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from zo_offload.export.card import card
from zo_offload.export.command import refuse_converted
from zo_offload.export.delta import INDEX, apply_delta, read_delta, write_delta
from zo_offload.export.source import find_source
from zo_offload.journal import Journal, Probe, Record
from zo_offload.report.charts import charts
from zo_offload.report.found import read_run
from zo_offload.report.page import page
from zo_offload.report.watch import snapshot

Read = Callable[[bytes, Path], Any]

RUN = {
    "model": "m", "steps": 3, "task": None, "train": "t.tsv", "template": "{a} It was",
    "labels": " a, b", "eval_every": 2, "first_order": None,
    "config": {
        "train_batch_size": 4, "optimizer": {"type": "ZO", "params": {"lr": 1e-2}},
        "zeroth_order": {"seed": 1, "trainable": {"mode": "full"}},
    },
}  # fmt: skip
FOUND = {
    "journal": "j", "steps": 3, "accuracy_before": 0.5, "accuracy_after": 0.6, "loss_before": 1.0,
    "loss_after": 0.7, "model_parameters": 3, "noise_over_signal": 1e-3, "metric": "f1",
    "equal_share": 0.1, "eps_warning": "eps 1e-12 is dead", "skipped_steps": 0,
}  # fmt: skip
METRICS = (
    b"step,loss,lr,projected_grad,seconds,accuracy,dev_loss\n"
    b"0,0.65,1e-06,0.5,0.1,0.5,0.69\n1,0.65,1e-06,0.5,0.1,,\n3,,,,,0.6,0.5\n"
)
TOLD = [
    {"kind": "begin", "step": 0, "device": "cpu", "ranks": 1, "units": {"host": 3},
     "plan": {"device": 1000, "host": 900, "disk": 0}, "purposes": {"slots": 700, "ambient": 9}},
    {"kind": "steps", "first": 0, "steps": 3, "seconds": {"step": 0.4, "bus": 0.1, "waiting": 0.01},
     "busy": {"bus": 0.2}, "bytes": {"bus": 2000, "network": 0}, "noise": 2e-5,
     "held": {"device": 1000, "host": 900, "process": 10**8}},
    {"kind": "warning", "step": 2, "text": "step 2: hot"},
]  # fmt: skip
TELEMETRY = b"".join(json.dumps(row).encode() + b"\n" for row in TOLD)
FILES: dict[str, bytes] = {
    "run.json": json.dumps(RUN).encode(),
    "summary.json": json.dumps(FOUND).encode(),
    "metrics.csv": METRICS,
    "telemetry.jsonl": TELEMETRY,
}


@cache
def journal() -> bytes:
    """Of two steps and a roll back."""
    made = Journal.memory({"seed": 7, "estimator": "spsa", "forward": ["torch.float32"]})
    for step in range(2):
        made.append(Record(step, (Probe(0, 0.5 + step, 1e-6),), (0.7, 0.6), eps=1e-3, lr=1e-6))
    return made.content


def of_a_run(name: str, read: Callable[[Path], Any]) -> Read:
    """Reads a run's directory, of which one file is given."""

    def write_and_read(data: bytes, folder: Path) -> Any:
        (folder / "journal").mkdir()
        (folder / "journal" / "run.journal").write_bytes(journal())
        for other, content in FILES.items():
            (folder / other).write_bytes(data if other == name else content)
        if name == "journal":
            (folder / "journal" / "run.journal").write_bytes(data)
        return read(folder)

    return write_and_read


def shown(folder: Path) -> None:
    """All that a page and a terminal show, the strokes of its charts going nowhere."""
    run = read_run(folder)
    page([run], [])
    snapshot(run)
    axes = MagicMock()
    axes.get_ylim.return_value = (1e-3, 1.0)
    for chart in charts([run]):
        chart.draw(axes, [run])


def carded(folder: Path) -> None:
    """As of a finished run, and of one that was stopped."""
    card(find_source(folder), "hf", {}).encode()
    (folder / "model").mkdir()
    card(find_source(folder), "hf", {}).encode()


# -- deltas --


def model(seed: int) -> nn.Module:
    """A dense and a sparse difference, and none."""
    dense, sparse = nn.Linear(4, 3), nn.Linear(3, 40)
    made = nn.Sequential(dense, sparse, nn.BatchNorm1d(2))
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
        dense.weight += seed
        sparse.weight[0, 0] += seed
    return made


@cache
def delta() -> dict[str, bytes]:
    """The files of one."""
    with tempfile.TemporaryDirectory() as folder:
        write_delta(Path(folder), model(0), model(1), "base", 10**6)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def of_a_delta(name: str) -> Read:
    def write_and_read(data: bytes, folder: Path) -> None:
        for other, content in delta().items():
            (folder / other).write_bytes(data if other == name else content)
        found = read_delta(folder)
        refuse_converted(found.base)
        apply_delta(folder, found, model(0), folder)

    return write_and_read


def indices() -> list[bytes]:
    """As it is, and with dtypes that torch has and files do not."""
    held = json.loads(delta()[INDEX])
    made = [held]
    for dtype in ("complex128", "qint8", "float16", "bits8", "int4", "quint4x2"):
        tensors = {name: {**entry, "dtype": dtype} for name, entry in held["tensors"].items()}
        made.append({**held, "tensors": tensors})
    return [json.dumps(each).encode() for each in made]
