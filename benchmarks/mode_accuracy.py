"""What each way of training reaches at equal forwards, beside full-parameter training.

A small pretrained OPT learns the Cornell subjectivity set (prompt and label words as in the
folder's README): every mode takes the same steps, probes and batches, with a linearly decaying
learning rate, on the first 7,000 training rows, and is judged on the development rows. A seed
decides directions, the order of the data, and an adapter's first values.

    python benchmarks/mode_accuracy.py [--acceptance DIR] [--steps 1000] [--seeds 3]
                                       [--modes NAME ...] [--rows 1000] [--workers 2]
                                       [--out results.jsonl] [--search]

``--search`` tries learning rates instead, on another seed and on the last 1,000 training rows;
those in the table of modes below were found so. Masks are made by ``zo-offload sensitivity``, on
the training rows' sentences without their labels. Results are written to ``--out`` as they come;
what is there already is not done again. The last line is JSON: medians of accuracy by mode.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zo_offload.config import parse_config
from zo_offload.errors import DivergedError
from zo_offload.integrations.hf import load_causal_lm, load_tokenizer
from zo_offload.objective import Objective
from zo_offload.scoring import ScoringOptions, score
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
)  # fmt: skip

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "acceptance"
PROMPT = Prompt("{sentence} This is a", " review, story")
BATCH, EPS = 16, 1e-3
HELD_OUT = 1000  # of the training rows, for --search
SEARCH_SEED = 1000
FACTORS = (0.3, 1.0, 3.0)  # of a mode's learning rate, in --search
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Attributes:
        lr: To begin with.
        block: Keys of ``zeroth_order``, beside eps and seed.
        forward: What forwards compute in.
        share: Of the weights that a mask chooses, where the mode needs one.
    """

    lr: float
    block: Mapping[str, Any]
    forward: str = "bf16"
    share: float | None = None


def lora(**more: Any) -> dict[str, Any]:
    keys = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **more}
    return {"trainable": {"mode": "peft", "peft_config": keys}}


