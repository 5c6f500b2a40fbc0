"""CRC-32C: published answers, and one value however it is cut, whoever computes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_offload.ops import crc32c
from zo_offload.ops.crc import combined, crc32c_numpy

# RFC 3720, B.4, and its read command; the check value of the catalogues.
READ_COMMAND = bytes.fromhex(
    "01c00000000000000000000000000000140000000000040000000014000000182800000000000000"
    "0200000000000000"
)
KNOWN = {
    b"": 0,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    READ_COMMAND: 0xD9963A56,
}
LENGTHS = st.one_of(
    st.integers(0, 200),
    # around words, rows of either width, thirds of a stretch and parts of a thread
    st.builds(
        lambda base, off: max(0, base + off),
        st.sampled_from([3072, 4096, 8192, 1 << 16, 1 << 20, 3 << 19]),
        st.integers(-9, 9),
    ),
)


def bytes_of(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)


def by_bits(data: bytes) -> int:
    """The definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("data", KNOWN, ids=lambda data: data[:8].hex())
def test_published_answers(data: bytes):
    assert crc32c(torch.tensor(list(data), dtype=torch.uint8)) == KNOWN[data]


@given(length=st.integers(0, 6000), seed=st.integers(0, 9))
@settings(max_examples=15)
def test_the_definition(length: int, seed: int):
    data = bytes_of(length, seed)
    assert crc32c(data) == by_bits(data.numpy().tobytes())


@given(length=LENGTHS, initial=st.integers(0, 2**32 - 1), threads=st.sampled_from([1, 2]))
@settings(max_examples=30)
def test_equal_wherever_it_is_computed(length: int, initial: int, threads: int):
    data = bytes_of(length, 0)
    assert crc32c(data, initial, threads) == crc32c_numpy(data.numpy(), initial)


@given(length=LENGTHS, cut=st.floats(0, 1), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_of_a_whole_from_its_parts(length: int, cut: float, seed: int):
    data, first = bytes_of(length, seed), int(length * cut)
    whole, parts = crc32c(data), (crc32c(data[:first]), crc32c(data[first:]))
    assert crc32c(data[first:], parts[0]) == whole
    assert combined(*parts, length - first) == whole


def test_any_dtype_counts_its_bytes():
    values = torch.arange(1000, dtype=torch.float32)
    assert crc32c(values) == crc32c(values.view(torch.uint8))
