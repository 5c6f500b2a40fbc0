"""Means of what ranks booked: one order of addition, weights honoured, a bad loss named."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.errors import DivergedError
from zo_offload.replica import Booked, Replica
from zo_offload.replica.booked import HEADER, SHAPE, STEP_BITS, Header
from zo_offload.replica.sums import sums_of

COLUMNS = ("probe 0, +eps", "probe 0, -eps")
sums = st.tuples(st.floats(-1e8, 1e8), st.floats(0.25, 64.0))
tables = st.lists(st.tuples(sums, sums), min_size=4, max_size=4)


def booked(rows: list) -> Booked:
    return Booked.of(COLUMNS, rows)


@given(rows=tables)
def test_the_number_of_ranks_changes_no_bit(rows: list):
    """Rank r of W holds micro-batches r, r + W, ..."""
    alone = sums_of([booked(rows)], "step 0")
    for world_size in (2, 4):
        parts = [booked(rows[rank::world_size]) for rank in range(world_size)]
        assert sums_of(parts, "step 0") == alone


@given(rows=tables)
def test_means_are_weighted_sums_in_micro_batch_order(rows: list):
    for column, mean in enumerate(Replica().mean(booked(rows), 0)):
        numerator, denominator = rows[0][column]
        for row in rows[1:]:
            numerator += row[column][0]
            denominator += row[column][1]
        assert mean == numerator / denominator


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_named(value: float):
    rows = [[(1.0, 1.0), (1.0, 1.0)], [(2.0, 1.0), (value, 1.0)]]
    with pytest.raises(DivergedError) as caught:
        Replica().mean(booked(rows), step=41)
    message = str(caught.value)
    assert message.startswith(f"step 41: the loss is {value} (probe 0, -eps, micro-batch 1); ")
    assert "\n" not in message


def test_weights_that_add_up_to_nothing_are_refused():
    with pytest.raises(DivergedError, match="step 3: the weights of all micro-batches"):
        Replica().mean(booked([[(0.0, 0.0), (0.0, 0.0)]]), step=3)


@given(rows=tables)
def test_ranks_that_hold_a_part_of_the_columns_change_no_bit(rows: list):
    alone = sums_of([booked(rows)], "step 0")
    for groups in (1, 2, 4):
        shares = [
            Booked.of([name], [[row[column]] for row in rows[group::groups]])
            for group in range(groups)
            for column, name in enumerate(COLUMNS)
        ]
        assert sums_of(shares, "step 0", COLUMNS) == alone


def test_a_bad_loss_of_another_rank_s_lane_is_named():
    values = zip(COLUMNS, (1.0, math.inf), strict=True)
    shares = [Booked.of([name], [[(value, 1.0)]]) for name, value in values]
    with pytest.raises(DivergedError, match=r"step 0: the loss is inf \(probe 0, -eps, micro-batc"):
        sums_of(shares, "step 0", COLUMNS)


@given(
    rows=tables,
    step=st.integers(0, 2**40),
    short=st.booleans(),
    before=st.sampled_from([None, (1, 2), (4, 2)]),
    stops=st.booleans(),
)
def test_what_travels_is_what_was_booked(
    rows: list, step: int, short: bool, before: Any, stops: bool
):
    if short:
        rows = [[tuple(float(np.float32(value)) for value in pair) for pair in row] for row in rows]
    ours = booked(rows)
    packed = ours.pack(step, before, stops)
    header, rest = Header.read(packed[: HEADER.size]), packed[HEADER.size :]
    assert (header.step, header.shaped) == (step & STEP_BITS, before != (4, 2))
    assert header.stops == stops
    if header.shaped:
        assert SHAPE.unpack(rest[: SHAPE.size]) == (4, 2)
        rest = rest[SHAPE.size :]
    assert len(rest) == header.values((4, 2)).size
    assert header.short >= short
    theirs = ours.unpack_like(header, rest)
    assert theirs.totals == ours.totals
    assert theirs.weights == ours.weights


@pytest.mark.parametrize(("value", "size"), [(1.0, 4), (0.1, 8), (1e300, 8), (math.nan, 4)])
def test_weights_of_one_do_not_travel_and_fp32_numbers_travel_as_such(value: float, size: int):
    ours = booked([[(value, 1.0), (2.0, 1.0)]])
    assert len(ours.pack(0, ours.shape)) == 2 + 2 * size
    assert len(ours.pack(0)) == 6 + 2 * size


def test_alone_nothing_is_sent():
    replica = Replica()
    replica.mean(booked([[(1.0, 1.0), (2.0, 1.0)]]), 0)
    replica.refuse_differences("the weights", {"digest": "abc"}, "")
    assert (replica.rank, replica.world_size, replica.bytes_sent) == (0, 1, 0)
    assert replica.gather(b"x") == [b"x"]
    assert replica.share(lambda: b"y") == b"y"