RMS = {"direction_scale": "rms"}
SPARSE = {"trainable": {"mode": "sparse"}}
BESIDE = {"trainable": {"mode": "sparse", "parameters": ["*norm*", "*.bias"]}, **RMS}
MODES = {
    "full": Mode(2.7e-4, {}),
    "full rms": Mode(2e-4, RMS),
    "sparse 1% nf4": Mode(1e-3, {**SPARSE, "wire": "nf4"}, share=1e-2),
    "sparse 0.1% nf4": Mode(9e-3, {**SPARSE, "wire": "nf4"}, share=1e-3),
    "sparse 1% and vectors rms nf4": Mode(3e-3, {**BESIDE, "wire": "nf4"}, share=1e-2),
    "lora nf4": Mode(3e-3, {**lora(), "wire": "nf4"}),
    "low_rank rms": Mode(2e-4, {"trainable": {"mode": "low_rank"}, **RMS}),
    "scales int4": Mode(1e-4, {"trainable": {"mode": "scales"}, "wire": "int4"}),
}


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        mode: Its name.
        seed: Of directions and of the order of the data.
        steps: To take.
        lr: To begin with.
        search: Judged on held-out training rows.
        rows: Development rows to judge on.
    """

    mode: str
    seed: int
    steps: int
    lr: float
    search: bool
    rows: int


@cache
def data(folder: Path) -> tuple[list[Encoded], list[Encoded]]:
    """Training and development rows."""
    tokenizer: Any = load_tokenizer(str(folder / "opt-mini"))
    train, dev = (
        encode(read_examples(str(folder / "subj" / f"{part}.tsv")), PROMPT, tokenizer, 512)
        for part in ("train", "dev")
    )
    return train, dev


def run(job: Job, folder: Path, masks: Mapping[float, str]) -> dict[str, Any]:
    """Train and judge; in a process of its own."""
    torch.set_num_threads(1)
    mode, (train, dev) = MODES[job.mode], data(folder)
    train, held_out = train[:-HELD_OUT], train[-HELD_OUT:]
    judged = held_out if job.search else dev[: job.rows]
    block = {"eps": EPS, "seed": job.seed, **mode.block}
    if mode.share is not None:
        block["trainable"] = {**block["trainable"], "mask": masks[mode.share]}
    began = time.monotonic()
    model = load_causal_lm(str(folder / "opt-mini"))
    config = parse_config({"zeroth_order": block})
    objective = Objective(option_loss, option_forward)
    found = Evaluation(0.0, math.inf, len(judged))  # of a run that diverges
    with (
        Stepper(model, config, dtype=DTYPES[mode.forward], objective=objective) as stepper,
        suppress(DivergedError),
    ):
        for step in range(job.steps):
            chosen = batch_at(job.seed, step, BATCH, len(train))
            lr = job.lr * (1 - step / job.steps)
            stepper.train_step([collate([train[index] for index in chosen])], lr)
        found = evaluate(stepper.forward, evaluation_batches(judged, 2 * BATCH))
    seconds = round(time.monotonic() - began, 1)
    return {**asdict(job), "accuracy": found.accuracy, "loss": found.loss, "seconds": seconds}


def make_masks(folder: Path, into: Path, shares: Iterable[float]) -> dict[float, str]:
    """By share, of the sentences that training sees, without labels."""
    rows = read_examples(str(folder / "subj" / "train.tsv"))[:-HELD_OUT]
    corpus = into / "corpus.txt"
    corpus.write_text("\n".join(row.fields["sentence"] for row in rows))
    found = {}
    for share in shares:
        found[share] = str(into / f"{share}.safetensors")
        score(
            ScoringOptions(
                model=str(folder / "opt-mini"),
                output=found[share],
                corpus=str(corpus),
                share=share,
                sequences=256,
                length=128,
            )
        )
    return found


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """In an order in which a part is of use, too: a seed of every mode first."""
    for number in range(1 if options.search else options.seeds):
        for name in options.modes:
            for factor in FACTORS if options.search else (1.0,):
                seed = SEARCH_SEED if options.search else number
                lr = MODES[name].lr * factor
                yield Job(name, seed, options.steps, lr, options.search, options.rows)


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of all jobs, those that are at hand first."""
    wanted = list(jobs_of(options))
    keys = list(asdict(wanted[0]))
    done = {Job(**{k: each[k] for k in keys}): each for each in _read(options.out)}
    missing = [job for job in wanted if job not in done]
    with ExitStack() as stack:
        into = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shares = {MODES[job.mode].share for job in missing} - {None}
        masks = make_masks(options.acceptance, into, [s for s in shares if s is not None])
        pool = stack.enter_context(ProcessPoolExecutor(options.workers, get_context("spawn")))
        under_way: list[Future] = [
            pool.submit(run, job, options.acceptance, masks) for job in missing
        ]
        for future in as_completed(under_way):
            found = future.result()
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{found['mode']}, seed {found['seed']}, lr {found['lr']:g}: "
                  f"{found['accuracy']:.4f} in {found['seconds']:.0f} s", flush=True)  # fmt: skip
            done[Job(**{k: found[k] for k in keys})] = found
    return [done[job] for job in wanted]


def _read(path: Path) -> list[dict[str, Any]]:
    """Results; a last line that was cut off is taken away."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    path.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


def show(found: list[dict[str, Any]], search: bool) -> dict[str, float]:
    """Medians by mode; a table of them, or of learning rates."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        name = f"{each['mode']}, lr {each['lr']:.3g}" if search else each["mode"]
        rows.setdefault(name, []).append(each)
    medians = {
        name: statistics.median(each["accuracy"] for each in same) for name, same in rows.items()
    }
    table = Table("mode", "accuracy", "least", "most", "against full (points)", "lr")
    for name, same in rows.items():
        accuracies = [each["accuracy"] for each in same]
        gap = 100 * (medians[name] - medians["full"]) if "full" in medians else None
        verdict = "" if gap is None else f"{gap:+.1f}" + (" worse" if gap < 0 else "")
        table.add_row(
            name, f"{medians[name]:.4f}", f"{min(accuracies):.4f}", f"{max(accuracies):.4f}",
            verdict, f"{same[0]['lr']:.3g}",
        )  # fmt: skip
    Console(width=100).print(table)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(os.environ.get("ZO_ACCEPTANCE", DEFAULT_FOLDER))
    parser.add_argument("--acceptance", type=Path, default=folder)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("accuracy.jsonl"))
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args()
    if not (options.acceptance / "opt-mini").is_dir():
        parser.error(f"{options.acceptance}: no opt-mini there; name the folder: --acceptance DIR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print(json.dumps(show(results(options), options.search)))


if __name__ == "__main__":
    main()
