"""Starts real ranks: by the deepspeed launcher, torchrun, mpirun, or as bare forked processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import TESTS, Forked

WORKER = Path(__file__).with_name("worker.py")
SECONDS = 240
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """Of a child; without what an engine in this process has set for itself."""
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    ours = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**ours, "PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": "1", **more}


def command(launcher: str, ranks: int, program: list[str]) -> list[str]:
    """How a launcher starts ``ranks`` of a Python program."""
    beside = Path(sys.executable).parent
    port = str(free_port())
    if launcher == "deepspeed":
        flags = ["--num_accelerators", str(ranks), "--master_port", port]
        return [str(beside / "deepspeed"), *flags, *program]
    if launcher == "torchrun":
        flags = ["--nproc_per_node", str(ranks), "--master_port", port]
        return [str(beside / "torchrun"), *flags, *program]
    assert launcher == "mpirun"
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is missing (apt-get install openmpi-bin)")
    flags = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    return ["mpirun", *flags, sys.executable, *program]


def run(launcher: str, ranks: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank reported."""
    program = [str(WORKER), json.dumps(job)]
    if launcher == "none":
        done = wait(start(ranks, job))
    else:
        done = subprocess.run(
            command(launcher, ranks, program), env=environment(), timeout=SECONDS,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        done = [(done.returncode, done.stdout + done.stderr)]
    assert all(code == 0 for code, _ in done), "\n".join(text for _, text in done)
    return reports_of(job, ranks)


def reports_of(job: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """What the ranks of a job have left, by rank."""
    return [json.loads((Path(job["out"]) / f"rank-{r}.json").read_text()) for r in range(ranks)]


def start(ranks: int, job: dict[str, Any]) -> list[Forked]:
    """Of a job."""
    return forked("distributed.worker:main", ranks, job, out=Path(job["out"]))


def forked(function: str, ranks: int, *given: Any, out: Path) -> list[Forked]:
    """Bare processes that know their rank from the environment, as a cluster's own starter does.

    One alone is told nothing. What each prints goes to a file in ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    meeting = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    variables = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [
        Forked(
            function, *given, out=out / f"rank-{rank}.log",
            variables=environment(**(variables[rank] if ranks > 1 else {})),
        )
        for rank in range(ranks)
    ]  # fmt: skip


def wait(processes: list[Forked]) -> list[tuple[int | None, str]]:
    """Exit status and output of each; all are ended where one does not end in time."""
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    return [(process.wait(), process.stdout) for process in processes]
