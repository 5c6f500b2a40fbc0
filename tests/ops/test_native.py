"""What is particular to the native kernels: threads, alignment, rounding flags, refusals.

Their bits are compared with the reference's by the other tests of this folder, which run once for
each instruction set.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.conftest import IMPLEMENTATIONS
from ops.spans import (
    DIRECTIONS,
    DTYPES,
    MASTERS,
    bits,
    random_master,
    span_of,
    spans,
)
from zo_offload.errors import KernelError
from zo_offload.ops import Draw, Point, Segment, Span, StepUpdate, kernels, native, reference
from zo_offload.ops.native import Native
from zo_offload.ops.span import REST_DTYPES
from zo_offload.ops.torch_ops import store_master, update

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


def buffers(span: Span, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A master in ``(wire, rest)``, ``offset`` elements into their memory."""
    kind = REST_DTYPES[span.format]
    wire = torch.zeros(span.elements + offset, dtype=span.dtype)[offset:]
    resting = span.elements if kind is not None else 0
    rest = torch.zeros(resting + offset, dtype=kind or torch.uint8)[offset:]
    store_master(span, random_master(span.elements), wire, rest)
    return wire, rest


def everything(
    serving, span: Span, direction: str, steps: list[StepUpdate], draws: tuple[Draw, ...], offset=0
) -> list[np.ndarray]:
    """Bits of wire, rest and perturbed copies after one fused call."""
    wire, rest = buffers(span, offset)
    outs = [torch.zeros(span.elements + offset, dtype=span.dtype)[offset:] for _ in draws]
    points = [Point(out, draw) for out, draw in zip(outs, draws, strict=True)]
    serving.update(span, wire, rest, direction, steps, points)
    return [bits(t) if t.is_floating_point() else t.numpy() for t in (wire, rest, *outs)]


class Torch:
    update = staticmethod(update)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("master_kind", MASTERS)
@settings(max_examples=40)
@given(
    data=st.data(),
    direction=st.sampled_from(DIRECTIONS),
    steps=st.sampled_from(([], [UPDATE], [AWKWARD], [UPDATE, AWKWARD, StepUpdate(0.5, ())])),
    draws=st.sampled_from((PAIR[:1], PAIR, PAIR[::-1], (PAIR[0], PAIR[0]), (PAIR[0], *PAIR))),
    dither=st.booleans(),
)
def test_fused_equals_one_after_another(
    kernel: Native, master_kind: str, data, direction: str, steps, draws, dither: bool
):
    dtype, kept = MASTERS[master_kind]
    span = data.draw(spans(dtype, dither and dtype == torch.bfloat16, kept))
    expected = everything(Torch, span, direction, steps, draws)
    assert_same(everything(kernel, span, direction, steps, draws), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [1, 3, 17])
def test_memory_may_begin_anywhere(kernel: Native, dtype, direction: str, offset: int):
    span = span_of([(40, 50), (300,)], dtype=dtype, scales=[0.37, 17.25])
    expected = everything(Torch, span, direction, [UPDATE], PAIR)
    assert_same(everything(kernel, span, direction, [UPDATE], PAIR, offset), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads(kernel: Native, direction: str, num_threads: int):
    span = span_of([(700, 300), (300,), (2000, 200)], dtype=torch.bfloat16)
    expected = everything(Torch, span, direction, [UPDATE], PAIR)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        assert_same(everything(kernel, span, direction, [UPDATE], PAIR), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_threads_of_its_own_where_there_is_no_openmp(kernel: Native, direction: str):
    span = span_of([(700, 300)], dtype=torch.bfloat16)
    expected = everything(kernel, span, direction, [UPDATE], PAIR)
    library = native.library()
    try:
        library.zo_use_openmp(None)
        assert_same(everything(kernel, span, direction, [UPDATE], PAIR), expected)
    finally:
        native.library.cache_clear()
        native.library()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [0, 1])
def test_around_the_caches(kernel: Native, monkeypatch, dtype, direction: str, offset: int):
    span = span_of([(400, 300)], dtype=dtype)
    expected = everything(Torch, span, direction, [UPDATE], PAIR, offset)
    monkeypatch.setattr(native, "MOST_CACHED", 0)
    assert_same(everything(kernel, span, direction, [UPDATE], PAIR, offset), expected)


@contextmanager
def flushing_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_callers_flush_to_zero_changes_nothing(kernel: Native, dtype: torch.dtype):
    span = span_of([(700,)], dtype=dtype)
    tiny = (Draw(1, 2, 3, 1e-40), Draw(1, 2, 3, -1e-40))
    step = StepUpdate(1.0, (Draw(1, 2, 0, 3e-41),))
    expected = everything(Torch, span, "rademacher", [step], tiny)
    assert any(array[9:].any() for array in expected)
    wire, rest = buffers(span)
    outs = [torch.zeros_like(wire) for _ in tiny]
    points = [Point(out, draw) for out, draw in zip(outs, tiny, strict=True)]
    with flushing_denormals():
        kernel.update(span, wire, rest, "rademacher", [step], points)
        assert float(torch.tensor(1e-40) * 1) == 0.0  # it is on again for the caller
    found = [bits(t) if t.is_floating_point() else t.numpy() for t in (wire, rest, *outs)]
    assert_same(found, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("first", [2**31 - 256, 2**32 - 128, 2**33 + 5 * 128])
def test_elements_past_four_billion(kernel: Native, direction: str, first: int):
    count, draw = 1024, Draw(2**63 + 9, 5, 1, 0.25)
    span = Span(torch.float32, (Segment("huge", 7, (2**34,), 0),), 0, 0)
    near, out = torch.zeros(count), torch.empty(count)

    class Far:
        """Begins where element 0 would be, were there so much memory."""

        def data_ptr(self) -> int:
            return (near.data_ptr() - 4 * first) % 2**64

        def numel(self) -> int:
            return span.elements

    kernel.perturb(span, cast("torch.Tensor", Far()), out, direction, draw, first, count)
    expected = reference.DIRECTIONS[direction](draw.seed, 5, 1, 7, first, count, 0.25)
    np.testing.assert_array_equal(bits(out), bits(expected))


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
    sizes = {native._Draw: 24, native._Step: 32, native._Point: 32, native._Job: 112}
    sizes |= {native._Rows: 96, native._Values: 40}
    for structure, size in sizes.items():
        assert ctypes.sizeof(structure) == size
