"""The link over MPI, where nothing arrives or a rank leaves; the rest is in ``distributed/``."""

import pytest

from zo_offload.errors import LostRankError
from zo_offload.replica import patience
from zo_offload.replica.mpi import GOODBYE, MPILink

pytest.importorskip("mpi4py", reason="mpi4py is not installed")


class Other:
    """A communicator of two ranks; what the other one does, look by look."""

    def __init__(self, *arrive: int | None) -> None:
        self.arrive, self.goodbyes = list(arrive), []

    def Dup(self) -> "Other":  # noqa: N802  # MPI's names
        return self

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 3

    def Iprobe(self, tag: int, **_: object) -> bool:  # noqa: N802
        return bool(self.arrive) and self.arrive.pop(0) == tag

    def Isend(self, data: bytearray, dest: int, tag: int) -> None:  # noqa: N802
        self.goodbyes.append((bytes(data), dest, tag))


def test_a_rank_that_is_silent_is_named(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10_000, 600))  # ten minutes go by at each look
    monkeypatch.setattr(patience.time, "monotonic", lambda: next(clock))
    link = MPILink(Other())
    link.timeout = 1800.0
    words = r"^rank 0 lost rank 1 \(silent for 1800 s\); look at its output$"
    with pytest.raises(LostRankError, match=words):
        link.receive(1, 8)


def test_a_rank_that_has_left_is_named_once_nothing_more_of_it_is_there():
    """It looks for a message, for a goodbye, and for a message once more."""
    link = MPILink(Other(None, None, None, GOODBYE, None))
    with pytest.raises(LostRankError, match=r"^rank 0 lost rank 1 \(it has left\); look at its"):
        link.receive(1, 8)


def test_who_leaves_says_so_once():
    other = Other()
    link = MPILink(other)
    link.close()
    link.close()
    assert other.goodbyes == [(b"", 1, GOODBYE), (b"", 2, GOODBYE)]
