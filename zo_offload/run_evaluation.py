"""The dev set shared out among the ranks, with the same numbers on every one."""

import struct
from itertools import islice
from typing import Any

import numpy as np
import torch

from zo_offload.reporter import Reporter
from zo_offload.tasks import Encoded, Evaluation, evaluation_batches, score, summarize

PACKED = struct.Struct("<ddQ")  # accuracy, loss, number of examples


def evaluate_on_ranks(engine: Any, examples: list[Encoded], reporter: Reporter) -> Evaluation:
    """Every rank a share of the batches; the same numbers on every rank, whatever their number."""
    replica = engine.stepper.replica
    batch_size = 2 * engine.train_micro_batch_size_per_gpu()  # as many rows as a step's two lanes
    count = -(-len(examples) // batch_size)
    mine = islice(evaluation_batches(examples, batch_size), replica.rank, None, replica.world_size)
    share = -(-max(count - replica.rank, 0) // replica.world_size)
    scores = score(engine.stepper.forward, reporter.counted("evaluating", mine, share))
    packed = b"".join(each.numpy().tobytes() for each in scores)
    everyone = replica.gather(packed)

    def merged() -> bytes:
        sizes = [min(batch_size, len(examples) - i * batch_size) for i in range(count)]
        found = summarize(_in_order(everyone, sizes))
        return PACKED.pack(found.accuracy, found.loss, found.num_examples)

    return Evaluation(*PACKED.unpack(replica.share(merged)))


def _in_order(everyone: list[bytes], sizes: list[int]) -> list[torch.Tensor]:
    """Scores batch by batch, from every rank's own; rank r of W has batches r, r + W, ..."""
    parts = []
    for rank, data in enumerate(everyone):
        scores = torch.from_numpy(np.frombuffer(data, np.float64).copy()).view(-1, 2)
        parts.append(scores.split(sizes[rank :: len(everyone)]))
    return [parts[i % len(everyone)][i // len(everyone)] for i in range(len(sizes))]
