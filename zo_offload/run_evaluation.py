"""The dev set shared out among the ranks, with the same numbers on every one."""

import json
from dataclasses import asdict, astuple
from typing import Any

import torch

from zo_offload.reporter import Reporter
from zo_offload.run_task import Task
from zo_offload.tasks import Evaluation, Verdict, evaluation_groups, sum_up


def evaluate_on_ranks(engine: Any, task: Task, reporter: Reporter) -> Evaluation:
    """Every rank a share of the batches; the same numbers on every rank, whatever their number."""
    stepper, examples = engine.stepper, task.dev
    rank, num_ranks = stepper.replica.rank, stepper.replica.world_size
    rows = 2 * engine.train_micro_batch_size_per_gpu()  # as many as a step's two lanes
    groups = evaluation_groups(examples, rows, task.way.num_rows)
    mine = groups[rank::num_ranks]
    verdicts: list[Verdict] = []
    with torch.no_grad():
        for group in reporter.counted("evaluating", mine, len(mine)):
            verdicts += task.way.judge(stepper, [examples[at] for at in group])
    packed = json.dumps([astuple(verdict) for verdict in verdicts]).encode()
    everyone = stepper.replica.gather(packed)

    def merged() -> bytes:
        found: dict[int, Verdict] = {}
        for other, data in enumerate(everyone):
            places = [at for group in groups[other::num_ranks] for at in group]
            found |= {at: Verdict(*told) for at, told in zip(places, json.loads(data), strict=True)}
        in_order = [found[at] for at in range(len(examples))]
        return json.dumps(asdict(sum_up(in_order, examples, task.way.metrics))).encode()

    return Evaluation(**json.loads(stepper.replica.share(merged)))
