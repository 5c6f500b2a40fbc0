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
    "packed": {"trainable": False, "codec": "nf4"},
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
