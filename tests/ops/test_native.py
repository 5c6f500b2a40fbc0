"""What is particular to the native kernels: threads, alignment, rounding flags, refusals.

Their bits are compared with the reference's by the other tests of this folder, which run once for
each instruction set.
"""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.conftest import IMPLEMENTATIONS
from ops.spans import (
    span_of,
)
from zo_offload.errors import KernelError
from zo_offload.ops import Draw, StepUpdate, kernels, native, reference
from zo_offload.ops.native import Native

UPDATE = StepUpdate(1.0, (Draw(2**63 + 5, 3, 0, 0.1),))
AWKWARD = StepUpdate(0.9999, (Draw(5, 4, 0, 0.1), Draw(5, 4, 1, -3e-45), Draw(5, 4, 2, 7.0)))
PAIR = (Draw(5, 9, 0, 1e-3), Draw(5, 9, 0, -1e-3))


NATIVE = [each for each in IMPLEMENTATIONS if each != kernels.TORCH] or [
    pytest.param("none", marks=pytest.mark.skip(reason="the native kernels are not built"))
]


@pytest.fixture(scope="module", autouse=True)
def implementation() -> None:
    """Each test names the kernel it is about."""


@pytest.fixture(scope="module", params=NATIVE)
def kernel(request: pytest.FixtureRequest) -> Native:
    return Native(request.param)


def test_rows_outside_the_table_are_refused(kernel: Native):
    span = span_of([(50, 8)])
    wire = torch.zeros(span.elements)
    for row in (-1, 50):
        with pytest.raises(IndexError, match="outside its 50"):
            kernel.perturb_rows(
                span, span.segments[0], wire, torch.tensor([0, row]), "gaussian", PAIR[0]
            )


def test_no_rows(kernel: Native):
    span = span_of([(50, 8)])
    rows = torch.zeros(0, dtype=torch.int64)
    found = kernel.perturb_rows(
        span, span.segments[0], torch.zeros(span.elements), rows, "rademacher", PAIR[0]
    )
    assert found.shape == (0, 8)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 100_000, 1 << 18])
def test_a_copy_is_one(kernel: Native, length: int):
    source = torch.arange(length + 1).to(torch.uint8)[1:]
    out = torch.zeros(length, dtype=torch.uint8)
    kernel.copy(out, source)
    assert torch.equal(out, source)


@given(data=st.binary(max_size=4000), first=st.integers(0, 2**40), cut=st.integers(0, 1000))
def test_digests_add_up(kernel: Native, data: bytes, first: int, cut: int):
    words = torch.frombuffer(bytearray(data + bytes(4)), dtype=torch.uint8)[: len(data) // 4 * 4]
    words = words.clone().view(torch.int32)
    whole = kernel.digest(words, first)
    cut = min(cut, len(words))
    parts = kernel.digest(words[:cut], first) + kernel.digest(words[cut:], first + cut)
    assert whole == parts % 2**64
    assert whole == reference.digest(words.numpy().view(np.uint32), first)


def test_a_job_that_is_not_sound_is_refused(kernel: Native):
    span = span_of([(256,)])
    wire = torch.zeros(span.elements)
    for first, count in ((1, 128), (0, 100), (128, 256), (0, 384)):
        with pytest.raises(KernelError, match="not sound"):
            kernel.perturb(
                span, wire, torch.empty(count), "rademacher", PAIR[0], first=first, count=count
            )


def test_values_without_the_rest_they_need_are_refused(kernel: Native):
    values, wire = torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16)
    for layout in ("planes", "bf16+8"):
        with pytest.raises(KernelError, match="not sound"):
            kernel._encode(layout, values, wire, None)


def test_the_structures_are_those_of_the_header():
    sizes = {
        native._Draw: 24,
        native._Step: 32,
        native._Point: 32,
        native._Job: 128,
        native._Pack: 88,
        native._Rows: 104,
        native._Values: 40,
    }
    for structure, size in sizes.items():
        assert ctypes.sizeof(structure) == size
