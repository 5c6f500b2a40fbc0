"""A step on a GPU, held against bare forwards, MeZO, ZO2's code, and what the machine allows.

OPT shapes with random weights in bfloat16; nothing is fetched. In one run and in turn, medians:

* two bare forwards of the model on the device, the bound of any step; also with blocks compiled;
* MeZO as published (``mezo.py``), on those weights;
* ZO2's code, if its folder is given (``--zo2``); it is not tuned;
* ours in memory, and with blocks in host memory by wire format and ``lag``.

Each offloaded step is held against the slowest of the step in memory, its bytes over the rate of a
bare copy from page-locked memory, and the host kernel's bytes over that kernel's own rate, all
measured in the same run. Peaks are of the device (torch's count, beyond what the others hold) and
of the host (beyond what was held at first).

    python benchmarks/gpu.py [--shapes 13b 175b-cut 6.7b 30b 1.3b] [--parts core more compiled]
                             [--minutes 8.5] [--out gpu.jsonl] [--rounds 5]
                             [--zo2 FOLDER] [--zo2-site FOLDER]
    python benchmarks/gpu.py --whole-175b    # one whole step of 175 G parameters, some 100 GB of
                                             # host memory, instead of the parts

Needs one GPU, PyTorch with Triton, transformers, pydantic, psutil, matplotlib, for the whole step
peft, and this package with its compiled kernels; not DeepSpeed. For the largest shapes and the
whole step 128 GiB of host memory; no disk. Parts are run in order of worth, each in a process of
its own; what the time does not reach is left out by name, and what failed is named with why. Lines
are written to ``--out`` as they come (``gpu_results.py``), so that a run that was cut off has lost
nothing; a file that is there is added to, so that several runs make one table. Beside it comes a
picture.

Where a machine has not room for fp32 masters, ours runs with smaller ones; tables name them.

``--zo2`` is a clone of ZO2; as it wants transformers 4.51, ``--zo2-site`` names a folder that has
it (``pip install --target FOLDER transformers==4.51.3``). Without a GPU, ``--device cpu --shapes
tiny`` shows that all of it works; what only a GPU has is then null.

The last line is JSON: ``machine``, ``rates``, ``rows``, ``whole``, ``aims``, ``left_out``,
``failed``.
"""

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As the command line has it: threads that wait do not take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gpu_report
import torch
from gpu_machine import machine, measured
from gpu_results import Results
from gpu_sessions import SETTINGS, Asked, Sessions
from gpu_shapes import SHAPES, TINY, Shape
from gpu_whole import whole_step

from zo_offload.units import IDENTITY

KINDS = ("core", "more", "compiled")
KNOWN = {**SHAPES, TINY.name: TINY}
MACHINE, WHOLE = "machine", "whole"
GRACE_SECONDS = 10.0  # after which a part that does not end is ended


def main() -> None:
    options = _options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gc.freeze()  # libraries need not be looked at whenever a model is let go
    results = Results(options.out)
    if options.one is not None:
        run_part(options.one, options, results)
        return
    parts = parts_of(options)
    run = run_apart if options.apart else run_part
    for number, part in enumerate(parts):
        if time.time() > options.until:
            for name in parts[number:]:
                results.add("left out", name=name, why="no time is left")
            break
        print(f"[{options.until - time.time():.0f} s left] {part}", flush=True)
        run(part, options, results)
    gpu_report.show(results)
    gpu_report.draw(results, options.out.with_suffix(".png"))
    found: dict[str, Any] = {kind: results.last(kind) for kind in (MACHINE, "rates", WHOLE)}
    found |= {"rows": results.of("row"), "aims": list(gpu_report.aims(results))}
    found |= {kind.replace(" ", "_"): results.of(kind) for kind in ("left out", "failed")}
    print(json.dumps(found))


def parts_of(options: argparse.Namespace) -> list[str]:
    """In order of worth."""
    if options.whole_175b:
        return [MACHINE, WHOLE]
    chosen = [shape for shape in KNOWN if shape in options.shapes]
    kinds = [kind for kind in KINDS if kind in options.parts]
    return [MACHINE, *(f"{kind} {shape}" for kind in kinds for shape in chosen)]


def run_part(part: str, options: argparse.Namespace, results: Results) -> None:
    """In this process."""
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    tiny = options.shapes == [TINY.name]
    if part == MACHINE:
        wires = {each.wire for settings in SETTINGS.values() for each in settings} - {IDENTITY}
        results.add(MACHINE, **machine(device))
        results.add("rates", **measured(device, sorted(wires), tiny))
        return
    if part == WHOLE:
        whole_step(device, results, tiny)
        return
    kind, name = part.split()
    shape: Shape = KNOWN[name]
    asked = Asked(
        shape, device, results, options.rounds, options.until, options.zo2, options.zo2_site,
        options.backend,
    )  # fmt: skip
    sessions = Sessions(asked)
    works: dict[str, Callable[[], None]] = {
        "core": sessions.core,
        "more": sessions.more,
        "compiled": sessions.compiled,
    }
    works[kind]()


def run_apart(part: str, options: argparse.Namespace, results: Results) -> None:
    """In a process of its own: what goes wrong on a device ends with it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", part]
    command += ["--until", str(options.until)]
    try:
        left = max(0.0, options.until - time.time()) + GRACE_SECONDS
        done = subprocess.run(command, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        results.add("left out", name=part, why="was ended where the time was over")
        return
    if done.returncode:
        results.add("failed", name=part, why=f"its process ended with {done.returncode}")


def _options(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(KNOWN))
    parser.add_argument("--parts", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--whole-175b", action="store_true", help="one whole step, and no parts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.5, help="of all of it")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="lines of figures")
    parser.add_argument("--zo2", type=Path, help="folder of ZO2's code")
    parser.add_argument("--zo2-site", type=Path, help="folder of packages that it wants")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, default=default == "cuda",
        help="each part in a process of its own",
    )  # fmt: skip
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no such device; --device cpu --shapes tiny")
    if options.until is None:
        options.until = time.time() + 60 * options.minutes
    return options


if __name__ == "__main__":
    main()
