"""A perturbed copy from packed bytes: what they mean, moved, rounded once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.spans import DIRECTIONS, bits, chunks_of, draws, expected_copy, expected_noise, span_of

from codec.wires import CODECS, TABLE, expected_values, packed, wire_of
from zo_offload import ops
from zo_offload.codec import codec_of
from zo_offload.ops import Draw, StepUpdate

AHEAD = [StepUpdate(0.999, (Draw(5, 4, 0, 0.1), Draw(5, 4, 1, -7.0))), StepUpdate(1.0, ())]
SHAPES = [(300,), (20, 40), (1500,), (7,)]
INDICES, SCALES = [9, 2, 1000, 5], [1.0, 0.37, 17.25, 1.0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [row for row in TABLE if row[0] != "identity"],
    ids=lambda x: str(x).split(".")[-1],
)
@settings(max_examples=3)
@given(
    kind=st.sampled_from(("normal", "awkward", "magnitudes")),
    direction=st.sampled_from(DIRECTIONS),
    draw=draws,
    dither=st.booleans(),
    chunk=st.sampled_from((640, 1 << 20)),
)
def test_equals_the_reference(name: str, dtype, kind, direction, draw: Draw, dither, chunk):
    dither = dither and dtype == torch.bfloat16
    span = span_of(SHAPES, INDICES, SCALES, dtype, dither, codec=name)
    wire = wire_of(kind, dtype, span.elements, 5)
    source, used = packed(codec_of(name), wire)
    assert used <= span.packed_bytes
    with np.errstate(over="ignore", invalid="ignore"):
        value = expected_values(name, wire) + expected_noise(span, direction, draw)
        expected = bits(expected_copy(span, value, draw))
    out = torch.full_like(wire, float("nan"))
    with chunks_of(chunk):
        ops.perturb(span, source[:used], out, direction, draw)
    np.testing.assert_array_equal(bits(out), expected)
    part = torch.full_like(wire[:1024], float("nan"))
    ops.perturb(span, source, part, direction, draw, first=640, count=1024)
    np.testing.assert_array_equal(bits(part), expected[640:1664])


@pytest.mark.parametrize("name", [name for name in CODECS if name != "identity"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_takes_the_steps_that_it_lacks(name: str, direction: str):
    packed_span = span_of(SHAPES, INDICES, SCALES, torch.bfloat16, codec=name)
    wire = wire_of("normal", torch.bfloat16, packed_span.elements, 5)
    source, _ = packed(codec_of(name), wire)
    out, draw = torch.empty_like(wire), Draw(5, 9, 0, 1e-3)
    ops.perturb(packed_span, source, out, direction, draw, ahead=AHEAD)

    wide = span_of(SHAPES, INDICES, SCALES)  # fp32, of what the bytes mean
    meant = torch.from_numpy(expected_values(name, wire))
    unrounded = torch.empty_like(meant)
    ops.perturb(wide, meant, unrounded, direction, draw, ahead=AHEAD)
    expected = expected_copy(packed_span, unrounded.numpy(), draw)
    np.testing.assert_array_equal(bits(out), bits(expected))


def test_masters_are_updated_beside_a_packed_wire_as_beside_any():
    plain = span_of(SHAPES, dtype=torch.bfloat16)
    coded = span_of(SHAPES, dtype=torch.bfloat16, codec="int8")
    assert (coded.wire_bytes, coded.rest_bytes) == (plain.wire_bytes, plain.rest_bytes)
    found = []
    for span in (plain, coded):
        wire = wire_of("normal", torch.bfloat16, span.elements, 0)
        rest = torch.zeros(span.elements, dtype=torch.int16)
        ops.update(span, wire, rest, "rademacher", [StepUpdate(1.0, (Draw(1, 2, 0, 1e-3),))])
        found.append((wire, rest))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
