"""This rank's view of the other ranks: what is exchanged is scalars, added in one global order."""

from zo_offload.replica.booked import Booked
from zo_offload.replica.division import Division
from zo_offload.replica.link import Alone, Link
from zo_offload.replica.replica import Replica

__all__ = ["Alone", "Booked", "Division", "Link", "Replica"]
