"""Packed codes times other scales than their own: fp32 ones, as training moves them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.wires import DTYPES, array_of, expected_look, packed, raw, wire_of
from zo_offload import ops
from zo_offload.codec import codec_of, groups
from zo_offload.ops import torch_codecs
from zo_offload.ops.layout import LARGEST
from zo_offload.ops.reference import canonical

NAMES = [f"{kind}{group}" for kind in LARGEST for group in ("", ":64")]
PATTERNS = {2: np.uint16, 4: np.uint32}


def any_scales(count: int, seed: int) -> np.ndarray:
    """Of usual size; some of any bits: negative, denormal, infinite, NaN."""
    random = np.random.default_rng(seed)
    usual = (0.01 * random.standard_normal(count)).astype(np.float32)
    bits = random.integers(0, 2**32, count, np.uint32).view(np.float32)
    return canonical(np.where(random.random(count) < 0.2, bits, usual))


def unpacked(
    name: str, source: torch.Tensor, elements: int, out: torch.Tensor, scales: np.ndarray,
    first: int = 0,
) -> np.ndarray:  # fmt: skip
    """The bits of a stretch."""
    layout = codec_of(name).layout
    ops.unpack(layout, source, elements, out.dtype, out, first, torch.from_numpy(scales))
    return raw(out).view(PATTERNS[out.itemsize])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=5)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_equals_the_reference(name: str, dtype: torch.dtype, data: st.DataObject, seed: int):
    blocks = data.draw(st.integers(1, 20))
    first = data.draw(st.integers(0, blocks - 1))
    count = data.draw(st.integers(1, blocks - first))
    wire, layout = wire_of("normal", dtype, 128 * blocks, seed), codec_of(name).layout
    source, used = packed(codec_of(name), wire)
    scales = any_scales(len(wire) // layout.group, seed)
    with np.errstate(all="ignore"):
        values = groups.decode(layout, source[:used].numpy(), len(wire), scales)
        expected = expected_look(values, dtype)
    part = slice(128 * first // layout.group, 128 * (first + count) // layout.group)
    out = torch.full((128 * count,), float("nan"), dtype=dtype)
    found = unpacked(name, source, len(wire), out, scales[part], 128 * first)
    np.testing.assert_array_equal(found, expected[128 * first :][: 128 * count])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["normal", "awkward", "magnitudes"])
def test_their_own_scales_give_the_bits_of_plain_decoding(name: str, kind: str):
    wire, codec = wire_of(kind, torch.bfloat16, 1280, 3), codec_of(name)
    source, _ = packed(codec, wire)
    own = ops.group_scales(codec.layout, source, 1280, 256, 1024)
    np.testing.assert_array_equal(
        own.numpy().view(np.uint32),
        groups.group_scales(codec.layout, source.numpy(), 1280)[
            256 // codec.layout.group : 1024 // codec.layout.group
        ].view(np.uint32),
    )
    plain = codec.look(source, 1280, wire.dtype, 256, 768)
    found = unpacked(name, source, 1280, torch.empty_like(plain), own.numpy(), 256)
    np.testing.assert_array_equal(found, array_of(plain))


@pytest.mark.parametrize("name", ["int4", "int8:64", "nf4"])
def test_chunks_and_threads_meet(name: str, monkeypatch: pytest.MonkeyPatch):
    elements, layout = 128 * 1111, codec_of(name).layout
    monkeypatch.setitem(torch_codecs.CHUNK_ELEMENTS, "cpu", 128 * 100)
    source, used = packed(codec_of(name), wire_of("normal", torch.bfloat16, elements, 3))
    scales = any_scales(elements // layout.group, 1)
    with np.errstate(all="ignore"):
        values = groups.decode(layout, source[:used].numpy(), elements, scales)
        expected = expected_look(values, torch.bfloat16)
    out = torch.empty(elements, dtype=torch.bfloat16)
    np.testing.assert_array_equal(unpacked(name, source, elements, out, scales), expected)


def test_scales_of_another_number_are_our_own_mistake():
    source, _ = packed(codec_of("int4"), torch.zeros(256))
    with pytest.raises(AssertionError):
        unpacked("int4", source, 256, torch.empty(256), np.ones(1, np.float32))
