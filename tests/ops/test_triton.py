"""The Triton kernels give the reference's bits: interpreted on a CPU, compiled on a GPU."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.spans import (
    DIRECTIONS,
    DTYPES,
    MASTERS,
    bits,
    exact,
    expected_rows,
    random_master,
    span_of,
    spans,
)
from zo_offload.ops import Draw, Point, Span, StepUpdate, torch_ops
from zo_offload.ops.span import REST_DTYPES

pytest.importorskip("triton", reason="triton is not installed")
# Interpreted, numbers are NumPy's, whose products of integers and casts of infinities speak up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UPDATE = StepUpdate(1.0, (Draw(2**63 + 5, 3, 0, 0.1),), 7, 3)
AWKWARD = StepUpdate(0.9999, (Draw(5, 4, 0, 0.1), Draw(5, 4, 1, -3e-45), Draw(5, 4, 2, 7.0)), 7, 4)
PAIR = (Draw(5, 9, 0, 1e-3), Draw(5, 9, 0, -1e-3))
NO_DRAW = StepUpdate(1.0, (Draw(5, 4, 0, 0.0),), 7, 5)


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


def everything(
    serving, span: Span, direction: str, steps, ahead, draws, device: str
) -> list[np.ndarray]:
    """Bits of wire, rest and perturbed copies after one call."""
    kind = REST_DTYPES[span.format]
    wire = torch.zeros(span.elements, dtype=span.dtype)
    rest = torch.zeros(span.elements if kind else 0, dtype=kind or torch.uint8)
    torch_ops.store_master(span, random_master(span.elements), wire, rest)
    wire, rest = wire.to(device), rest.to(device)
    outs = [torch.zeros_like(wire) for _ in draws]
    points = [Point(out, draw) for out, draw in zip(outs, draws, strict=True)]
    serving.update(span, wire, rest, direction, steps, points, ahead)
    found = [tensor.cpu() for tensor in (wire, rest, *outs)]
    return [bits(t) if t.is_floating_point() else t.numpy() for t in found]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("master_kind", MASTERS)
@settings(max_examples=4)
@given(
    data=st.data(),
    steps=st.sampled_from(([], [UPDATE], [AWKWARD, NO_DRAW, StepUpdate(0.5, (), 7, 6), UPDATE])),
    ahead=st.sampled_from(([], [AWKWARD, UPDATE])),
    draws=st.sampled_from((PAIR[:1], PAIR)),
    dither=st.booleans(),
)
def test_equals_torch(
    kernel, master_kind: str, direction: str, data, steps, ahead, draws, dither: bool
):
    dtype, master = MASTERS[master_kind]
    span = data.draw(spans(dtype, dither and dtype == torch.bfloat16, master))
    expected = everything(torch_ops, span, direction, steps, ahead, draws, "cpu")
    found = everything(kernel, span, direction, steps, ahead, draws, DEVICE)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_stretch_can_be_made_alone(kernel, direction: str):
    span = span_of([(300,), (20, 40)], [7, 3], [1.0, 0.37])
    wire = random_master(span.elements).to(DEVICE)
    whole, part = torch.zeros_like(wire), torch.zeros(512, device=DEVICE)
    kernel.perturb(span, wire, whole, direction, PAIR[0])
    kernel.perturb(span, wire, part, direction, PAIR[0], first=256, count=512)
    np.testing.assert_array_equal(bits(part.cpu()), bits(whole.cpu()[256:768]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 100, 128, 129, 256, 2000])
def test_rows_equal_the_reference(kernel, dtype: torch.dtype, direction: str, width: int):
    height, draw = 50, Draw(2**64 - 1, 3, 1, -1e-3)
    span = span_of([(77,), (height, width)], [4, 2], [1.0, 0.37], dtype)
    wire = random_master(span.elements, seed=width).to(dtype)
    rows = torch.tensor([0, height - 1, 7, 7, 31])
    segment, before = span.segments[1], wire.clone()
    given = wire.to(DEVICE), rows.to(DEVICE)
    found = kernel.perturb_rows(span, segment, *given, direction, draw).cpu()
    right = expected_rows(span, segment, wire, rows, direction, draw)
    assert found.dtype == dtype
    np.testing.assert_array_equal(exact(found), right)
    np.testing.assert_array_equal(exact(given[0].cpu()), exact(before))  # only read


def test_no_rows(kernel):
    span = span_of([(50, 8)])
    wire, rows = torch.zeros(span.elements, device=DEVICE), torch.zeros(0, device=DEVICE).long()
    found = kernel.perturb_rows(span, span.segments[0], wire, rows, "rademacher", PAIR[0])
    assert found.shape == (0, 8)


def test_it_compiles_and_nothing_is_fused_or_flushed(tmp_path):
    names = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compiled.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**names, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assembly = json.loads(done.stdout)
    assert len(assembly) == 8
    for name, text in assembly.items():
        assert "add" in text, name
        assert not re.findall(r"\bfma\S*|\S*\.ftz\S*", text), name


def test_what_it_serves(kernel):
    here = torch.zeros(8, device=DEVICE)
    assert kernel.serves(here)
    assert not kernel.serves(here[::2])
    assert os.environ.get("TRITON_INTERPRET") == "1" or not kernel.serves(torch.zeros(8))
