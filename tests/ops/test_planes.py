"""Masters as two sixteen-bit planes: nothing is lost, and the upper one is the nearest bfloat16."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.spans import DTYPES, bits, random_master, span_of
from zo_offload import ops
from zo_offload.ops import reference

MANTISSAS = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x17FFF, 0x18000, 0x7FFFFF], np.uint32)
SWEEP = (np.arange(256, dtype=np.uint32)[:, None] << np.uint32(23) | MANTISSAS).reshape(-1)
SWEEP = np.concatenate([SWEEP, SWEEP | np.uint32(0x80000000)])  # every exponent, both signs
CANONICAL_NAN = 0x7FC00000
PLANES = span_of([(128,)], dtype=torch.bfloat16)

raw_bits = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


def canonical_bits(raw: np.ndarray) -> np.ndarray:
    nan = (raw & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(CANONICAL_NAN), raw)


def check_reference(raw: np.ndarray) -> None:
    joined = reference.join_planes(*reference.split_planes(raw.view(np.float32)))
    np.testing.assert_array_equal(joined.view(np.uint32), canonical_bits(raw))


def check_kernels(raw: np.ndarray) -> None:
    master = torch.from_numpy(raw.view(np.float32).copy())
    wire, rest = torch.empty(len(raw)).bfloat16(), torch.empty(len(raw), dtype=torch.int16)
    ops.store_master(PLANES, master, wire, rest)
    high, low = reference.split_planes(raw.view(np.float32))
    np.testing.assert_array_equal(wire.view(torch.int16).numpy().view(np.uint16), high)
    np.testing.assert_array_equal(rest.numpy(), low)
    joined = ops.load_master(PLANES, wire, rest).numpy().view(np.uint32)
    np.testing.assert_array_equal(joined, canonical_bits(raw))
    np.testing.assert_array_equal(master.numpy().view(np.uint32), raw)  # only read


@pytest.mark.parametrize("check", [check_reference, check_kernels])
@given(raw=raw_bits)
def test_any_bits_are_rebuilt(check, raw: list[int]):
    check(np.array(raw, np.uint32))


@pytest.mark.parametrize("check", [check_reference, check_kernels])
def test_every_exponent_is_rebuilt(check):
    check(SWEEP)


def test_named_values_are_rebuilt():
    named = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, 1.0]
    check_kernels(np.array(named, np.float32).view(np.uint32))


def test_the_upper_plane_is_the_nearest_bfloat16():
    finite = SWEEP[(SWEEP & np.uint32(0x7F800000)) < np.uint32(0x7F000000)].view(np.float32)
    high, _ = reference.split_planes(finite)
    nearest = (high.astype(np.uint32) << np.uint32(16)).view(np.float32)
    truncated = finite.view(np.uint32) & np.uint32(0xFFFF0000)
    neighbours = [(truncated + np.uint32(step)).view(np.float32) for step in (0, 0x10000)]
    error = np.abs(nearest.astype(np.float64) - finite)
    for neighbour in neighbours:
        other = np.abs(neighbour.astype(np.float64) - finite)
        assert (error <= other).all()
    ties = (finite.view(np.uint32) & np.uint32(0xFFFF)) == np.uint32(0x8000)
    assert ties.any()
    assert (np.abs(nearest[ties]) > np.abs(finite[ties])).all()  # away from zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masters_are_loaded_as_they_were_stored(dtype: torch.dtype):
    master = random_master(1000)
    wire = torch.empty(1000, dtype=dtype)
    rest = torch.empty(1000, dtype=torch.int16 if dtype == torch.bfloat16 else torch.float32)
    span = span_of([(1000,)], dtype=dtype)
    ops.store_master(span, master, wire, rest)
    np.testing.assert_array_equal(bits(ops.load_master(span, wire, rest)), bits(master))
    if dtype == torch.float16:
        np.testing.assert_array_equal(bits(wire), bits(master.half()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_master_is_a_copy(dtype: torch.dtype):
    wire = torch.ones(8, dtype=dtype)
    rest = torch.zeros(8, dtype=torch.int16 if dtype == torch.bfloat16 else torch.float32)
    ops.load_master(span_of([(1000,)], dtype=dtype), wire, rest).fill_(7.0)
    assert (wire == 1).all()
    assert (rest == 0).all()
