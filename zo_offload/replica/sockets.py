"""A link over TCP: one connection from every rank to rank 0, and nothing on it but our bytes.

Why not the process group: gloo sends 320 bytes a rank to gather 32, and a rank that dies is found
out late. Here a step of two lanes is 10 bytes up and some 10 down, and a closed connection names
the rank that has left.

Rank 0 listens where the launcher's rendezvous is, on a port that the system chooses. Who connects
must show a token that went through the process group; anything else is turned away.
"""

import hmac
import os
import resource
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from weakref import WeakSet

from zo_offload.errors import LostRankError, ReplicaError
from zo_offload.replica.patience import TIMEOUT_SECONDS, Patience
from zo_offload.replica.told import FAILURE, as_failure, raise_failure

TOKEN_BYTES = 32
GREETING = struct.Struct(f"<{TOKEN_BYTES}sI")  # token, rank
INVITATION = struct.Struct(f"<H{TOKEN_BYTES}s")  # port, token
CONNECT_SECONDS = 300.0
GREETING_SECONDS = 10.0
LOOK_SECONDS = 60.0  # between two looks at how long nothing has come
LAST_WORDS_SECONDS = 1.0
SPARE_FILES = 512  # that a process may have open beside its connections
# A host that vanished sends no goodbye: probe after 15 silent seconds, five seconds apart, and wait
# as long for an answer to what was sent (of itself TCP would for a quarter of an hour).
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 15),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 30_000),
)

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # asked for by name: nobody comes from elsewhere

Share = Callable[[bytes], bytes]  # rank 0's bytes on every rank, which passes as many


class SocketLink:
    """Made by :func:`connect`."""

    def __init__(self, rank: int, world_size: int, peers: dict[int, socket.socket]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.bytes_sent = 0
        self.timeout = TIMEOUT_SECONDS
        self._peers = peers
        self._arrived = {peer: bytearray() for peer in peers}
        self._addresses = {rank: peer.getpeername()[0] for rank, peer in peers.items()}
        _links.add(self)
        for peer in peers.values():
            peer.settimeout(LOOK_SECONDS)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, peer: int, data: bytes) -> None:
        """Send all of it.

        Raises:
            LostRankError: The rank has left, or takes nothing for ``timeout`` seconds.
        """
        left, patience = memoryview(data), None
        try:
            while left:
                try:
                    left = left[self._peers[peer].send(left) :]
                except TimeoutError as error:
                    patience = self._ask(patience, peer, error)
        except OSError as error:
            if self.rank:
                self._raise_last_words()
            raise self._lost(peer, error) from error
        self.bytes_sent += len(data)

    def receive(self, peer: int, size: int) -> bytes:
        """The next ``size`` bytes.

        Raises:
            LostRankError: The rank has left, or has been silent for ``timeout`` seconds.
        """
        arrived, patience = self._arrived[peer], None
        try:
            while len(arrived) < size:  # what follows is taken along: one call a message, mostly
                try:
                    part = self._peers[peer].recv(max(min(size - len(arrived), 1 << 20), 1 << 12))
                except TimeoutError as error:
                    patience = self._ask(patience, peer, error)
                    continue
                if not part:
                    raise ConnectionResetError("its connection is closed")
                arrived += part
        except OSError as error:
            raise self._lost(peer, error) from error
        data = bytes(arrived[:size])
        del arrived[:size]
        return data

    def close(self) -> None:
        """Close every connection."""
        for peer in self._peers.values():
            peer.close()

    def _ask(self, patience: Patience | None, peer: int, error: TimeoutError) -> Patience:
        if error.errno is not None:  # the kernel's, which has given up
            raise error
        who = f"rank {peer} at {self._addresses[peer]}"
        patience = patience or Patience(who, self.timeout, LOOK_SECONDS)
        patience.ask()
        return patience

    def _lost(self, peer: int, error: OSError) -> LostRankError:
        lost = LostRankError(
            f"rank {self.rank} lost rank {peer} ({self._addresses[peer]}: {error}); look at its "
            "output"
        )
        if self.rank == 0:  # the others would see no more than that rank 0 leaves
            for other in self._peers.values():
                with suppress(OSError):
                    other.sendall(as_failure(lost))
        self.close()
        return lost

    def _raise_last_words(self) -> None:
        """Raise what rank 0 said before it left, if it did."""
        self._peers[0].settimeout(LAST_WORDS_SECONDS)
        with suppress(OSError):
            if self._peers[0].recv(len(FAILURE), socket.MSG_WAITALL) == FAILURE:
                raise_failure(lambda size: self.receive(0, size))


