"""What torchao and bitsandbytes make of values whose scales ours hold exactly.

``python tests/codec/peers.py``, where both are installed, prints :data:`DECODED` anew. They are not
needed to test: too large, for three digests.
"""

import hashlib

import numpy as np
import torch

GROUPS, GROUP = 256, 64
LARGEST_CODE = {"int8": 127, "int4": 7, "nf4": 1}
# SHA-256 of the decoded fp32 values, by torchao 0.18.0 and (nf4) bitsandbytes 0.50.2.
DECODED = {
    "int8": "a91658f830a18aa4b0346843866ea11ad5c4c64f093ad8cf822412a55a88344a",
    "int4": "d74dde3c472a4f3631465817577aa79e8cce61d5674b4bd41940f003650b79a3",
    "nf4": "e87253e27f01c2c475d3e132121d6951500a3ac60a750f4694e85a7298331b54",
}


def values_for(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``[GROUPS, GROUP]``, and the scale of each group, a bfloat16.

    Integers make them, so that they are the same with every version of everything.
    """
    number = np.arange(GROUPS * GROUP, dtype=np.uint32).reshape(GROUPS, GROUP)
    noise = (number * np.uint32(2654435761) + np.uint32(12345)) ^ (
        (number * np.uint32(40503)) >> np.uint32(7)
    )
    values = torch.from_numpy(noise.astype(np.int32) / np.float32(2**31)).float()  # -1 to 1
    scales = (torch.arange(1, GROUPS + 1) / 37).bfloat16().float()[:, None]
    values[:, 17] = torch.where(torch.arange(GROUPS) % 2 == 0, 1.0, -1.0)  # absmax / qmax = scale
    return values * (scales * LARGEST_CODE[name]), scales


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256((values.reshape(-1) + 0.0).numpy().tobytes()).hexdigest()  # one zero


def by_torchao(name: str) -> torch.Tensor:
    from torchao.quantization.quant_primitives import (  # pyright: ignore[reportMissingImports]
        dequantize_affine,
        quantize_affine,
    )

    values, scales = values_for(name)
    most = LARGEST_CODE[name]
    how = (1, GROUP), scales, torch.zeros_like(scales), torch.int8
    codes = quantize_affine(values, *how, -most, most)
    return dequantize_affine(codes, *how, -most, most)


def by_bitsandbytes() -> torch.Tensor:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    codes, state = functional.quantize_4bit(
        values_for("nf4")[0].reshape(-1), blocksize=GROUP, quant_type="nf4"
    )
    return functional.dequantize_4bit(codes, state)


if __name__ == "__main__":
    print({"int8": digest(by_torchao("int8")), "int4": digest(by_torchao("int4")),
           "nf4": digest(by_bitsandbytes())})  # fmt: skip
