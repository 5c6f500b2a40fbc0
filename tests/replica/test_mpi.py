"""The link over MPI, where nothing arrives; ranks that talk are in ``distributed/``."""

from types import SimpleNamespace

import pytest

from zo_offload.errors import ReplicaError
from zo_offload.replica import mpi
from zo_offload.replica.mpi import MPILink

pytest.importorskip("mpi4py", reason="mpi4py is not installed")


def test_a_rank_that_is_silent_is_named(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10_000, 600))  # ten minutes go by at each look
    monkeypatch.setattr(mpi.time, "monotonic", lambda: next(clock))
    looks = []
    other = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 2)
    other.Dup = lambda: other
    other.Iprobe = lambda **_: looks.append("nothing")  # is there
    words = r"^rank 0 lost rank 1 \(silent for 1800 s\); look at its output$"
    with pytest.raises(ReplicaError, match=words):
        MPILink(other).receive(1, 8)
    assert len(looks) == 4  # at 10, 20 and 30 minutes, and beyond
