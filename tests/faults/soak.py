"""Thousands of steps of a tiny model: as much memory, as many files and threads as at first."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine.common import batch, config, net
from forked import Forked

import zo_offload
from zo_offload.loss_noise import LossNoise

TIERS = ("host", "nvme")
WARM = 0.1  # of the steps, before which nothing is compared
GROWTH_BYTES = 8 << 20  # of an allocator that is still finding its size
LATE_THREADS = 8  # of the pool that asks the disk: each begins when all others are busy
SECONDS = 3600


@dataclass
class Soaked:
    """What was found.

    Attributes:
        steps: That were taken.
        grown_bytes: Resident, since it was warm, without the journal's own records.
        files: Open when it was warm, and at the end.
        threads: Likewise.
        faults: In words, whatever had grown.
    """

    steps: int = 0
    grown_bytes: int = 0
    files: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)
    faults: list[str] = field(default_factory=list)


def in_a_child(tier: str, steps: int, leak: bool = False) -> Soaked:
    """Soak in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        child = Forked(
            "faults.soak:program", tier, steps, folder, leak, out=out, errors=errors,
            variables={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        code = child.wait(SECONDS)
        if code != 0:
            child.kill()
            return Soaked(faults=[f"ended with {code}: {errors.read_text()}"])
        return Soaked(**json.loads(child.stdout.splitlines()[-1]))


def program(tier: str, steps: int, folder: str, leak: bool = False) -> None:
    print(json.dumps(asdict(soak(tier, steps, Path(folder), leak))))


def soak(tier: str, steps: int, folder: Path, leak: bool = False) -> Soaked:
    """Train and look: when it is warm, and at the end."""
    torch.set_num_threads(1)
    on_disk = {"device": "nvme", "nvme_path": str(folder / "disk")}
    block = {
        "offload_param": on_disk if tier == "nvme" else {"device": "cpu"},
        "journal": {"path": str(folder / "run.journal"), "snapshot_interval": max(1, steps // 50)},
    }
    engine, *_ = zo_offload.initialize(model=net(), config=config(zeroth_order=block))
    engine.loss_noise = LossNoise(0.0, 1.0)
    kept: list[Any] = []
    first = None
    while engine.global_steps < steps:
        engine.train_batch(iter([batch(engine.global_steps % 64)]))
        if leak:  # to see that it would be seen
            kept.append((os.open(folder, os.O_RDONLY), torch.ones(1 << 16)))
        if engine.global_steps == int(WARM * steps):
            first = _now(engine)
    assert first is not None
    last = _now(engine)
    engine.destroy()
    return _compared(engine.global_steps, first, last)


def _now(engine: Any) -> tuple[int, int, int]:
    """Resident bytes beside the records, open files, threads."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    records = engine.stepper.journal.records.num_bytes
    return resident - records, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _compared(steps: int, first: tuple[int, int, int], last: tuple[int, int, int]) -> Soaked:
    grown, files, threads = last[0] - first[0], (first[1], last[1]), (first[2], last[2])
    faults = [f"{grown:,} bytes more"] if grown > GROWTH_BYTES else []
    faults += [f"{last[1] - first[1]} open files more"] if files[1] > files[0] else []
    faults += [f"{last[2] - first[2]} threads more"] if last[2] - first[2] > LATE_THREADS else []
    return Soaked(steps, grown, files, threads, faults)
