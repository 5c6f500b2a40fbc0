"""What each rank of a test runs: some steps on a small OPT, then what came of them, as JSON.

python worker.py '{"config": {...}, "steps": 6, "out": "DIR", ...}'
"""

import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from engine.common import opt, tokens

import zo_offload
from zo_offload.loss_noise import LossNoise


class Sentences(torch.utils.data.Dataset):
    """Rows of tokens; row i is a function of i."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in tokens(index, size=1).items()}


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model = opt(seed=int(os.environ.get("RANK", "0")) if job.get("other_weights") else 0)
    engine, _, loader, _ = zo_offload.initialize(
        model=model, config=job["config"], training_data=Sentences()
    )
    engine.loss_noise = LossNoise(0.0, 1.0)  # takes seven steps' time
    if job.get("load"):
        engine.load_checkpoint(job["load"])
    sockets = []
    while engine.global_steps < job["steps"]:
        sockets.append(socket_bytes())
        step(engine, loader, job.get("calls", "train_batch"))
        if job.get("save") and engine.global_steps in job.get("save_at", [job["steps"]]):
            engine.save_checkpoint(job["save"])
    sockets.append(socket_bytes())
    report = {
        "weights": digest(engine),
        "losses": [list(record.losses) for record in engine.stepper.journal.records],
        "bytes_sent": engine.stepper.replica.bytes_sent,
        "sockets": sockets,
        "evaluated": float(engine.eval_batch(iter([tokens(100)] * 4))),
        "link": type(engine.stepper.replica.link).__name__,
    }
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank-{engine.global_rank}.json").write_text(json.dumps(report))
    engine.destroy()


def step(engine: Any, loader: Any, calls: str) -> None:
    """One step, as train_batch or as separate calls."""
    if calls == "train_batch":
        engine.train_batch()
        return
    before = engine.global_steps
    if not hasattr(engine, "batches"):
        engine.__dict__["batches"] = iter(())
    while engine.global_steps == before:
        data = next(engine.batches, None)
        if data is None:
            engine.__dict__["batches"] = iter(loader)
            continue
        engine.backward(engine(**data).loss)
        engine.step()


def digest(engine: Any) -> str:
    total = hashlib.sha256()
    for name, value in engine.stepper.weights.masters():
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()


def socket_bytes() -> int:
    """What the kernel has sent on every TCP socket of this process, its own counts (TCP_INFO)."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        if len(info) >= 208:
            total += int.from_bytes(info[200:208], "little")  # tcpi_bytes_sent
    return total


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
