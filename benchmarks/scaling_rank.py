"""A rank of ``scaling.py``: trains, exchanges, and says what that took.

The launcher's variables say which rank it is (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

import ctypes
import gc
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers.models.opt.modeling_opt  # noqa: F401  # code, which is no part of a model's memory
from distributed.worker import socket_bytes
from programs import serve

from zo_offload import process_group
from zo_offload.config import ZOConfig
from zo_offload.integrations.hf import load_causal_lm
from zo_offload.replica import Booked
from zo_offload.step import Stepper
from zo_offload.window import Means, Window

LR = 1e-7
HEADER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")  # of a mapping in smaps


class Rank:
    """What it can be asked."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        process_group.init_distributed()
        self.replica = process_group.replica()
        self._stepper: Stepper | None = None
        self._step = 0
        losses = [float(np.float32(value)) for value in (6.9, 7.1)]  # as a model's are: fp32
        self._booked = Booked.of(["+", "-"], [[(loss, 1.0) for loss in losses]])
        self._scalars = torch.tensor(losses, dtype=torch.float64)
        self._gathered = [torch.empty_like(self._scalars) for _ in range(self.replica.world_size)]

    @property
    def stepper(self) -> Stepper:
        assert self._stepper is not None
        return self._stepper

    def prepare(self, model: str, block: dict[str, Any], rows: int, length: int) -> dict[str, int]:
        """Load a model from its directory, and make a batch of this rank's own."""
        self.forget()
        loaded = load_causal_lm(model)
        config = ZOConfig.model_validate(block)
        self._stepper = stepper = Stepper(loaded, config, replica=self.replica)
        generator = torch.Generator().manual_seed(stepper.division.data_rank)
        size = (rows, length)
        tokens = torch.randint(5, loaded.config.vocab_size, size, generator=generator)
        self._batch = {"input_ids": tokens, "labels": tokens}
        return {"parameters": stepper.weights.map.num_parameters}

    def forget(self) -> None:
        """Let the model go."""
        if self._stepper is not None:
            self._stepper.close()
            self._stepper = None
            gc.collect()

    def steps(self, count: int) -> dict[str, float]:
        """Whole steps: seconds of one, processor seconds of one, and all bytes on TCP sockets."""
        sent, began, used = socket_bytes(), time.perf_counter(), time.process_time()
        for _ in range(count):
            self.stepper.train_step([self._batch], lr=LR)
        seconds, used = time.perf_counter() - began, time.process_time() - used
        return {
            "seconds": seconds / count,
            "processor": used / count,
            "bytes": (socket_bytes() - sent) / count,
            "lanes": len(self.stepper.my_draws()),
        }

    def apart(self, count: int) -> dict[str, list[float]]:
        """Seconds of forwards and of the exchange, which all ranks begin together.

        gloo's turn comes right before or right behind ours, in turn.
        """
        found: dict[str, list[float]] = {"forwards": [], "ours": [], "all_reduce": []}
        stepper = self.stepper
        for number in range(count):
            began = time.perf_counter()
            window = stepper.new_window(1)
            window.book_whole(stepper.measure_mine([self._batch]))
            found["forwards"].append(time.perf_counter() - began)
            if number % 2:
                found["all_reduce"].append(self._together(self._all_reduce))
            kept: list[Means] = []
            exchange = partial(_keep, kept, stepper, window)
            found["ours"].append(self._together(exchange))
            if not number % 2:
                found["all_reduce"].append(self._together(self._all_reduce))
            stepper.descend(kept[0], LR)
        return found

    def exchanges(self, how: str, count: int) -> dict[str, float]:
        """Back to back: seconds of one, processor seconds of one, and its bytes on TCP sockets."""
        run = {"ours": self._mean, "all_reduce": self._all_reduce, "all_gather": self._all_gather}[
            how
        ]
        self.replica.wait_for_all()
        sent, began, used = socket_bytes(), time.perf_counter(), time.process_time()
        for _ in range(count):
            run()
        seconds, used = time.perf_counter() - began, time.process_time() - used
        sent = socket_bytes() - sent
        return {"seconds": seconds / count, "processor": used / count, "bytes": sent / count}

    def memory(self, trimmed: bool) -> dict[str, int]:
        """Proportional bytes of this process by what they are, and weights that count as device's.

        A page that four processes map counts a quarter in each, so sums over ranks are the node's.

        Args:
            trimmed: Give back first what has been freed and malloc still holds.
        """
        if trimmed:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        kinds: Counter[str] = Counter()
        kind = ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if HEADER.match(line):
                kind = kind_of(line)
            elif line.startswith("Pss:"):
                kinds[kind] += int(line.split()[1]) * 1024
        held = self._stepper.weights.arena.held_bytes if self._stepper is not None else 0
        return {**kinds, "device": held}

    def _together(self, run: Callable[[], object]) -> float:
        self.replica.wait_for_all()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def _mean(self) -> None:
        self.replica.mean(self._booked, self._step)
        self._step += 1

    def _all_reduce(self) -> None:
        dist.all_reduce(self._scalars)
        self._scalars /= self.replica.world_size

    def _all_gather(self) -> None:
        dist.all_gather(self._gathered, self._scalars)


def _keep(kept: list[Means], stepper: Stepper, window: Window) -> None:
    kept.append(stepper.means(window))


def kind_of(line: str) -> str:
    """What a mapping is, from its first line in smaps."""
    name = " ".join(line.split()[5:])
    if "memfd:zo_offload" in name:
        return "shared"
    if name.endswith(".safetensors"):
        return "checkpoint"
    return "private" if name in ("", "[heap]") or name.startswith("[anon") else "programs"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rank = Rank()
    asked = (rank.prepare, rank.forget, rank.steps, rank.apart, rank.exchanges, rank.memory)
    serve(sys.argv[-1], {each.__name__: each for each in asked})
