"""Train a causal LM by a reward on what it answers: python reward.py MODEL QUESTIONS.jsonl OUTPUT.

A line of QUESTIONS is {"question": "...", "answer": "..."}; every fourth is held out. An answer
ends with its line. The reward here is the exact match, or a third of the F1 where that is more.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import zo_offload
from zo_offload.tasks import (
    Decoding,
    Rendered,
    batch_at,
    encode_rendered,
    exact_match_of,
    reward_objective,
    token_f1_of,
)

STEPS, BATCH, NEW_TOKENS = 12, 32, 5
CONFIG = {
    "train_batch_size": BATCH,
    "optimizer": {"type": "ZO", "params": {"lr": 2e-2}},
    # Rewards move in jumps: eps is wide, so that lanes differ; and a few matrices are tried alone.
    "zeroth_order": {
        "eps": 3e-2,
        "probes": 4,
        "trainable": {"parameters": ["*.fc2.weight"]},
        "offload_param": {"device": "cpu"},
    },
}


def reward(text: str, references: Sequence[str]) -> float:
    """Any function of a text and its good answers; 1 at best."""
    return max(exact_match_of(text, references), token_f1_of(text, references) / 3)


def posed(path: str) -> list[Rendered]:
    """The questions, each with what would be right."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [
        Rendered(
            row["question"], (f" {row['answer']} \n",), (0,), row["question"],
            (row["answer"],), fixed=False,
        )
        for row in rows
    ]  # fmt: skip


if len(sys.argv) != 4:
    sys.exit(__doc__)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
questions = encode_rendered(posed(sys.argv[2]), tokenizer, None, max_new_tokens=NEW_TOKENS)
held_out = questions[::4]
learnt = [one for at, one in enumerate(questions) if at % 4]
decoding = Decoding(tokenizer, NEW_TOKENS)
engine, *_ = zo_offload.initialize(
    model=sys.argv[1], config=CONFIG, objective=reward_objective(decoding, reward)
)


def exact_match() -> float:
    """The share of held-out questions that are answered right."""
    batch = decoding.collate(held_out)
    inputs = {name: batch[name].to(engine.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ids = engine.stepper.run_model(
            lambda: decoding.generate(engine.stepper.model, {**batch, **inputs})
        )
    return float(decoding.rewards(batch, ids).mean())


print(f"exact match before: {exact_match():.3f}")
for step in range(STEPS):
    chosen = batch_at(0, step, BATCH, len(learnt))
    loss = engine.train_batch(iter([decoding.collate([learnt[at] for at in chosen])]))
    print(f"step {step}: reward {1 - float(loss):.3f}")
print(f"exact match after: {exact_match():.3f}")
engine.save_pretrained(sys.argv[3])
engine.destroy()
