"""What rank 0 answers: exact, short, and refused where it is nothing that rank 0 sends."""

import io
import json
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zo_offload.errors import DivergedError, ReplicaError, ZOError
from zo_offload.replica.sums import Sums
from zo_offload.replica.told import FAILURE, LENGTH, as_failure

numbers = st.floats(allow_nan=False, allow_infinity=False)
likely = st.floats(0.5, 64.0, width=32)
weights = st.floats(0.25, 1e6)
LONGEST = 64  # of what a hostile answer may ask for, with the words of a failure


class Torn(Exception):
    """All bytes have been read, and more were asked for: a link would wait, or find it closed."""


class Wire:
    """Bytes as a rank receives them."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.asked = 0

    def receive(self, size: int) -> bytes:
        self.asked = max(self.asked, size)
        data = self._file.read(size)
        if len(data) < size:
            raise Torn
        return data


def bits(values: list[float]) -> bytes:
    return struct.pack(f"{len(values)}d", *values)


@example(pairs=[(8.98846567431158e307, 0.5)], count=1, weighted=True, stops=False)
@given(
    pairs=st.lists(st.tuples(st.one_of(numbers, likely), weights), min_size=1, max_size=9),
    count=st.integers(1, 10_000),
    weighted=st.booleans(),
    stops=st.booleans(),
)
def test_every_rank_computes_the_means_of_rank_0(
    pairs: list, count: int, weighted: bool, stops: bool
):
    totals = [total for total, _ in pairs]
    sums = Sums(totals, [weight if weighted else float(count) for _, weight in pairs], stops)
    packed = sums.pack(count)
    wire = Wire(packed)
    theirs = Sums.receive(wire.receive, len(pairs), count)
    assert (bits(theirs.totals), bits(theirs.weights)) == (bits(sums.totals), bits(sums.weights))
    assert theirs.stops == stops
    with np.errstate(over="ignore"):  # a mean beyond float64 is infinite, to both
        means = (np.array(totals) / np.array(sums.weights)).tolist()
    assert bits(theirs.means) == bits(means)
    assert len(packed) <= (1 + 8 * len(pairs)) * (1 + weighted)
    with pytest.raises(Torn):
        wire.receive(1)


@given(losses=st.lists(st.floats(4.0, 7.5, width=32), min_size=64, max_size=64))
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_two_lanes_of_fp32_losses_are_ten_bytes_at_most(losses: list[float], count: int):
    """Up to 32 micro-batches, where losses lie between two powers of two."""
    both = losses[:count], losses[32 : 32 + count]
    sums = Sums([sum(each) for each in both], [float(count)] * 2)
    assert len(sums.pack(count)) <= 10


@given(data=st.binary(max_size=40), columns=st.integers(1, 4))
def test_any_other_bytes_are_refused_or_read_without_asking_for_more(data: bytes, columns: int):
    wire = Wire(data)
    try:
        sums = Sums.receive(wire.receive, columns, 3)
    except (ReplicaError, Torn):
        pass
    else:
        assert len(sums.means) == columns
    assert wire.asked <= LONGEST


@pytest.mark.parametrize(
    "data",
    [
        b"\x09" + bytes(64),  # nine bytes of eight
        b"\x43" + bytes(64),  # four in common of three
        b"\x80\x00" + bytes(64),  # weights of 0
        b"\xff" + bytes(64),  # begins like a failure
        FAILURE + LENGTH.pack(1 << 60),
    ],
)
def test_what_is_no_answer_is_named(data: bytes):
    wire = Wire(data)
    with pytest.raises(ReplicaError, match=r"rank 0 sent .*, which begins no answer; start"):
        Sums.receive(wire.receive, 2, 4)
    assert wire.asked <= LONGEST


@pytest.mark.parametrize("words", [b"", b"{", b"5", b"[1]", b"\xff", b'["NoError", "it burns"]'])
def test_a_failure_that_cannot_be_read_is_one(words: bytes):
    wire = Wire(FAILURE + LENGTH.pack(len(words)) + words)
    with pytest.raises(ReplicaError, match=r"a rank failed, and what it says|it burns"):
        Sums.receive(wire.receive, 2, 4)


@pytest.mark.parametrize("error", [DivergedError("step 3"), ReplicaError("\U0001f525" * 100_000)])
def test_a_failure_of_any_length_arrives(error: ZOError):
    wire = Wire(as_failure(error))
    with pytest.raises(type(error)) as caught:
        Sums.receive(wire.receive, 2, 4)
    assert str(error).startswith(str(caught.value))
    assert len(json.dumps(str(caught.value))) <= 1 << 20
