"""Weights that cross the bus packed: accuracy after training, time of a step, bytes a parameter.

The acceptance task (``docs/results.md``), forwards in bfloat16 on the model streamed from host
memory; everything but the wire is alike. All wires take their steps in turn, so that what disturbs
the machine disturbs them alike.

    python benchmarks/wire.py [--acceptance DIR] [--steps 1000] [--seeds 3] [--dev 1000]
                              [--wires identity int8 ...]

The last line is JSON: for every wire ``accuracy`` and ``loss`` (means over seeds, and their
``spread``: largest less smallest accuracy), ``step_vs_identity`` (a ratio of times) and ``bytes`` a
parameter of the blocks.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from timing import Times

from zo_offload.config import ZOConfig
from zo_offload.integrations.hf import load_causal_lm, load_tokenizer
from zo_offload.objective import Objective
from zo_offload.step import Stepper
from zo_offload.tasks import (
    Encoded,
    Evaluation,
    Prompt,
    batch_at,
    collate,
    encode,
    evaluate,
    evaluation_batches,
    option_forward,
    option_loss,
    read_examples,
)

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "acceptance"
WIRES = ("identity", "lossless12", "fp8_e4m3", "int8", "int4", "nf4")
LR, BATCH = 7.5e-5, 16


@dataclass
class Contestant:
    """One wire with one seed."""

    stepper: Stepper
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Any, lr: float) -> None:
        began = time.perf_counter()
        self.stepper.train_step([batch], lr)
        self.seconds.append(time.perf_counter() - began)

    def bytes_of_a_parameter(self) -> float:
        """Of the blocks, in all visits so far."""
        weights = self.stepper.weights
        assert weights.pipeline is not None
        count = sum(unit.num_parameters for unit in weights.map.units)
        return weights.pipeline.bytes_moved / (count * self.stepper.step)


def start(folder: Path, wire: str, seed: int) -> Contestant:
    config = ZOConfig.model_validate(
        {
            "seed": seed,
            "eps": 1e-3,
            "direction_scale": "rms",
            "wire": wire,
            "offload_param": {"device": "cpu"},
        }
    )
    objective = Objective(loss=option_loss, forward=option_forward)
    model = load_causal_lm(folder / "opt-mini")
    return Contestant(Stepper(model, config, dtype=torch.bfloat16, objective=objective))


def race(
    folder: Path, wires: list[str], seed: int, data: tuple[list[Encoded], list[Encoded]], steps: int
) -> dict[str, tuple[Evaluation, Times, float]]:
    """Of every wire: how it ended, its steps' times, and its bytes a parameter."""
    train, dev = data
    contestants = {wire: start(folder, wire, seed) for wire in wires}
    for step in range(steps):
        chosen = batch_at(seed, step, BATCH, len(train))
        batch = collate([train[i] for i in chosen])
        for contestant in contestants.values():
            contestant.step(batch, LR * (1 - step / steps))
    found = {}
    for wire, contestant in contestants.items():
        moved = contestant.bytes_of_a_parameter()
        result = evaluate(contestant.stepper.forward, evaluation_batches(dev, 2 * BATCH))
        found[wire] = result, Times(tuple(contestant.seconds)), moved
        contestant.stepper.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = Path(os.environ.get("ZO_ACCEPTANCE", DEFAULT_FOLDER))
    parser.add_argument("--acceptance", type=Path, default=folder)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dev", type=int, default=1000)
    parser.add_argument("--wires", nargs="+", default=list(WIRES))
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    tokenizer = load_tokenizer(options.acceptance / "opt-mini")
    prompt = Prompt("{sentence} This is a", " review, story")
    train, dev = (
        encode(read_examples(options.acceptance / "subj" / f"{name}.tsv"), prompt, tokenizer, 512)
        for name in ("train", "dev")
    )
    data = train, dev[: options.dev]
    rows: dict[str, list[tuple[Evaluation, Times, float]]] = defaultdict(list)
    for seed in range(options.seeds):
        for wire, row in race(options.acceptance, options.wires, seed, data, options.steps).items():
            rows[wire].append(row)
            print(f"seed {seed} {wire:10} accuracy {row[0].accuracy:.4f} loss {row[0].loss:.4f}")
    first = rows[options.wires[0]]
    table = {}
    for wire, found in rows.items():
        accuracies = [result.accuracy for result, _, _ in found]
        pairs = zip(found, first, strict=True)
        table[wire] = {
            "accuracy": round(mean(accuracies), 4),
            "spread": round(max(accuracies) - min(accuracies), 4),
            "loss": round(mean(result.loss for result, _, _ in found), 4),
            "step_vs_identity": round(median(a.over(b) for (_, a, _), (_, b, _) in pairs), 3),
            "bytes": round(found[0][2], 3),
        }
        print(f"{wire:10} {table[wire]}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
