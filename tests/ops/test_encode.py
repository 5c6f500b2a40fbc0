"""Values as a master holds them: any bits, any length and address, in every format."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ops.spans import MASTERS, bits, exact, placed, span_of, threads
from ops.test_planes import SWEEP
from zo_offload import ops
from zo_offload.ops import Span, reference
from zo_offload.ops.span import REST_DTYPES

WITHOUT_MASTER = {torch.float32: "fp32", torch.bfloat16: "bf16_sr", torch.float16: "fp16"}
# Above, at and below the ties of every format, and where a carry reaches the exponent or infinity.
TIES = [
    sign | exponent << 23 | mantissa
    for sign in (0, 1 << 31)
    for exponent in (0, 1, 102, 103, 112, 113, 127, 142, 143, 254, 255)
    for mantissa in (0, 0x7F, 0x80, 0x81, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    for mantissa in (mantissa, 0x7FFFFF - mantissa)
]

raw_values = st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(TIES), min_size=1, max_size=300)


def of_bits(raw: list[int] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(raw, np.uint32).view(np.float32))


def stored(span: Span, values: torch.Tensor, offset: int = 0) -> list[np.ndarray]:
    wire = placed(torch.zeros(len(values), dtype=span.dtype), offset)
    kind = REST_DTYPES[span.format]
    rest = placed(torch.zeros(len(values) if kind else 0, dtype=kind or torch.uint8), offset)
    ops.store_master(span, placed(values, offset), wire, rest)
    return [exact(wire)] + ([exact(rest)] if kind else [])


def expected(values: torch.Tensor, layout: str) -> list[np.ndarray]:
    return [exact(part) for part in reference.encode(values.numpy(), layout) if part is not None]


def assert_same(found: list[np.ndarray], right: list[np.ndarray]) -> None:
    for mine, theirs in zip(found, right, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("layout", MASTERS)
@settings(max_examples=50)
@example(raw=list(SWEEP), offset=0)
@example(raw=TIES, offset=1)
@given(raw=raw_values, offset=st.integers(0, 9))
def test_a_master_equals_the_reference(layout: str, raw: list[int], offset: int):
    dtype, master = MASTERS[layout]
    values = of_bits(raw)
    found = stored(span_of([(len(raw),)], dtype=dtype, master=master), values, offset)
    assert_same(found, expected(values, layout))
    np.testing.assert_array_equal(exact(values), np.array(raw, np.uint32))  # only read


@pytest.mark.parametrize("dtype", WITHOUT_MASTER, ids=str)
@settings(max_examples=50)
@example(raw=TIES, offset=1)
@given(raw=raw_values, offset=st.integers(0, 9))
def test_a_wire_without_master_equals_the_reference(
    dtype: torch.dtype, raw: list[int], offset: int
):
    values = of_bits(raw)
    wire = placed(torch.zeros(len(raw), dtype=dtype), offset)
    ops.encode(dtype, placed(values, offset), wire)
    assert_same([exact(wire)], expected(values, WITHOUT_MASTER[dtype])[:1])


@pytest.mark.parametrize("layout", MASTERS)
@pytest.mark.parametrize("count", [(1 << 16) - 1, 3 * (1 << 16) + 77])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads(layout: str, count: int, num_threads: int):
    dtype, master = MASTERS[layout]
    values = torch.randint(-(2**31), 2**31, (count,)).int().view(torch.float32)
    span = span_of([(count,)], dtype=dtype, master=master)
    with threads(num_threads):
        assert_same(stored(span, values, 3), expected(values, layout))


@pytest.mark.parametrize("layout", MASTERS)
def test_what_is_loaded_can_be_stored_again(layout: str):
    dtype, master = MASTERS[layout]
    span = span_of([(len(SWEEP),)], dtype=dtype, master=master)
    kind = REST_DTYPES[layout]
    wire = torch.zeros(len(SWEEP), dtype=dtype)
    rest = torch.zeros(len(SWEEP) if kind else 0, dtype=kind or torch.uint8)
    ops.store_master(span, of_bits(SWEEP), wire, rest)
    loaded = ops.load_master(span, wire, rest)
    assert_same(stored(span, loaded), [exact(wire)] + ([exact(rest)] if kind else []))


def test_nothing_is_nothing():
    for dtype, master in MASTERS.values():
        span = span_of([(8,)], dtype=dtype, master=master)
        assert all(len(part) == 0 for part in stored(span, torch.zeros(0)))


def test_values_that_are_not_contiguous():
    values = torch.arange(20.0)[::2]
    wire = torch.zeros(10, dtype=torch.bfloat16)
    ops.encode(torch.bfloat16, values, wire)
    assert wire.tolist() == values.tolist()
    ops.store_master(span_of([(10,)]), values, into := torch.zeros(10), torch.zeros(0))
    np.testing.assert_array_equal(bits(into), bits(values))
