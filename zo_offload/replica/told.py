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
FAILURE = b"\xffFAILED\xff"  # a length beyond all bounds; its first byte begins no sums
MOST_WORDS = 1 << 16  # of a message; in JSON a character is at most 12 bytes
MOST_TOLD_BYTES = 1 << 20


def as_failure(error: ZOError) -> bytes:
    """A message that says so."""
    data = as_told(error)
    return FAILURE + LENGTH.pack(len(data)) + data


def raise_failure(receive: Callable[[int], bytes], begun: bytes = FAILURE) -> NoReturn:
    """Raise what a failure tells.

    Args:
        receive: Gives the next bytes.
        begun: What has been received of ``FAILURE``.
    """
    begun += receive(len(FAILURE) - len(begun))
    if begun != FAILURE:
        raise no_answer(begun)
    length = receive(LENGTH.size)
    (size,) = LENGTH.unpack(length)
    if size > MOST_TOLD_BYTES:
        raise no_answer(begun + length)
    raise_as_told(receive(size))


def no_answer(begun: bytes, rank: int = 0) -> ReplicaError:
    """To raise where a rank sends what it never would."""
    return ReplicaError(
        f"rank {rank} sent {begun.hex(' ')}, which begins no answer; start the same version of "
        "zo_offload on every rank"
    )


def as_told(error: ZOError) -> bytes:
    """An error's kind and words."""
    return json.dumps([type(error).__name__, str(error)[:MOST_WORDS]]).encode()


def raise_as_told(data: bytes) -> NoReturn:
    """Raise an error of that kind, with those words."""
    try:
        name, message = json.loads(data)
    except (ValueError, TypeError, RecursionError):
        name, message = "", f"a rank failed, and what it says cannot be read ({data[:64]!r})"
    kind = getattr(errors, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, ZOError)):
        kind = ReplicaError
    error = kind(message)
    # A rank that stops because of another says so wherever its output goes.
    error.is_told = not isinstance(error, LostRankError)
    raise error
