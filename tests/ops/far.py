"""Elements past 2^32, of spans that no memory holds: each check is for any implementation."""

from typing import Any, cast

import numpy as np
import torch
from hypothesis import strategies as st

from ops.jobs import Circumstances, any_weights, under
from ops.spans import DTYPES, exact, expected_copy, expected_rows, placed
from zo_offload import ops
from zo_offload.ops import Draw, Segment, Span, reference

MOST = 2**35  # elements whose blocks a counter can number
NEAR_ROWS = 6  # of a table that are in memory
uint32 = st.integers(0, 2**32 - 1)


class Far:
    """A wire of which only elements from ``first`` are in memory: it begins far before them."""

    def __init__(self, near: torch.Tensor, first: int, elements: int) -> None:
        self.near, self.first, self.elements = near, first, elements
        self.device = near.device
        self.itemsize, self.width = near.itemsize, 1

    def data_ptr(self) -> int:
        return (self.near.data_ptr() - self.itemsize * self.first) % 2**64

    def numel(self) -> int:
        return self.elements

    def is_contiguous(self) -> bool:
        return True

    def __getitem__(self, part: slice) -> Any:
        if part.stop - part.start > len(self.near):
            return self
        return self.near[part.start - self.first : part.stop - self.first]

    def view(self, shape: tuple[int, int]) -> "Far":
        self.width = shape[1]
        return self

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        assert dim == 0
        return self.near.view(-1, self.width)[rows - self.first // self.width]


def far_stretch(draw: st.DrawFn) -> tuple[int, int]:
    """First element and number of a stretch, often about where a number grows a bit longer."""
    near = draw(st.sampled_from((2**31, 2**32, 2**33, MOST - 1024)) | st.integers(0, MOST - 1024))
    first = max(0, near // 128 + draw(st.integers(-4, 0))) * 128
    return first, draw(st.integers(1, 6)) * 128


@st.composite
def far_spans(draw: st.DrawFn) -> tuple[Span, int, int]:
    """A span of one or two parameters that no memory holds, and a stretch that may touch both."""
    first, count = far_stretch(draw)
    cut = first + 128 * draw(st.integers(0, 6))
    numbers, scale = draw(st.lists(uint32, min_size=2, max_size=2)), draw(st.floats(0.1, 2.0))
    one = Segment("one", numbers[0], (max(cut, 128),), 0)
    other = Segment("other", numbers[1], (MOST,), one.padded, scale)
    dtype = draw(st.sampled_from(DTYPES))
    return Span(dtype, (one, other), 0, 0), first, count


def part_of(span: Span, first: int, count: int, direction: str, draw: Draw) -> np.ndarray:
    """``coefficient * scale * z`` of a stretch."""
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate(
            [
                reference.DIRECTIONS[direction](
                    *(draw.seed, draw.step, draw.probe, segment.parameter_index),
                    *(start, stop - start, draw.coefficient * segment.scale),
                )
                for segment, start, stop in span.overlapping(first, first + count)
            ]
        )


def check_stretch(
    where: tuple[Span, int, int],
    weights: int,
    direction: str,
    draw: Draw,
    around: Circumstances,
    device: str = "cpu",
) -> None:
    span, first, count = where
    near = placed(any_weights(count, weights).to(span.dtype), around.offset)
    with np.errstate(all="ignore"):
        value = near.float().numpy() + part_of(span, first, count, direction, draw)
        right = exact(expected_copy(span, reference.canonical(value), draw))
    wire = cast("torch.Tensor", Far(near.to(device), first, span.elements))
    out = placed(torch.zeros_like(near, device=device), around.offset)
    with under(around):
        ops.perturb(span, wire, out, direction, draw, first, count)
    np.testing.assert_array_equal(exact(out.cpu()), right)


@st.composite
def far_rows(draw: st.DrawFn) -> tuple[Span, int, list[int]]:
    """A table, a row of it, and rows from there, in any order, again and again."""
    width, dtype = draw(st.integers(1, 1300)), draw(st.sampled_from(DTYPES))
    element = draw(st.sampled_from((0, 2**31, 2**32, 2**33)) | st.integers(0, MOST // 2))
    base = element // width
    offset = 128 * draw(st.just(0) | st.integers(0, 2**26))
    segment = Segment("table", draw(uint32), (base + NEAR_ROWS, width), 0, 0.37, offset)
    chosen = draw(st.lists(st.integers(0, NEAR_ROWS - 1), max_size=6))
    return Span(dtype, (segment,), 0, 0), base, chosen


def check_rows(
    where: tuple[Span, int, list[int]],
    weights: int,
    direction: str,
    draw: Draw,
    around: Circumstances,
    device: str = "cpu",
) -> None:
    span, base, chosen = where
    segment = span.segments[0]
    width = segment.shape[1]
    near = placed(any_weights(NEAR_ROWS * width, weights).to(span.dtype), around.offset)
    rows = torch.tensor(chosen, dtype=torch.int64)
    right = expected_rows(span, segment, near, rows, direction, draw, base)
    wire = cast("torch.Tensor", Far(near.to(device), base * width, span.elements))
    with under(around):
        found = ops.perturb_rows(span, segment, wire, (rows + base).to(device), direction, draw)
    assert found.dtype == span.dtype
    np.testing.assert_array_equal(exact(found.cpu()), right)


def block_of(counter: list[int], seed: int, direction: str, device: str) -> list[float]:
    """z of one block of a direction, as an implementation has it."""
    block, parameter, step, last = counter
    size = {"rademacher": 128, "gaussian": 8}[direction]
    first, inside = divmod(block * size, 128)
    span = Span(torch.float32, (Segment("w", parameter, (first * 128 + 128,), 0),), 0, 0)
    near = torch.full((128,), -0.0, device=device)  # to which adding changes no bit
    wire, out = cast("torch.Tensor", Far(near, first * 128, span.elements)), torch.zeros_like(near)
    ops.perturb(span, wire, out, direction, Draw(seed, step, last, 1.0), first * 128, 128)
    return out[inside : inside + size].tolist()


def check_words(counter: list[int], seed: int, words: list[int], device: str = "cpu") -> None:
    signs = [-1.0 if words[e // 32] >> e % 32 & 1 else 1.0 for e in range(128)]
    assert block_of(counter, seed, "rademacher", device) == signs
    cells = [words[e // 2] >> 16 * (e % 2) & 0xFFF for e in range(8)]
    values = reference.gaussian_cells().astype(np.float32)[cells].tolist()
    assert block_of(counter, seed, "gaussian", device) == values
