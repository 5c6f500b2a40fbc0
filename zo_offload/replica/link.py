"""What a rank needs of a connection: bytes to and from rank 0, whole and in order.

The exchange is a star with rank 0 in the middle. It moves each scalar once up and each sum once
down, which is the least there is, and the one that adds is the one that decides: all ranks go on
from the same bits, whatever their number.
"""

from typing import Protocol

from zo_offload.replica.patience import TIMEOUT_SECONDS


class Link(Protocol):
    """A connection of every rank with rank 0.

    Attributes:
        rank: This one.
        world_size: How many there are.
        bytes_sent: Everything that was sent so far.
        timeout: Seconds for which another rank may be silent.
    """

    rank: int
    world_size: int
    bytes_sent: int
    timeout: float

    def send(self, peer: int, data: bytes) -> None:
        """Send all of it; one of the two ranks is rank 0."""
        ...

    def receive(self, peer: int, size: int) -> bytes:
        """The next ``size`` bytes from a rank; waits for them."""
        ...

    def close(self) -> None:
        """End the connection; a rank that waits for this one learns of it at once."""
        ...


class Alone:
    """The link of a run of one rank: there is nobody to talk to."""

    rank = 0
    world_size = 1
    bytes_sent = 0
    timeout = TIMEOUT_SECONDS

    def send(self, peer: int, data: bytes) -> None:
        """Never called."""
        raise AssertionError(f"rank {peer} does not exist")

    def receive(self, peer: int, size: int) -> bytes:
        """Never called."""
        raise AssertionError(f"rank {peer} does not exist")

    def close(self) -> None:
        """Nothing to end."""
