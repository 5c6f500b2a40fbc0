"""Bits on the device are the reference's, whichever kernels serve there."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from codec.wires import TABLE, array_of, expected_bytes, expected_look, expected_values, wire_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.far import check_rows, check_stretch, check_words, far_rows, far_spans, uint32
from ops.jobs import Circumstances, Job, any_weights, assert_same, done, expected, jobs, stretches
from ops.spans import DIRECTIONS, MASTERS, draws, exact, span_of
from ops.test_philox import KNOWN_ANSWERS, hexadecimal

from gpu.common import IMPLEMENTATIONS, served_by
from zo_offload import ops
from zo_offload.codec import codec_of
from zo_offload.ops import Draw, Span, StepUpdate, kernels, rank_sums, torch_ops

pytestmark = [
    pytest.mark.gpu,
    # Interpreted, numbers are NumPy's, whose products and casts of infinities speak up.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
directions = st.sampled_from(DIRECTIONS)
PLAIN = Circumstances(offset=3, chunk=1 << 20, flushes=False, streams=False)
# Each new combination is compiled.
COPIED = [(n, d) for n, d in TABLE if d == torch.bfloat16 or n in ("bf16", "fp16", "nf4")]
DRAW = Draw(2**63 + 5, 9, 1, 1e-3)
AHEAD = [StepUpdate(0.999, (Draw(5, 4, 0, 0.1), Draw(5, 4, 1, -0.2)), 5, 4)]
# An example that is new to Triton takes a second to compile; interpreted, one to run.
few = settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
some = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", params=IMPLEMENTATIONS, autouse=True)
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    with served_by(request.param, device):
        yield request.param


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", MASTERS)
@few
@given(data=st.data(), offset=st.sampled_from((0, 3)))
def test_any_job(device, layout: str, direction: str, data: st.DataObject, offset: int):
    job = replace(data.draw(jobs(layout)), direction=direction)
    found = done(ops, job, offset, data.draw(stretches(job.span)), str(device))
    assert_same(found, expected(job))


@some
@given(where=far_spans(), weights=uint32, direction=directions, draw=draws)
def test_any_stretch(device, where, weights: int, direction: str, draw: Draw):
    check_stretch(where, weights, direction, draw, PLAIN, str(device))


@some
@given(where=far_rows(), weights=uint32, direction=directions, draw=draws)
def test_any_rows(device, where, weights: int, direction: str, draw: Draw):
    check_rows(where, weights, direction, draw, PLAIN, str(device))


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_the_published_words(device, name: str):
    counter, key, words = map(hexadecimal, KNOWN_ANSWERS[name])
    check_words(counter, key[0] | key[1] << 32, words, str(device))


def large(device: torch.device, *kind) -> Span:
    """More than torch takes at a time, and many programs; interpreted, a few."""
    width = 1100 if device.type == "cuda" else 3
    return span_of([(1000, width), (77,), (width, 40)], [7, 2**31, 3], [1.0, 0.37, 2.0], *kind)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", MASTERS)
def test_large_spans_are_a_cpus(device, layout: str, direction: str):
    """Updates, then a copy with what it alone takes; by the CPU's own kernels."""
    dtype, master = MASTERS[layout]
    span = large(device, dtype, dtype == torch.bfloat16, master)
    job = Job(span, any_weights(span.elements, 1), direction, (*AHEAD,), (*AHEAD,), (DRAW, DRAW))
    found = done(ops, job, device=str(device))
    with kernels.using(kernels.TORCH):
        right = done(ops, job)
    assert_same(found, right)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_noise(device, direction: str):
    span = large(device)
    found = ops.noise(span, direction, DRAW, device).cpu()
    np.testing.assert_array_equal(exact(found), exact(ops.noise(span, direction, DRAW)))


@pytest.mark.parametrize(("name", "dtype"), TABLE, ids=lambda x: str(x).split(".")[-1])
@pytest.mark.parametrize("kind", ["bits", "awkward", "steps"])
def test_packed_bytes_and_values(device, name: str, dtype: torch.dtype, kind: str):
    wire, codec = wire_of(kind, dtype, 128 * 37, 5), codec_of(name)
    right = expected_bytes(name, wire)
    out = torch.full((codec.capacity(len(wire), dtype),), 0xA5, dtype=torch.uint8, device=device)
    used = codec.encode(wire.to(device), out)
    np.testing.assert_array_equal(out[:used].cpu().numpy(), right)

    values = expected_values(name, wire)
    found = codec.decode(out, len(wire), dtype)
    np.testing.assert_array_equal(exact(found.cpu()), values.view(np.uint32))
    look = codec.look(out, len(wire), dtype)
    np.testing.assert_array_equal(exact(look.cpu()), expected_look(values, dtype))
    assert array_of(wire).dtype.itemsize == dtype.itemsize


@pytest.mark.parametrize(("name", "dtype"), COPIED, ids=lambda x: str(x).split(".")[-1])
def test_copies_of_packed_spans(device, name: str, dtype: torch.dtype):
    """A stretch of one, with steps that the wire does not carry."""
    direction = DIRECTIONS[COPIED.index((name, dtype)) % 2]
    span = span_of([(300,), (20, 20)], [7, 3], [1.0, 0.37], dtype, codec=name)
    wire = wire_of("awkward", dtype, span.elements, 3)
    packed = torch.zeros(span.packed_bytes, dtype=torch.uint8)
    codec_of(name).encode(wire, packed)
    copies = []
    for where in (torch.device("cpu"), device):
        with kernels.using(kernels.TORCH) if where.type == "cpu" else nullcontext():
            out = torch.zeros(640, dtype=dtype, device=where)
            ops.perturb(span, packed.to(where), out, direction, DRAW, 128, 640, AHEAD)
            copies.append(exact(out.cpu()))
    np.testing.assert_array_equal(*copies)


@pytest.mark.parametrize("num_bytes", [0, 3, 4, 4096 + 1, (1 << 22) + 12])
def test_digests(device, num_bytes: int):
    data = torch.randint(0, 256, (num_bytes,)).to(torch.uint8)
    assert ops.digest(data.to(device), 2**33) == ops.digest(data, 2**33)


@pytest.mark.parametrize("layout", MASTERS)
def test_products_of_small_factors(device, layout: str):
    """Merged into masters, in a copy, and in rows of one."""
    dtype, master = MASTERS[layout]
    span = span_of([(300, 200)], [3], [0.37], dtype, False, master)
    segment = span.segments[0]
    left, right = torch.randn(300, 3), torch.randn(200, 3)
    values, rows = any_weights(span.elements, 2), torch.tensor([0, 299, 7, 7])
    found = []
    for where in ("cpu", device):
        wire = torch.zeros(span.elements, dtype=dtype, device=where)
        rest = span.rest(torch.zeros(span.rest_bytes, dtype=torch.uint8, device=where))
        pair = left.to(where), right.to(where)
        torch_ops.store_master(span, values.to(where), wire, rest)
        copy = torch.zeros_like(wire)
        rank_sums.add_product(segment, wire, copy[: segment.numel], *pair)
        some_rows = rank_sums.rows_with_product(
            wire[: segment.numel].view(300, 200), rows.to(where), *pair
        )
        rank_sums.merge(span, segment, wire, rest, *pair)
        parts = [wire, copy, some_rows, *([rest] if rest.numel() else [])]
        found.append([exact(part.cpu()) for part in parts])
    assert_same(*found)
