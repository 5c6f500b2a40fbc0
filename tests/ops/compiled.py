"""Compiles the Triton kernels for a GPU that need not be there, and prints what is in them.

Started as a process of its own: where they are interpreted, they cannot be compiled.
"""

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zo_offload.ops.span import FORMATS
from zo_offload.ops.triton import GROUPS, NUM_WARPS, kernels

HOPPER: Any = GPUTarget("cuda", 90, 32)
WIRES = {"fp32": "*fp32", "fp16": "*fp16", "planes": "*i16", "bf16+8": "*i16", "bf16_sr": "*i16"}
RESTS = {**WIRES, "fp16": "*fp32", "bf16+8": "*i8"}
TYPES = {
    "table": "*i32",
    "starts": "*i32",
    "rows": "*i64",
    "draw": "*u32",
    "draws": "*u32",
    "roundings": "*u32",
    "values": "*fp32",
    "terms_of": "*fp32",
    "decays": "*fp64",
    "scales": "*i16",
    "nf4": "*fp32",
}


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    every = {name: types.get(name) or TYPES.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, every | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=HOPPER, options=options).asm["ptx"]


def main() -> None:
    found = {}
    for i, (layout, number) in enumerate(FORMATS.items()):
        direction = i % 2
        groups = list(GROUPS.values())[direction]
        constants = {"GROUPS": groups, "FORMAT": number, "DIRECTION": direction}
        kinds = {
            "WIRE": number,
            "CODEC": 0,
            "PER_SCALE": 128,
            "UPDATES": True,
            "PERTURBS": True,
            "DITHERS": layout == "bf16_sr",
        }
        types = {"wire": WIRES[layout], "rest": RESTS[layout], "out": WIRES[layout]}
        found[f"work {layout}"] = ptx(kernels.work, types, constants | kinds)
        if layout in ("fp32", "fp16", "planes"):
            found[f"rows {layout}"] = ptx(kernels.work_rows, {"values": WIRES[layout]}, constants)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
