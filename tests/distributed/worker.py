"""What each rank of a test runs: some steps on a small OPT, then what came of them, as JSON.

python worker.py '{"config": {...}, "steps": 6, "out": "DIR", ...}'

A job may also name: ``model`` (``opt``, or ``net``, with which a rank starts in half the time,
since it needs no transformers), ``calls`` (``train_batch`` or ``forward``), ``save`` (a
directory: a tag a step, from each of which a new engine then goes on to the end), ``odd_rank``
(which rank has other weights), ``odd_config`` (``[rank, config]``: its JSON), ``die``
(``[rank, step]``: a SIGKILL to itself), ``flip`` (``[rank, step]``: a bit of its masters, below
those that forwards see).
"""

import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm import comm
from engine.common import batch, net, opt, tokens

import zo_offload
from zo_offload.loss_noise import LossNoise

SENT, RECEIVED = slice(200, 208), slice(128, 136)  # of TCP_INFO, Linux 4.19 and later


MODELS = {"opt": (opt, tokens), "net": (net, batch)}


class Rows(torch.utils.data.Dataset):
    """A model's; row i is a function of i."""

    def __init__(self, drawn: Callable[..., dict[str, torch.Tensor]]) -> None:
        self._drawn = drawn

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self._drawn(index, size=1).items()}


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    engine, loader = start(job)
    taken_up, sockets = engine.global_steps, [socket_bytes()]
    received = socket_bytes(RECEIVED)
    for step in steps(engine, loader, job):
        sockets.append(socket_bytes())
        if "save" in job and step < job["steps"]:
            engine.save_checkpoint(job["save"])
        if job.get("flip") == [engine.global_rank, step]:
            flip(engine)
        if job.get("die") == [engine.global_rank, step]:
            os.kill(os.getpid(), signal.SIGKILL)
    replica = engine.stepper.replica
    _, drawn = MODELS[job.get("model", "opt")]
    looked_at = (drawn(100 + i) for i in range(engine.gradient_accumulation_steps()))
    report = {
        "weights": digest(engine),
        "losses": [list(record.losses) for record in engine.stepper.journal.records],
        "step_bytes": replica.step_bytes,
        "taken_up": taken_up,
        "received_before": received,
        "socket_bytes": [after - before for before, after in pairwise(sockets)],
        "evaluated": float(engine.eval_batch(looked_at)),
        "link": type(replica.link).__name__,
        "comms": {
            name: {int(size): count for size, (count, *_) in sizes.items()}
            for name, sizes in comm.comms_logger.comms_dict.items()
        },
        "resumed": resume_each(job) if "save" in job else [],
    }
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank-{engine.global_rank}.json").write_text(json.dumps(report))


def start(job: dict[str, Any]) -> tuple[Any, Any]:
    rank = int(os.environ.get("RANK", "0"))
    model, drawn = MODELS[job.get("model", "opt")]
    odd, config = job.get("odd_config", [None, None])
    engine, _, loader, _ = zo_offload.initialize(
        model=model(seed=int(job.get("odd_rank") == rank)),
        config=config if odd == rank else job["config"],
        training_data=Rows(drawn),
    )
    engine.loss_noise = LossNoise(0.0, 1.0)  # its measurement takes seven steps' time
    return engine, loader


def steps(engine: Any, loader: Any, job: dict[str, Any]) -> Iterator[int]:
    """Train to the job's end; yields the number of steps taken after each."""
    batches = (batch for _ in range(1000) for batch in loader)
    while engine.global_steps < job["steps"]:
        if job.get("calls") == "forward":
            for _ in range(engine.gradient_accumulation_steps()):
                engine.backward(engine(**next(batches)).loss)
                engine.step()
        else:
            engine.train_batch()
        yield engine.global_steps


def flip(engine: Any) -> None:
    weights = engine.stepper.weights
    with weights.lent(weights.map.units[1]) as lease:
        lease.rest[100] ^= 4


def resume_each(job: dict[str, Any]) -> list[str]:
    """Digests at the end of runs that go on from each tag, in engines on the base weights."""
    found = []
    for step in range(1, job["steps"]):
        engine, loader = start(job)
        engine.load_checkpoint(job["save"], f"global_step{step}")
        assert engine.global_steps == step
        for _ in steps(engine, loader, job):
            pass
        found.append(digest(engine))
        engine.destroy()
    return found


def digest(engine: Any) -> str:
    total = hashlib.sha256()
    for name, value in engine.stepper.weights.masters():
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()


def socket_bytes(which: slice = SENT) -> int:
    """What the kernel has moved on all TCP sockets of this process, by its own count."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        total += int.from_bytes(info[which], "little")
    return total


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
