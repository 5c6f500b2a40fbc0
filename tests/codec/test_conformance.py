"""Every codec through one table: bytes, values, stretches, sizes; in every implementation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.wires import (
    CODECS,
    TABLE,
    array_of,
    expected_bytes,
    expected_look,
    expected_values,
    packed,
    raw,
    wire_of,
    wires,
)
from zo_offload.codec import codec_of
from zo_offload.ops import torch_codecs

ROWS = pytest.mark.parametrize(("name", "dtype"), TABLE, ids=lambda x: str(x).split(".")[-1])
PATTERNS = {2: np.uint16, 4: np.uint32}


@ROWS
@settings(max_examples=6)
@given(data=st.data())
def test_bytes_and_values_are_the_references(name: str, dtype: torch.dtype, data):
    wire, codec = data.draw(wires(dtype)), codec_of(name)
    before = raw(wire).copy()
    out, used = packed(codec, wire)
    expected = expected_bytes(name, wire)
    assert used == len(expected) <= codec.capacity(len(wire), dtype)
    assert used % 64 == 0
    np.testing.assert_array_equal(out[:used].numpy(), expected)
    assert set(out[codec.capacity(len(wire), dtype) :].tolist()) == {0xA5}
    np.testing.assert_array_equal(raw(wire), before)

    values = expected_values(name, wire)
    found = codec.decode(out[:used], len(wire), dtype)
    np.testing.assert_array_equal(raw(found).view(np.uint32), values.view(np.uint32))
    look = codec.look(out, len(wire), dtype)
    bits = raw(look).view(PATTERNS[dtype.itemsize])
    np.testing.assert_array_equal(bits, expected_look(values, dtype))

    blocks = len(wire) // 128
    first = data.draw(st.integers(0, blocks - 1))
    count = data.draw(st.integers(1, blocks - first))
    part = codec.decode(out, len(wire), dtype, 128 * first, 128 * count)
    np.testing.assert_array_equal(raw(part), raw(found)[128 * first :][: 128 * count])


@pytest.mark.parametrize("name", CODECS)
def test_chunks_and_threads_meet(name: str, monkeypatch):
    wire = wire_of("awkward", torch.bfloat16, 128 * 1111, 3)
    monkeypatch.setitem(torch_codecs.CHUNK_ELEMENTS, "cpu", 128 * 100)
    out, used = packed(codec_of(name), wire)
    np.testing.assert_array_equal(out[:used].numpy(), expected_bytes(name, wire))
    found = codec_of(name).decode(out, len(wire), wire.dtype, 128 * 9)
    np.testing.assert_array_equal(raw(found), expected_values(name, wire)[128 * 9 :].view(np.int32))


@ROWS
def test_what_was_in_the_buffer_and_what_stands_beside_change_nothing(name: str, dtype):
    codec = codec_of(name)
    wire, more = wire_of("normal", dtype, 1280, 1), wire_of("magnitudes", dtype, 640, 2)
    (first, used), (second, _) = packed(codec, wire, 0), packed(codec, wire, 0xFF)
    assert torch.equal(first[:used], second[:used])
    both, _ = packed(codec, torch.cat([wire, more]))
    alone = codec.decode(first, len(wire), dtype)
    beside = codec.decode(both, len(wire) + len(more), dtype, 0, len(wire))
    np.testing.assert_array_equal(raw(alone), raw(beside))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("identity", 2.0),
        ("bf16", 2.0),
        ("fp16", 2.0),
        ("lossless12", 1.51),
        ("fp8_e4m3", 1.04),
        ("int8", 1.04),
        ("int4", 0.53),
        ("nf4", 0.53),
    ],
)
def test_bytes_a_parameter(name: str, most: float):
    wire = wire_of("normal", torch.bfloat16, 1 << 17, 0)
    _, used = packed(codec_of(name), wire)
    assert used / len(wire) <= most
    assert codec_of(name).shrinks(torch.bfloat16) == (used < wire.nbytes)


@pytest.mark.parametrize("name", ["identity", "lossless12"])
def test_exact_codecs_keep_every_pattern(name: str):
    patterns = np.random.default_rng(0).permutation(np.arange(1 << 16, dtype=np.uint16))
    wire = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
    out, _ = packed(codec_of(name), wire)
    found = codec_of(name).decode(out, len(wire), wire.dtype)
    np.testing.assert_array_equal(raw(found).view(np.uint32) >> 16, array_of(wire))
