"""The Triton kernels give the reference's bits: interpreted on a CPU, compiled on a GPU."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.far import check_rows, check_stretch, check_words, far_rows, far_spans, uint32
from ops.jobs import Circumstances, assert_same, done, expected, jobs, stretches
from ops.spans import (
    DIRECTIONS,
    DTYPES,
    MASTERS,
    draws,
    exact,
    expected_rows,
    random_master,
    span_of,
)
from ops.test_philox import KNOWN_ANSWERS, hexadecimal
from zo_offload.errors import KernelError
from zo_offload.ops import Draw, kernels

pytest.importorskip("triton", reason="triton is not installed")
# Interpreted, numbers are NumPy's, whose products of integers and casts of infinities speak up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAW = Draw(5, 9, 0, 1e-3)
PLAIN = Circumstances(offset=3, chunk=1 << 20, flushes=False, streams=False)
directions = st.sampled_from(DIRECTIONS)


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


def test_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch):
    from zo_offload.ops.triton import TritonKernels

    monkeypatch.setitem(sys.modules, "triton", None)
    words = "^triton kernels: triton is not installed; pip install triton$"
    with pytest.raises(KernelError, match=words):
        TritonKernels()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", MASTERS)
@settings(max_examples=4)
@given(data=st.data(), offset=st.integers(0, 70))
def test_any_job(kernel, layout: str, direction: str, data: st.DataObject, offset: int):
    job = replace(data.draw(jobs(layout)), direction=direction)
    found = done(kernel, job, offset, data.draw(stretches(job.span)), DEVICE)
    assert_same(found, expected(job))


@settings(max_examples=12)
@given(where=far_spans(), weights=uint32, direction=directions, draw=draws)
def test_any_stretch(kernel, where, weights: int, direction: str, draw: Draw):
    with kernels.using(kernels.TRITON):
        check_stretch(where, weights, direction, draw, PLAIN, DEVICE)


@settings(max_examples=12)
@given(where=far_rows(), weights=uint32, direction=directions, draw=draws)
def test_any_rows(kernel, where, weights: int, direction: str, draw: Draw):
    with kernels.using(kernels.TRITON):
        check_rows(where, weights, direction, draw, PLAIN, DEVICE)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_the_published_words(kernel, name: str):
    counter, key, words = map(hexadecimal, KNOWN_ANSWERS[name])
    with kernels.using(kernels.TRITON):
        check_words(counter, key[0] | key[1] << 32, words, DEVICE)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 128, 2000])
def test_rows_equal_the_reference(kernel, dtype: torch.dtype, direction: str, width: int):
    height, draw = 50, Draw(2**64 - 1, 3, 1, -1e-3)
    span = span_of([(77,), (height, width)], [4, 2**32 - 1], [1.0, 0.37], dtype)
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
    found = kernel.perturb_rows(span, span.segments[0], wire, rows, "rademacher", DRAW)
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
