"""The network interface by which gloo reaches the other hosts, where it would not find it.

gloo tells the others the address that this host's own name has here. Debian's installer makes that
127.0.1.1, at which nobody else finds this host, and all wait for one another.
"""

import os
import socket
from ipaddress import ip_address

import psutil

CHOSEN = "GLOO_SOCKET_IFNAME"  # gloo's own; what a user has set there stays
ELSEWHERE = "192.0.2.1"  # an address of nobody's (RFC 5737), to ask which way leads out


def choose_interface(first_rank: str) -> None:
    """Set gloo's variable where this host's own name means loopback to itself, and ranks do not.

    Args:
        first_rank: Name or address of rank 0's host.
    """
    if CHOSEN in os.environ or _is_loopback_by_intent(first_rank):
        return
    if not _is_loopback(_address_of(socket.gethostname())):
        return
    at = _address_of(first_rank)
    mine = _source_to(ELSEWHERE if _is_loopback(at) else at)
    names = [name for name, found in psutil.net_if_addrs().items() for each in found
             if each.family == socket.AF_INET and not _is_loopback(each.address)
             and mine in (None, each.address)]  # fmt: skip
    if len(names) == 1:
        os.environ[CHOSEN] = names[0]


def _is_loopback_by_intent(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return address is not None and ip_address(address).is_loopback


def _source_to(address: str | None) -> str | None:
    """The address of this host from which packets to another would leave; none is sent."""
    if address is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:  # no way there, or out
            return None
        return probe.getsockname()[0]
