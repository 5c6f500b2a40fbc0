"""A link over MPI, for runs that ``mpirun`` started. Buffers only: nothing is pickled."""

import time
from typing import Any

from zo_offload.errors import LostRankError
from zo_offload.replica.patience import TIMEOUT_SECONDS, Patience, SilentError

TAG, GOODBYE = 0x5A4F, 0x5A50
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
        self.timeout = TIMEOUT_SECONDS
        self._goodbyes: list[Any] = []
        self._arrived: dict[int, bytearray] = {}

    def send(self, peer: int, data: bytes) -> None:
        """Send all of it."""
        self._communicator.Send(bytearray(data), dest=peer, tag=TAG)
        self.bytes_sent += len(data)

    def receive(self, peer: int, size: int) -> bytes:
        """The next ``size`` bytes.

        Raises:
            LostRankError: The rank has left, or has been silent for ``timeout`` seconds.
        """
        arrived = self._arrived.setdefault(peer, bytearray())
        while len(arrived) < size:
            arrived += self._next_message(peer)
        data = bytes(arrived[:size])
        del arrived[:size]
        return data

    def close(self) -> None:
        """Say that nothing more will come.

        The duplicate is not given back: that would wait for ranks that may be gone.
        """
        if not self._goodbyes:
            peers = range(1, self.world_size) if self.rank == 0 else range(1)
            self._goodbyes = [
                self._communicator.Isend(bytearray(), dest=peer, tag=GOODBYE) for peer in peers
            ]

    def _next_message(self, peer: int) -> bytearray:
        from mpi4py import MPI

        status, nap = MPI.Status(), SHORTEST_NAP
        patience = Patience(f"rank {peer}", self.timeout)
        while not self._communicator.Iprobe(source=peer, tag=TAG, status=status):
            try:
                # what was sent before a goodbye has arrived before it, perhaps just now
                if self._communicator.Iprobe(source=peer, tag=GOODBYE):
                    if not self._communicator.Iprobe(source=peer, tag=TAG):
                        raise ConnectionResetError("it has left")
                    continue
                patience.ask()
            except (ConnectionResetError, SilentError) as error:
                raise LostRankError(
                    f"rank {self.rank} lost rank {peer} ({error}); look at its output"
                ) from error
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)
        message = bytearray(status.Get_count(MPI.BYTE))
        self._communicator.Recv(message, source=peer, tag=TAG)
        return message
