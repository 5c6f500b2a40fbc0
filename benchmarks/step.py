"""A whole training step of an OPT-125m-shaped model, against two bare forwards and MeZO's step.

Random weights, bfloat16, 8 x 64 tokens, signs; in memory, and with every block streamed from host
memory. MeZO's is the published step (``mezo.py``) on the same model.

    python benchmarks/step.py [--rounds 7] [--layers 12] [--width 768] [--vocabulary 50272]

The last line is JSON: ``step_vs_mezo`` is a speed-up, the others are ratios of times.
"""

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mezo import step
from timing import alternating

from zo_offload import Stepper
from zo_offload.config import ZOConfig
from zo_offload.ops import kernels

ROWS, LENGTH = 8, 64
LAG = 4


def make_model(layers: int, width: int, vocabulary: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        num_hidden_layers=layers, vocab_size=vocabulary, hidden_size=width, ffn_dim=4 * width,
        word_embed_proj_dim=width, num_attention_heads=width // 64,
    )  # fmt: skip
    model: Any = OPTForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_272)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plain, mezo, memory, offloaded, lagging = (
        make_model(options.layers, options.width, options.vocabulary) for _ in range(5)
    )
    generator, highest = torch.Generator().manual_seed(0), min(50_000, options.vocabulary)
    tokens = torch.randint(5, highest, (ROWS, LENGTH), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens}
    parameters = [p.detach() for p in mezo.parameters()]
    for parameter, value in zip(mezo.parameters(), parameters, strict=True):
        parameter.data = value
    count = sum(p.numel() for p in plain.parameters())

    def loss_of(model: Any) -> float:
        with torch.inference_mode():
            return float(model(**batch, use_cache=False).loss)

    def bare() -> None:
        for _ in range(2):
            loss_of(plain)

    def exact() -> None:
        """With logits in fp32, as lanes take them: rounded to bfloat16 they drown small steps."""
        head = plain.get_output_embeddings()
        given = head.forward
        head.forward = lambda x: F.linear(x.float(), head.weight.float())
        try:
            bare()
        finally:
            head.forward = given

    number = 0

    def published() -> None:
        nonlocal number
        number += 1
        step(list(mezo.parameters()), lambda: loss_of(mezo), seed=number)

    def ours(model: Any, device: str, lag: int = 0) -> Callable[[], object]:
        block = {"offload_param": {"device": device}, "update": {"lag": lag}}
        stepper = Stepper(model, ZOConfig.model_validate(block))
        return lambda: stepper.train_step([batch], lr=1e-7)

    contestants: dict[str, Callable[[], object]] = {
        "two bare forwards": bare,
        "two, with fp32 logits": exact,
        "ours, in memory": ours(memory, "none"),
        "ours, from host memory": ours(offloaded, "cpu"),
        f"the same, lag {LAG}": ours(lagging, "cpu", LAG),
        "MeZO as published": published,
    }
    print(
        f"{count / 1e6:.0f} M parameters, {ROWS} x {LENGTH} tokens, "
        f"{torch.get_num_threads()} threads, kernels: {kernels.name()}"
    )
    times = alternating(contestants, options.rounds)
    forwards = times["two bare forwards"]
    for name, each in times.items():
        print(
            f"{name:24} {each.median:7.3f} s, {each.over(forwards):6.2f} x two forwards, "
            f"spread {each.spread:.0%}"
        )
    memory_times = times["ours, in memory"]
    ratios = {
        "step_vs_mezo": times["MeZO as published"].over(memory_times),
        "step_vs_forwards": memory_times.over(forwards),
        "step_vs_exact_forwards": memory_times.over(times["two, with fp32 logits"]),
        "offload_vs_memory": times["ours, from host memory"].over(memory_times),
        "lagging_vs_memory": times[f"the same, lag {LAG}"].over(memory_times),
    }
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
