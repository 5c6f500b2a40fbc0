"""The rule of slots: a whole, durable version of every unit, whatever the order of things."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_offload.offload.slots import SlotTable

UNITS, SPARES = 3, 2
EVENTS = st.sampled_from(["take", "land", "fail", "sync begins", "sync ends", "read", "read ends"])


@given(events=st.lists(st.tuples(EVENTS, st.integers(0, UNITS - 1)), max_size=60))
@settings(max_examples=200)
def test_a_durable_version_is_never_written_over(events: list[tuple[str, int]]):
    """Against a model of what a power cut would leave."""
    table = SlotTable(UNITS + SPARES, {unit: unit for unit in range(UNITS)})
    durable = {unit: unit for unit in range(UNITS)}  # slot of the newest version that is safe
    syncing: tuple[list[int], dict[int, int]] | None = None
    reading: list[int] = []
    for event, unit in events:
        if event == "take" and unit not in table.writing and table.has_free:
            slot = table.take(unit)
            assert slot not in durable.values()
            assert slot not in table.current.values()
            assert slot not in reading
        elif event == "land" and unit in table.writing:
            table.landed(unit)
        elif event == "fail" and unit in table.writing:
            table.failed(unit)
        elif event == "sync begins" and syncing is None:
            syncing = table.retired, dict(table.current)
        elif event == "sync ends" and syncing is not None:
            durable.update(syncing[1])
            table.synced(syncing[0])
            syncing = None
        elif event == "read":
            reading.append(table.current[unit])
            table.read_begins(reading[-1])
        elif event == "read ends" and reading:
            table.read_ends(reading.pop(0))
    for slot in reading:
        table.read_ends(slot)
    for unit in list(table.writing):
        table.landed(unit)
    table.synced(table.retired)
    free = 0
    while table.has_free:
        table.take(UNITS + free)
        free += 1
    assert free == SPARES  # no slot was lost


def test_without_spares_each_unit_is_written_once():
    table = SlotTable(1, {})
    assert table.take(0) == 0
    table.landed(0)
    assert table.take(0) is None
    assert not table.is_sync_due
    assert table.is_idle


def test_slots_take_turns():
    """The one that was free longest is written: wear spreads."""
    table = SlotTable(4, {0: 0})
    taken = []
    for _ in range(8):
        taken.append(table.take(0))
        table.landed(0)
        table.synced(table.retired)
    assert taken == [1, 2, 3, 0, 1, 2, 3, 0]


def test_one_write_of_a_unit_at_a_time():
    table = SlotTable(3, {})
    table.take(0)
    with pytest.raises(AssertionError):
        table.take(0)
