"""How ranks find each other, where something is in the way."""

import sys
from types import SimpleNamespace

import pytest

from zo_offload import launched, process_group
from zo_offload.errors import ReplicaError


def test_two_mpis_on_a_host(monkeypatch: pytest.MonkeyPatch):
    mpi = SimpleNamespace(
        COMM_WORLD=SimpleNamespace(Get_size=lambda: 1),
        Get_library_version=lambda: "MPICH Version: 4.2, of some day",
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    monkeypatch.setattr(launched, "num_ranks", lambda: 4)
    words = "launcher started 4 ranks, and mpi4py, which has loaded MPICH Version: 4.2, sees 1; na"
    with pytest.raises(ReplicaError, match=words):
        process_group._check_mpi()


def test_no_address_of_the_first_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process_group.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(launched, "by_mpi", lambda: False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ReplicaError, match="MASTER_ADDR is not set: the host where rank 0 can"):
        process_group._link()
