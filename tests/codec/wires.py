"""Wires of every kind, and what the NumPy reference makes of them."""

import numpy as np
import torch
from hypothesis import strategies as st

from zo_offload.codec import NAMES, Codec, codec_of, reference
from zo_offload.codec.reference import Wire
from zo_offload.ops.reference import F32, canonical, round_bf16

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODECS = (*NAMES, "fp8_e4m3:64", "int8:64", "int4:64", "nf4:64")
# One row a codec and forward that it serves: a new codec is tested by being named.
TABLE = [(n, d) for n in CODECS for d in DTYPES if n != "lossless12" or d == torch.bfloat16]
KINDS = ("bits", "normal", "magnitudes", "zeros", "steps", "awkward")
SIZES = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


def wire_of(kind: str, dtype: torch.dtype, elements: int, seed: int) -> torch.Tensor:
    """``[elements]``: any bits, weights, all magnitudes, zeros, exact ties, all that is special."""
    random = np.random.default_rng(seed)
    if kind == "bits":
        size = SIZES[dtype]
        raw = random.integers(0, np.iinfo(size).max, elements, size, endpoint=True)
        return torch.from_numpy(raw.view(np.uint8)).view(dtype)
    values = 0.02 * random.standard_normal(elements)
    if kind == "magnitudes":
        values *= 10.0 ** random.integers(-44, 39, elements)
    elif kind == "zeros":
        values *= random.random(elements) < 0.01
    elif kind == "steps":
        values = random.integers(-254, 255, elements) / 2
        values[::64] = 127.0
    elif kind == "awkward":
        special = [np.nan, np.inf, -np.inf, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, 65520.0, -0.0]
        at = random.random(elements) < 1 / 128
        values[at] = random.choice(special, int(at.sum()))
    return torch.from_numpy(values).to(dtype)


@st.composite
def wires(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    blocks, seed = draw(st.integers(1, 20)), draw(st.integers(0, 2**32))
    return wire_of(draw(st.sampled_from(KINDS)), dtype, 128 * blocks, seed)


def array_of(wire: torch.Tensor) -> Wire:
    """As the reference reads it."""
    if wire.dtype == torch.bfloat16:
        return wire.view(torch.int16).numpy().view(np.uint16)
    return wire.numpy()


def expected_bytes(name: str, wire: torch.Tensor) -> np.ndarray:
    return reference.encode(codec_of(name).layout, array_of(wire))


def expected_values(name: str, wire: torch.Tensor) -> F32:
    kind = array_of(wire).dtype
    packed = expected_bytes(name, wire)
    return reference.decode(codec_of(name).layout, packed, len(wire), kind)


def expected_look(values: F32, dtype: torch.dtype) -> np.ndarray:
    """The bits of values rounded to the forward's dtype."""
    if dtype == torch.float32:
        return values.view(np.uint32)
    if dtype == torch.bfloat16:
        return round_bf16(values)
    with np.errstate(over="ignore"):
        return canonical(values).astype(np.float16).view(np.uint16)


def packed(codec: Codec, wire: torch.Tensor, filled: int = 0xA5) -> tuple[torch.Tensor, int]:
    """A buffer with 64 bytes to spare, and how many of its bytes were used."""
    room = codec.capacity(len(wire), wire.dtype) + 64
    out = torch.full((room,), filled, dtype=torch.uint8)
    return out, codec.encode(wire, out)


def raw(values: torch.Tensor) -> np.ndarray:
    """The bits, those of NaN too."""
    return values.view({2: torch.int16, 4: torch.int32}[values.itemsize]).numpy()