_links: WeakSet[SocketLink] = WeakSet()


def _close_in_child() -> None:
    """What a forked process held open would hide that this rank has died."""
    for link in _links:
        link.close()


os.register_at_fork(after_in_child=_close_in_child)


def connect(rank: int, world_size: int, host: str, share: Share) -> SocketLink:
    """Connect every rank with rank 0; all ranks call this together.

    Args:
        rank: This one.
        world_size: How many there are.
        host: Where rank 0 can be reached.
        share: Gives every rank what rank 0 passes.

    Raises:
        ReplicaError: A rank did not come, or rank 0 cannot be reached.
    """
    if rank == 0:
        return SocketLink(0, world_size, _accept_all(world_size, host, share))
    port, token = INVITATION.unpack(share(bytes(INVITATION.size)))
    try:
        peer = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        peer.sendall(GREETING.pack(token, rank))
    except OSError as error:
        raise ReplicaError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}; is a firewall between?"
        ) from error
    return SocketLink(rank, world_size, {0: peer})


def _accept_all(world_size: int, host: str, share: Share) -> dict[int, socket.socket]:
    token = secrets.token_bytes(TOKEN_BYTES)
    peers: dict[int, socket.socket] = {}
    _allow_files(world_size + SPARE_FILES)
    with _listen(host) as listener:
        share(INVITATION.pack(listener.getsockname()[1], token))
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(peers) < world_size - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(r) for r in range(1, world_size) if r not in peers)
                raise ReplicaError(
                    f"ranks {missing} did not connect within {CONNECT_SECONDS:.0f} s"
                    "; look at their output, and that MASTER_ADDR is reached from their hosts"
                ) from None
            except OSError as error:
                most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                raise ReplicaError(
                    f"rank 0 holds a connection with every rank, has {len(peers)} of "
                    f"{world_size - 1}, and can take no more ({error.strerror}; this process may "
                    f"have {most:,} files open); raise the limit, ulimit -Hn, before the launcher"
                ) from error
            rank = _greeted(peer, token)
            if rank is None or not 0 < rank < world_size or rank in peers:
                peer.close()
            else:
                peers[rank] = peer
    return peers


def _allow_files(count: int) -> None:
    """Ask for as many open files as connections need; shells set a low limit that may be raised."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < count:
        wanted = count if most == resource.RLIM_INFINITY else min(count, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _listen(host: str) -> socket.socket:
    """Where others reach rank 0: at the address that ``host`` has here, or else at all of them.

    A host may call itself 127.0.1.1, as Debian's installer writes it, or by the name of a gateway;
    what others resolve the name to is another address then.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    if host in LOOPBACK or not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        with suppress(OSError):
            return socket.create_server(address[:2], family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), family=family, backlog=1024)


def _greeted(peer: socket.socket, token: bytes) -> int | None:
    """The rank that a new connection says it is; None where it does not know the token."""
    peer.settimeout(GREETING_SECONDS)
    try:
        data = peer.recv(GREETING.size, socket.MSG_WAITALL)
    except OSError:
        return None
    if len(data) < GREETING.size:
        return None
    shown, rank = GREETING.unpack(data)
    return rank if hmac.compare_digest(shown, token) else None
