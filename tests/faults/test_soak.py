"""The short form of the soak: it takes steps, and would see what grows."""

from faults import soak
from faults.soak import GROWTH_BYTES, Soaked


def test_a_soak_counts_what_it_did():
    found = soak.in_a_child("nvme", 60)
    assert found.steps == 60
    assert found.faults == []
    assert found.threads[0] > 1


def test_a_leak_is_seen():
    found = soak.in_a_child("host", 60, leak=True)
    assert [fault.partition(" ")[2] for fault in found.faults] == ["bytes more", "open files more"]
    assert found.grown_bytes > GROWTH_BYTES


def test_a_process_that_fails_is_told():
    (fault,) = soak.in_a_child("host", 0).faults
    assert "AssertionError" in fault
    assert Soaked().steps == 0
