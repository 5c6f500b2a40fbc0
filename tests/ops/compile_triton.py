"""Compiles the Triton kernels for a CUDA device, which need not be there: prints one line each.

Run in a process of its own: Triton decides when it is imported whether it interprets.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zo_offload.ops.layout import CODECS
from zo_offload.ops.span import FORMATS
from zo_offload.ops.triton import kernels

ELEMENTS = {"fp32": "*fp32", "fp16": "*fp16"}  # others are bfloat16, as its bits
RESTS = {"planes": "*i16", "fp16": "*fp32", "bf16+8": "*i8"}
ARGUMENTS = {
    "table": "*i32", "count": "i32", "draws": "*u32",
    "values": "*fp32", "per_draw": "i32", "decays": "*fp64", "starts": "*i32",
    "roundings": "*u32", "num_steps": "i32", "num_all": "i32", "point": "i32",
    "scales": "*i16", "nf4": "*fp32", "words": "*i32", "elements": "i32", "first": "i32",
    "num_bytes": "i64", "damage": "*i32",
}  # fmt: skip


def ptx_of(format_name: str, codec: str, direction: int) -> str:
    if codec == "lossless12" and direction < 0:
        return unpacking(format_name)
    updates = codec == "identity"
    element = ELEMENTS.get(format_name, "*i16")
    constants = {
        "GROUPS": 4,
        "FORMAT": FORMATS[format_name],
        "WIRE": FORMATS[format_name] if updates else -1,
        "CODEC": CODECS[codec],
        "PER_SCALE": 128,
        "DIRECTION": direction,
        "UPDATES": updates,
        "PERTURBS": True,
        "DITHERS": format_name == "bf16_sr",
    }
    wire = element if updates else "*u8"
    pointers = {"wire": wire, "rest": RESTS.get(format_name, wire), "out": element}
    signature = {**pointers, **ARGUMENTS, **dict.fromkeys(constants, "constexpr")}
    return ptx_from(kernels.work, signature, constants)


def unpacking(format_name: str) -> str:
    """Of decoding alone."""
    constants = {"GROUPS": 8, "FORMAT": FORMATS[format_name]}
    pointers = {"packed": "*u8", "out": ELEMENTS.get(format_name, "*i16")}
    names = ("words", "elements", "first", "num_bytes", "damage", "count")
    signature = pointers | {name: ARGUMENTS[name] for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    return ptx_from(kernels.unpack_lossless, signature, constants)


def ptx_from(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    names = [parameter.name for parameter in kernel.params]
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: signature[name] for name in names}, constexprs=places)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    return made.asm["ptx"]


if __name__ == "__main__":
    for row in sys.argv[1:]:
        name, codec, direction = row.split(",")
        ptx = ptx_of(name, codec, int(direction))
        print(row, "fma.rn.f32" in ptx, ".ftz" in ptx)
