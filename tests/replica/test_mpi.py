"""The link over MPI, where nothing arrives; ranks that talk are in ``distributed/``."""

from typing import Any

import pytest

from zo_offload.errors import ReplicaError
from zo_offload.replica import mpi
from zo_offload.replica.mpi import MPILink

pytest.importorskip("mpi4py", reason="mpi4py is not installed")


class Silent:
    """A communicator of two ranks, of which the other says nothing."""

    def __init__(self) -> None:
        self.asked = 0

    def Dup(self) -> "Silent":
        return self

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 2

    def Iprobe(self, source: int, tag: int, status: Any) -> bool:
        self.asked += 1
        return False


def test_a_rank_that_is_silent_is_named(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10_000, 600))  # it jumps ten minutes at each look
    monkeypatch.setattr(mpi.time, "monotonic", lambda: next(clock))
    silent = Silent()
    words = r"^rank 0 lost rank 1 \(silent for 1800 s\); look at its output$"
    with pytest.raises(ReplicaError, match=words):
        MPILink(silent).receive(1, 8)
    assert silent.asked == 4  # at 10, 20, 30 minutes and after
