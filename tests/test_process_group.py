"""How ranks find each other, where something is in the way."""

import socket
import sys
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

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


def test_a_port_that_another_has_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        met = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in met.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ReplicaError) as caught, process_group._told_where(29500):
            TCPStore("127.0.0.1", port, 2, is_master=True)
    message = str(caught.value)
    assert message.startswith(f"rank 0 of 2 could not meet the others at 127.0.0.1:{port}: ")
    assert "EADDRINUSE" in message
    assert message.endswith("the port is free there (MASTER_PORT chooses another)")
    assert "\n" not in message
