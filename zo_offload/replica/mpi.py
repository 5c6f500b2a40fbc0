"""A link over MPI, for runs that ``mpirun`` started. Buffers only: nothing is pickled."""

import time
from typing import Any

from zo_offload.errors import ReplicaError
from zo_offload.replica.sockets import SILENCE_SECONDS

TAG = 0x5A4F
SHORTEST_NAP, LONGEST_NAP = 20e-6, 1e-3


class MPILink:
    """Point-to-point messages with rank 0.

    MPI waits by spinning, which takes a core from the forwards; so arrivals are asked for, with
    naps that grow to a millisecond.

    Args:
        communicator: Of all ranks; duplicated, so that nobody else's messages are seen.
    """

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator.Dup()
        self.rank: int = self._communicator.Get_rank()
        self.world_size: int = self._communicator.Get_size()
        self.bytes_sent = 0
        self._arrived: dict[int, bytearray] = {}

    def send(self, peer: int, data: bytes) -> None:
        """Send all of it."""
        self._communicator.Send(bytearray(data), dest=peer, tag=TAG)
        self.bytes_sent += len(data)

    def receive(self, peer: int, size: int) -> bytes:
        """The next ``size`` bytes.

        Raises:
            ReplicaError: The rank has been silent for half an hour.
        """
        arrived = self._arrived.setdefault(peer, bytearray())
        while len(arrived) < size:
            arrived += self._next_message(peer)
        data = bytes(arrived[:size])
        del arrived[:size]
        return data

    def close(self) -> None:
        """Nothing: giving the duplicate back would wait for ranks that may be gone."""

    def _next_message(self, peer: int) -> bytearray:
        from mpi4py import MPI

        status = MPI.Status()
        deadline, nap = time.monotonic() + SILENCE_SECONDS, SHORTEST_NAP
        while not self._communicator.Iprobe(source=peer, tag=TAG, status=status):
            if time.monotonic() > deadline:
                raise ReplicaError(
                    f"rank {self.rank} lost rank {peer} (silent for {SILENCE_SECONDS:.0f} s); "
                    "look at its output"
                )
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)
        message = bytearray(status.Get_count(MPI.BYTE))
        self._communicator.Recv(message, source=peer, tag=TAG)
        return message
