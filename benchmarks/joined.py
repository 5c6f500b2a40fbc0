"""A step whose lanes share products (``joined_rows``) beside one whose lanes do not.

A random Llama with a LoRA of rank 8 on its query and value projections, blocks on the device, one
micro-batch of one row: by width, dtype, number of lanes and tokens a lane. Both steppers hold the
same weights and take turns; a cell is the median over rounds of joined over separate. With few
tokens a product is bound by reading its matrix, which joined lanes read once: at best a cell nears
one over the number of lanes. With many it is bound by arithmetic, and nothing can be won.

What a stop at a product costs shows in a second line, of products so small that nothing else does.

    python benchmarks/joined.py [--widths 256 768 2048] [--tokens 1 4 8 16 64 256 1024]
                                [--lanes 2 8] [--dtypes float32 bfloat16] [--layers 2]
                                [--seconds 2] [--most-gflop 900]

A cell takes as many rounds as fit in ``--seconds``, 3 to 31; one whose step is more than
``--most-gflop`` is left out. The last line is JSON: the cells, and ``stop_microseconds``.
"""

import argparse
import json
import time
from contextlib import ExitStack, closing
from typing import Any

import torch
from timing import Times, alternating

from zo_offload import Stepper
from zo_offload.config import parse_config

LORA = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "r": 8,
    "target_modules": ["q_proj", "v_proj"],
}
ALL = 10**6  # rows: every product is joined
FEWEST, MOST = 3, 31  # rounds
PRODUCTS = 7  # of a block with matrices that lanes share
TINY = 64  # width whose products take no time beside a stop


def make_stepper(layers: int, width: int, dtype: torch.dtype, lanes: int, joined: bool) -> Stepper:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, vocab_size=128,
        intermediate_size=width * 8 // 3 // 128 * 128 or 128, pad_token_id=0,
        num_attention_heads=max(1, width // 64),
    )  # fmt: skip
    model: Any = LlamaForSequenceClassification(config)
    block = {
        "eps": 1e-3,
        "probes": lanes // 2,
        "trainable": {"mode": "peft", "peft_config": LORA},
        "joined_rows": ALL if joined else None,
    }
    return Stepper(model.to(dtype).eval(), parse_config({"zeroth_order": block}))


def measure(
    layers: int, width: int, dtype: torch.dtype, lanes: int, tokens: int, seconds: float
) -> tuple[Times, Times]:
    """Of joined and of separate steps, in turns."""
    batch = {"input_ids": torch.randint(5, 128, (1, tokens)), "labels": torch.tensor([1])}
    with ExitStack() as stack:
        contestants = {}
        for joined in (True, False):
            stepper = make_stepper(layers, width, dtype, lanes, joined)
            stack.enter_context(closing(stepper))
            contestants[joined] = stepper
        runs = {
            str(joined): lambda stepper=stepper: stepper.train_step([batch], lr=1e-7)
            for joined, stepper in contestants.items()
        }
        for run in runs.values():  # first steps take memory
            run()
        began = time.perf_counter()
        for run in runs.values():
            run()
        round_seconds = time.perf_counter() - began
        rounds = max(FEWEST, min(MOST, int(seconds / round_seconds)))
        times = alternating(runs, rounds)
    return times["True"], times["False"]


def stop_microseconds(seconds: float) -> float:
    """What a lane's stop at a product costs, where the products themselves cost nothing."""
    layers, lanes = 4, 8
    joined, separate = measure(layers, TINY, torch.float32, lanes, 1, seconds)
    return (joined.median - separate.median) / (layers * PRODUCTS * lanes) * 1e6


def gflop(layers: int, width: int, lanes: int, tokens: int) -> float:
    """Of a step's products with the blocks' matrices: 4 of width^2, 3 of 8/3 width^2."""
    return 2 * layers * 12 * width**2 * lanes * tokens / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 64, 256, 1024])
    parser.add_argument("--lanes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--most-gflop", type=float, default=900.0)
    options = parser.parse_args()
    stop = stop_microseconds(options.seconds)
    print(f"a lane's stop at a product: {stop:.0f} us more than none\n")
    print("joined over separate, by tokens a lane")
    print(f"{'':30}" + "".join(f"{tokens:>7}" for tokens in options.tokens))
    found: dict[str, float] = {}
    rows = [(w, d, n) for w in options.widths for d in options.dtypes for n in options.lanes]
    for width, dtype, lanes in rows:
        print(f"width {width:5}, {dtype:8}, {lanes} lanes", end="  ", flush=True)
        for tokens in options.tokens:
            if gflop(options.layers, width, lanes, tokens) > options.most_gflop:
                print(f"{'':>7}", end="")
                continue
            joined, separate = measure(
                options.layers, width, getattr(torch, dtype), lanes, tokens, options.seconds
            )
            found[f"{width} {dtype} {lanes} {tokens}"] = round(joined.over(separate), 3)
            print(f"{joined.over(separate):7.2f}", end="", flush=True)
        print()
    print(json.dumps({"cells": found, "stop_microseconds": round(stop, 1)}))


if __name__ == "__main__":
    main()
