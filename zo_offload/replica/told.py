"""Errors that travel: what one rank raises, every rank raises.

A failure on the wire starts like no message, so that it may stand where any message of rank 0 does.
"""

import json
import struct
from collections.abc import Callable
from typing import NoReturn

from zo_offload import errors
from zo_offload.errors import LostRankError, ReplicaError, ZOError

LENGTH = struct.Struct("<Q")
FAILURE = struct.pack("<Q", 0x7FF85A4F4641494C)  # as a float, a NaN that no arithmetic makes


def as_failure(error: ZOError) -> bytes:
    """A message that says so."""
    data = as_told(error)
    return FAILURE + LENGTH.pack(len(data)) + data


def raise_failure(receive: Callable[[int], bytes]) -> NoReturn:
    """Raise what follows ``FAILURE``; ``receive`` gives the next bytes."""
    (size,) = LENGTH.unpack(receive(LENGTH.size))
    raise_as_told(receive(size))


def as_told(error: ZOError) -> bytes:
    """An error's kind and words."""
    return json.dumps([type(error).__name__, str(error)]).encode()


def raise_as_told(data: bytes) -> NoReturn:
    """Raise an error of that kind, with those words."""
    name, message = json.loads(data)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ZOError)):
        kind = ReplicaError
    error = kind(message)
    # A rank that stops because of another says so wherever its output goes.
    error.is_told = not isinstance(error, LostRankError)
    raise error
