"""What a unit came with is laid out a part at a time, to the bits of one pass over all of it."""

import pytest
import torch
from temporaries import MostFp32

from zo_offload import resting
from zo_offload.ops import Segment, Span

NUMELS = (5 * 128 + 3, 128)
SPANS = {
    "planes": {},
    "bf16+8": {"master": "bf16+8"},
    "fp16": {"dtype": torch.float16},
    "frozen": {"trainable": False},
    "packed": {"trainable": False, "codec": "lossless12"},
}


def laid_out(span: Span, at_once: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Wire, rest and the most elements of fp32 temporaries."""
    generator = torch.Generator().manual_seed(0)
    values = {s.name: torch.randn(s.shape, generator=generator).bfloat16() for s in span.segments}
    wire, rest = (torch.zeros(n, dtype=torch.uint8) for n in (span.wire_bytes, span.rest_bytes))
    with pytest.MonkeyPatch.context() as patch, MostFp32() as seen:
        patch.setattr(resting, "AT_ONCE", at_once)
        resting.fill(span, values, wire, rest)
    return wire, rest, seen.most


@pytest.mark.parametrize("kind", SPANS)
def test_temporaries_are_of_a_part_and_bits_are_those_of_one_pass(kind: str):
    segments = Segment("a", 0, (NUMELS[0],), 0), Segment("b", 1, (NUMELS[1],), 6 * 128)
    options = {"dtype": torch.bfloat16, **SPANS[kind]}
    span = Span(segments=segments, wire_offset=0, rest_offset=0, **options)
    *whole, most = laid_out(span, 1 << 18)
    assert most >= NUMELS[0]
    *parts, most = laid_out(span, 128)
    assert most <= 2 * 128  # one part, and the one before
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert parts[0].any()


GIVEN = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((300, 48), (7, 10), (513, 130), (5, 3, 4))


def odd_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random ones, and some that codecs know: NaN of several kinds, infinite, tiny."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values.view(-1)[3], values.view(-1)[-1], values.view(-1)[5] = torch.nan, torch.inf, 1e-39
    values = values.to(dtype)
    if dtype == torch.bfloat16:
        values.view(torch.int16).view(-1)[7] = 0x7F81  # NaN with a payload
    return values.mT.contiguous().mT if len(shape) == 2 else values


@pytest.mark.parametrize("codec", ["nf4", "nf4:64", "int4", "int8:64", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_groups_are_packed_part_by_part_to_the_bits_of_the_whole(codec: str, dtype: torch.dtype):
    segments: list[Segment] = []
    for i, shape in enumerate(SHAPES):
        start = segments[-1].start + segments[-1].padded if segments else 0
        segments.append(Segment(f"p{i}", i, shape, start))
    span = Span(dtype, tuple(segments), 0, 0, trainable=False, codec=codec)
    whole, parts = (torch.zeros(span.packed_bytes, dtype=torch.uint8) for _ in range(2))
    for given in GIVEN:
        values = {s.name: odd_values(s.shape, given) for s in segments}
        resting._fill_at_once(span, values, whole)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resting, "PACKED_AT_ONCE", 1)  # and so as many rows as 128
            resting.fill(span, values, parts, torch.empty(0))
        assert torch.equal(whole, parts), given
        assert whole.any()
