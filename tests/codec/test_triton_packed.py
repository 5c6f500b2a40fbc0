"""The Triton kernels read packed wires: interpreted on a CPU, compiled on a GPU."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from models.table import Plain, values
from ops.spans import bits, span_of

from codec.wires import KINDS, packed, wire_of
from zo_offload.codec import codec_of
from zo_offload.config import ZOConfig
from zo_offload.errors import CodecError
from zo_offload.ops import Draw, StepUpdate, refuse_damage, torch_codecs, torch_ops
from zo_offload.ops.layout import HEADER_BYTES
from zo_offload.ops.lossless12 import sections
from zo_offload.ops.triton import _damage
from zo_offload.step import Stepper

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


LOSSLESS = codec_of("lossless12")
ELEMENTS = 3 * 1024 + 256


def lossless_of(kind: str) -> torch.Tensor:
    return packed(LOSSLESS, wire_of(kind, torch.bfloat16, ELEMENTS, 3))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("first", "count"), [(0, ELEMENTS), (128, 1024), (896, 1280), (2944, 384), (3200, 128)]
)
def test_any_stretch_of_lossless12(kernel, kind, out_dtype, first: int, count: int):
    source = lossless_of(kind)
    expected = torch.zeros(count, dtype=out_dtype)
    found = torch.zeros(count, dtype=out_dtype, device=DEVICE)
    given = (ELEMENTS, torch.bfloat16)
    torch_codecs.unpack(LOSSLESS.layout, source, *given, expected, first)
    kernel.unpack(LOSSLESS.layout, source.to(DEVICE), *given, found, first)
    refuse_damage(found.device)
    np.testing.assert_array_equal(bits(found.cpu()), bits(expected))


DAMAGES = {  # byte, what it becomes
    "magic": (0, 0), "version": (4, 2), "mode": (5, 2), "raw": (5, 0), "top": (6, 13),
    "elements": (8, 1), "many elements": (15, 1), "escapes": (16, 255), "many escapes": (23, 1),
    "bytes": (24, 1), "many bytes": (31, 128), "first entry": (HEADER_BYTES, 1),
    "an entry": (HEADER_BYTES + 7, 200), "last entry": (HEADER_BYTES + 16, 255),
    "an escape more": (sections(ELEMENTS, 0).codes + 600, 255),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_when_it_is_asked_for(kernel, damage: str):
    """Of bytes that end where the device's memory may: nothing beyond them is read."""
    at, value = DAMAGES[damage]
    span = span_of([(ELEMENTS,)], dtype=torch.bfloat16, codec="lossless12")
    wire = wire_of("awkward", torch.bfloat16, ELEMENTS, 3)
    whole, used = packed(LOSSLESS, wire)
    source = whole[:used].clone()
    assert source[5] == 1  # packed, not raw
    out = torch.zeros(ELEMENTS, dtype=torch.bfloat16, device=DEVICE)
    draw = Draw(1, 2, 0, 1e-3)
    kernel.perturb(span, source.to(DEVICE), out, "rademacher", draw)
    refuse_damage(out.device)
    assert source[at] != value
    source[at] = value
    kernel.perturb(span, source.to(DEVICE), out, "rademacher", draw)
    with pytest.raises(CodecError, match=r"lossless12: damaged: .*encode the weights again"):
        refuse_damage(out.device)
    refuse_damage(out.device)  # once is enough


def test_a_step_on_damaged_bytes_is_not_taken():
    """What the kernels found is asked when the lanes are done, before a loss counts."""
    with closing(Stepper(Plain(), ZOConfig())) as stepper:
        batch = {"x": values(4, 8), "labels": torch.arange(4) % 2}
        before = {name: each.clone() for name, each in stepper.weights.masters()}
        _damage(torch.device("cpu")).fill_(1)
        with pytest.raises(CodecError, match="encode the weights again"):
            stepper.train_step([batch], lr=1e-3)
        assert stepper.step == 0
        after = dict(stepper.weights.masters())
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        stepper.train_step([batch], lr=1e-3)
