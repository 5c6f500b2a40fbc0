"""The Triton kernels read packed wires: interpreted on a CPU, compiled on a GPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ops.spans import bits, span_of

from codec.wires import packed, wire_of
from zo_offload.codec import codec_of
from zo_offload.errors import CodecError
from zo_offload.ops import Draw, StepUpdate, torch_ops

pytest.importorskip("triton", reason="triton is not installed")
# Interpreted, numbers are NumPy's, whose products and casts of infinities speak up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AHEAD = [StepUpdate(0.999, (Draw(5, 4, 0, 0.1),))]


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """Each test is about these kernels."""


@pytest.fixture(scope="module")
def kernel() -> Iterator:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        from zo_offload.ops.triton import TritonKernels

        yield TritonKernels()


ROWS = [
    *((name, torch.bfloat16, "rademacher") for name in ("fp8_e4m3", "int8:64", "int4", "nf4:64")),
    ("lossless12", torch.bfloat16, "rademacher"),
    ("bf16", torch.float32, "rademacher"),
    ("fp16", torch.float16, "rademacher"),
    ("nf4", torch.float32, "gaussian"),
]


@pytest.mark.parametrize(("name", "dtype", "direction"), ROWS)
def test_equals_torch(kernel, name: str, dtype: torch.dtype, direction: str):
    span = span_of([(300,), (20, 20)], [7, 3], [1.0, 0.37], dtype, codec=name)
    wire = wire_of("awkward", dtype, span.elements, 3)
    source = packed(codec_of(name), wire)[0]
    expected, found = torch.zeros_like(wire), torch.zeros_like(wire[:640], device=DEVICE)
    draw = Draw(5, 9, 0, 1e-3)
    torch_ops.perturb(span, source, expected, direction, draw, ahead=AHEAD)
    kernel.perturb(span, source.to(DEVICE), found, direction, draw, 128, 640, AHEAD)
    np.testing.assert_array_equal(bits(found.cpu()), bits(expected[128:768]))


@pytest.mark.parametrize("name", ["bf16", "int8", "nf4", "lossless12"])
def test_too_few_bytes_are_refused(kernel, name: str):
    span = span_of([(1024,)], dtype=torch.bfloat16, codec=name)
    short = torch.zeros(63, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(CodecError, match="encode the weights again"):
        kernel.perturb(
            span, short, torch.zeros(1024, dtype=torch.bfloat16), "rademacher", Draw(1, 1, 0, 1.0)
        )
