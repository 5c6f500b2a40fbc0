"""Rounding noise of ``L+ - L-`` against its signal, by forward precision and eps.

Direct: the low-precision difference less that of an fp32 forward along the same directions.
Estimated: what the engine reports without an exact forward (``zo_offload.loss_noise``). The signal
is the fp32 difference, root mean square.

With ``--steps``, the model is first trained on the objective (fp32, signs, eps 1e-3, lr 3e-5): a
fresh model's slopes along random directions are several times steeper than a trained one's.

    python benchmarks/loss_noise.py [--acceptance DIR] [--objective options|language]
                                    [--batches 4] [--steps 0]
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_offload.config import ZOConfig
from zo_offload.estimator import SIGNS
from zo_offload.integrations.hf import load_causal_lm, load_tokenizer
from zo_offload.objective import Objective, model_loss
from zo_offload.ops import Draw
from zo_offload.step import Stepper
from zo_offload.tasks import Prompt, collate, encode, option_forward, option_loss, read_examples

EPS = (3e-4, 1e-3, 1e-2)
DIRECTIONS = 3
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "acceptance"


def rms(values: Iterable[float]) -> float:
    values = list(values)
    return math.sqrt(sum(v * v for v in values) / len(values))


def differences(
    stepper: Stepper, batches: list[dict], eps: float, context: Callable
) -> list[float]:
    """``L+ - L-`` for every batch and direction."""
    found = []
    for batch in batches:
        draws = [(k, s, Draw(0, 0, k, s * eps)) for k in range(DIRECTIONS) for s in SIGNS["spsa"]]
        with context():
            (sums,) = stepper.measure([batch], draws)
            losses = [total / weight for total, weight in sums]
        found += [losses[2 * k] - losses[2 * k + 1] for k in range(DIRECTIONS)]
    return found


def half_loss(model: nn.Module, batch: dict, outputs: Any) -> torch.Tensor:
    """Cross-entropy in the logits' precision, which the engine refuses: here widened afterwards."""
    if "labels" in batch:
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    else:
        logits = outputs.logits[:, -1].gather(1, batch["option_ids"])
        labels = batch["targets"]
    there = labels >= 0
    scores = torch.log_softmax(logits[there], dim=-1).gather(1, labels[there][:, None])
    return -scores.mean().float()


def train(folder: Path, batches: list[dict], objective: Objective, steps: int) -> nn.Module:
    """The model after some steps in fp32."""
    model = load_causal_lm(folder)
    with Stepper(model, ZOConfig(eps=1e-3), objective=objective) as stepper:
        for step in range(steps):
            stepper.train_step([batches[step % len(batches)]], lr=3e-5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = Path(os.environ.get("ZO_ACCEPTANCE", DEFAULT_FOLDER))
    parser.add_argument("--acceptance", type=Path, default=folder)
    parser.add_argument("--objective", choices=("options", "language"), default="language")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    batches = make_batches(options, options.batches + options.steps)
    batches, training = batches[: options.batches], batches[options.batches :]
    objective = (
        Objective(option_loss, option_forward)
        if options.objective == "options"
        else Objective(model_loss)
    )
    trained = train(options.acceptance / "opt-mini", training, objective, options.steps)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    in_half = replace(objective, loss=half_loss)
    variants: dict[str, tuple[torch.dtype | None, Callable, bool, Objective]] = {
        "bf16, bf16 logits and loss": (torch.bfloat16, nullcontext, False, in_half),
        "bf16, bf16 logits": (torch.bfloat16, nullcontext, False, objective),
        "bf16, fp32 logits": (torch.bfloat16, nullcontext, True, objective),
        "autocast bf16, fp32 logits": (None, autocast, True, objective),
        "fp16, fp32 logits": (torch.float16, nullcontext, True, objective),
    }
    table: dict[str, dict[str, Any]] = {}
    slopes: dict[str, float] = {}
    for eps in EPS:
        exact = Stepper(deepcopy(trained), ZOConfig(eps=eps), objective=objective)
        signal = differences(exact, batches, eps, nullcontext)
        exact.close()
        for name, (dtype, context, exact_head, measured) in variants.items():
            config = ZOConfig(eps=eps)
            stepper = Stepper(deepcopy(trained), config, dtype=dtype, objective=measured)
            if not exact_head:
                stepper.lanes.copies.head = None
            noisy = differences(stepper, batches, eps, context)
            with context():
                estimates = [stepper.measure_noise(batch) for batch in batches]
            stepper.close()
            direct = rms(a - b for a, b in zip(noisy, signal, strict=True)) / rms(signal)
            estimated = rms(e.noise for e in estimates) / rms(signal)
            row = {"direct": round(direct, 4), "estimated": round(estimated, 4)}
            table.setdefault(name, {})[f"{eps:g}"] = row
            print(f"eps {eps:<7g} {name:<28} direct {direct:6.3f}  estimated {estimated:6.3f}")
        slopes[f"{eps:g}"] = slope = round(rms(signal) / (2 * eps), 2)
        mean = sum(map(abs, signal)) / len(signal) / (2 * eps)
        print(f"eps {eps:<7g} |projected gradient| {slope:.2f} root mean square, {mean:.2f} mean")
    found = {
        "objective": options.objective,
        "steps": options.steps,
        "projected_grads": slopes,
        "torch": torch.__version__,
        "noise_over_signal": table,
    }
    print(json.dumps(found))


def make_batches(options: argparse.Namespace, number: int) -> list[dict]:
    """Of 16 sentences each; fewer where the set ends."""
    tokenizer = load_tokenizer(options.acceptance / "opt-mini")
    prompt = Prompt("{sentence} This is a", " review, story")
    examples = read_examples(options.acceptance / "subj" / "train.tsv")[: 16 * number]
    encoded = encode(examples, prompt, tokenizer, 512)
    batches = [collate(encoded[i : i + 16]) for i in range(0, len(encoded), 16)]
    if options.objective == "options":
        return batches
    return [
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100),
        }
        for batch in batches
    ]


if __name__ == "__main__":
    main()
