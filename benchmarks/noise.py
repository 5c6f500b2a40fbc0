"""A step's work on weights alone: ours against MeZO's passes and against copying.

Ours is one pass: the update of the step before, and both perturbed copies of this one. MeZO's are
perturb, perturb, restore, update, in place, with four draws (``mezo.py``). A copy moves as many
bytes as ours on bfloat16 does: 8 a parameter. Beside them what each further
direction of an update costs, as momentum takes them: processor time of one thread.

    python benchmarks/noise.py [--millions 64] [--rounds 9]

The last line is JSON: speed ratios, larger is better.
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import torch
from mezo import step
from timing import Times, alternating

from zo_offload.ops import Draw, Point, Segment, Span, StepUpdate, kernels, update
from zo_offload.ops.native import Native

SIDE = 4096  # a square matrix of a 7B model
WINDOW = 44  # steps that count with a momentum of 0.9


def span_of(parameters: int, master: str) -> Span:
    size = SIDE * SIDE
    count = max(1, parameters // size)
    segments = [Segment(f"w{i}", i, (SIDE, SIDE), i * size) for i in range(count)]
    return Span(torch.bfloat16, tuple(segments), 0, 0, master=master)


def ours(span: Span, direction: str) -> Callable[[], None]:
    wire = (torch.randn(span.elements) * 0.02).bfloat16()
    rest = span.rest(torch.zeros(span.rest_bytes, dtype=torch.uint8))
    copies = [torch.zeros_like(wire) for _ in range(2)]

    def run() -> None:
        moved = StepUpdate(1.0, (Draw(0, 0, 0, 1e-7),))
        points = [Point(copies[0], Draw(0, 1, 0, 1e-3)), Point(copies[1], Draw(0, 1, 0, -1e-3))]
        update(span, wire, rest, direction, [moved], points)

    return run


def updating(span: Span, direction: str, num_draws: int, rounds: int) -> float:
    """Least seconds that a thread works on an update along the directions of so many steps."""
    wire = (torch.randn(span.elements) * 0.02).bfloat16()
    rest = span.rest(torch.zeros(span.rest_bytes, dtype=torch.uint8))
    moved = StepUpdate(1.0, tuple(Draw(0, step, 0, 1e-7) for step in range(num_draws)))
    threads, found = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    for _ in range(rounds):
        began = time.thread_time()
        update(span, wire, rest, direction, [moved])
        found = min(found, time.thread_time() - began)
    torch.set_num_threads(threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=64, help="parameters, in 2^20")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    small, planes = (span_of(options.millions << 20, m) for m in ("bf16_sr", "fp32"))
    count = small.elements
    weights = [(torch.randn(SIDE, SIDE) * 0.02).bfloat16() for _ in small.segments]
    source, target = torch.ones(count), torch.zeros(count)
    contestants: dict[str, Callable[[], object]] = {
        "MeZO's passes, bf16": lambda: step(weights, lambda: 0.0, seed=0),
        "copy_, 8 bytes": lambda: target.copy_(source),
        "rademacher, bf16": ours(small, "rademacher"),
        "gaussian, bf16": ours(small, "gaussian"),
        "rademacher, planes": ours(planes, "rademacher"),
        "gaussian, planes": ours(planes, "gaussian"),
    }
    native = kernels.serving_for(source)
    if isinstance(native, Native):
        contestants["copy around the caches, 8 bytes"] = lambda: native.copy(target, source)
    print(
        f"{count / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, kernels: "
        f"{kernels.name()}; bf16 keeps a bf16_sr master, planes an fp32 one"
    )
    times = alternating(contestants, options.rounds)
    mezo = times["MeZO's passes, bf16"]
    copies = [each for name, each in times.items() if name.startswith("copy")]
    fastest = min(copies, key=lambda each: each.median)
    for name, each in times.items():
        print(
            f"{name:32} {count / each.median / 1e9:7.3f} G parameters/s, "
            f"{mezo.over(each):6.1f} x MeZO's, spread {each.spread:.0%}"
        )

    for direction in ("rademacher", "gaussian"):
        one, many = (updating(planes, direction, n, options.rounds) for n in (1, WINDOW))
        print(
            f"{direction}, the update alone: {one / count * 1e9:.2f} ns a weight along one "
            f"direction, {many / count * 1e9:.2f} along {WINDOW}: "
            f"{(many - one) / (WINDOW - 1) / count * 1e9:.3f} for each further one"
        )

    def against(name: str, other: Times) -> float:
        return round(other.over(times[name]), 3)

    ratios = {
        "rademacher_vs_mezo": against("rademacher, bf16", mezo),
        "gaussian_vs_mezo": against("gaussian, bf16", mezo),
        "planes_vs_mezo": against("rademacher, planes", mezo),
        "rademacher_vs_copy": against("rademacher, bf16", fastest),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
