"""One step as bytes (``docs/format.md``): little endian, no padding, every float's exact bits."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

from zo_offload.errors import JournalError

MARKER = b"\xb5ZOR"
STEP = 1
REWIND = 2
CRC = struct.Struct("<I")
# length, kind, branch, flags, num_probes, num_losses, step, loader, generator, eps, lr, decay, owed
BODY = struct.Struct("<6I3Q4d")
PROBE = struct.Struct("<Qdd")  # number, projected_grad, coefficient
BODY_OFFSET = len(MARKER) + CRC.size
PROBES_OFFSET = BODY_OFFSET + BODY.size
CHECKED = struct.Struct("<4sII12xII")  # marker, CRC, length, num_probes, num_losses
PLACE = struct.Struct("<12xII12xQ")  # kind, branch, step
MOVES = struct.Struct("<20xII")  # flags, num_probes
MAX_PROBES = 1 << 16  # a probe is 16 bits of the noise counter
MAX_LOSSES = 1 << 20


class Probe(NamedTuple):
    """One direction of a step: its number in the noise counter, and what became of it."""

    number: int
    projected_grad: float
    coefficient: float  # of the step itself: new = master - coefficient * z


class Flags(IntFlag):
    """What else is known of a step. Bits unknown to a reader are kept, and change no replay."""

    NONE = 0
    SKIPPED = 1  # nothing was applied: a loss was not finite, or far too high
    ROLLED_BACK = 2  # of a rewind: what follows goes along other directions


@dataclass(frozen=True, slots=True)
class Record:
    """One step. Floats are float64 and keep their exact bits, whatever they are.

    Args:
        step: steps before this one; a unit at step s carries records 0 .. s - 1.
        probes: in the order in which their directions are added.
        losses: one a lane, in the engine's lane order.
        eps: perturbation scale of the step.
        lr: learning rate of the step.
        decay: factor on the weights for weight decay, 1.0 for none.
        owed: factor for weight decay that is gathered and not yet applied when the step ends.
        loader_position: samples consumed when the step ends.
        generator_position: position of the lanes' generators when the step ends.
        flags: see :class:`Flags`.
        branch: which line of the run's history, counted up by each rewind.
    """

    step: int
    probes: tuple[Probe, ...]
    losses: tuple[float, ...]
    eps: float
    lr: float
    decay: float = 1.0
    owed: float = 1.0
    loader_position: int = 0
    generator_position: int = 0
    flags: Flags = Flags.NONE
    branch: int = 0


def pack_record(record: Record, header_crc: int) -> bytes:
    """The bytes of one record.

    Raises:
        JournalError: more probes or losses than the format holds, or an integer out of range.
    """
    num_probes, num_losses = len(record.probes), len(record.losses)
    if num_probes > MAX_PROBES or num_losses > MAX_LOSSES:
        raise JournalError(
            f"step {record.step}: {num_probes} probes and {num_losses} losses do not fit a record: "
            f"at most {MAX_PROBES} and {MAX_LOSSES}"
            "; write fewer zeroth_order.probes or micro-batches a step"
        )
    # fmt: off
    body = (
        record_bytes(num_probes, num_losses), STEP, record.branch, record.flags,
        num_probes, num_losses, record.step, record.loader_position, record.generator_position,
        record.eps, record.lr, record.decay, record.owed,
    )
    # fmt: on
    try:
        checked = b"".join(
            (
                BODY.pack(*body),
                *(PROBE.pack(*probe) for probe in record.probes),
                struct.pack(f"<{num_losses}d", *record.losses),
            )
        )
    except struct.error as error:
        raise JournalError(
            f"step {record.step}: a value does not fit: {error}; give 64-bit numbers, counts from 0"
        ) from error
    return _sealed(checked, header_crc)


def pack_rewind(branch: int, step: int, header_crc: int, flags: Flags = Flags.NONE) -> bytes:
    """The bytes that begin a branch: of what was recorded before, steps 0 to ``step - 1`` stay."""
    counts = (0, 0)  # probes, losses
    body = (record_bytes(*counts), REWIND, branch, flags, *counts, step, 0, 0, 0.0, 0.0, 1.0, 1.0)
    return _sealed(BODY.pack(*body), header_crc)


def _sealed(checked: bytes, header_crc: int) -> bytes:
    return MARKER + CRC.pack(zlib.crc32(checked, header_crc)) + checked


def record_bytes(num_probes: int, num_losses: int) -> int:
    """Length of a record."""
    return PROBES_OFFSET + PROBE.size * num_probes + 8 * num_losses


def valid_record_bytes(data: bytes | bytearray, offset: int, header_crc: int) -> int:
    """Length of the whole, intact record at ``offset``; 0 when there is none."""
    room = len(data) - offset
    if room < PROBES_OFFSET:
        return 0
    marker, crc, length, num_probes, num_losses = CHECKED.unpack_from(data, offset)
    if (
        marker != MARKER
        or num_probes > MAX_PROBES
        or num_losses > MAX_LOSSES
        or length != record_bytes(num_probes, num_losses)
        or length > room
        or zlib.crc32(data[offset + BODY_OFFSET : offset + length], header_crc) != crc
    ):
        return 0
    return length


def packed_at(data: bytes | bytearray, start: int) -> bytes:
    """The bytes of the record at ``start``."""
    length, *_ = BODY.unpack_from(data, start + BODY_OFFSET)
    return bytes(data[start : start + length])


def moves_at(data: bytes | bytearray, start: int) -> tuple[bytes, ...]:
    """What decides a replay, of the record at ``start``: its branch does not.

    The rate is among it: with momentum it acts on the steps before, too.
    """
    packed = packed_at(data, start)
    _, num_probes = MOVES.unpack_from(packed)
    factors = PROBES_OFFSET - 3 * 8  # lr, decay and owed
    return (
        packed[20:24],  # flags
        packed[32:40],  # step
        packed[factors : PROBES_OFFSET + PROBE.size * num_probes],
    )


def unpack_record(data: bytes | bytearray, offset: int) -> Record:
    """The record at ``offset``, which :func:`valid_record_bytes` has checked."""
    # fmt: off
    (
        _, _, branch, flags, num_probes, num_losses, step, loader, generator, eps, lr, decay, owed
    ) = BODY.unpack_from(data, offset + BODY_OFFSET)
    # fmt: on
    losses_offset = offset + record_bytes(num_probes, 0)
    return Record(
        step=step,
        probes=tuple(map(Probe._make, unpack_probes(data, offset))),
        losses=struct.unpack_from(f"<{num_losses}d", data, losses_offset),
        eps=eps,
        lr=lr,
        decay=decay,
        owed=owed,
        loader_position=loader,
        generator_position=generator,
        flags=Flags(flags),
        branch=branch,
    )


def unpack_probes(data: bytes | bytearray, start: int) -> Iterator[tuple[int, float, float]]:
    """The fields of each :class:`Probe` of the record at ``start``."""
    _, num_probes = MOVES.unpack_from(data, start)
    return PROBE.iter_unpack(data[start + PROBES_OFFSET : start + record_bytes(num_probes, 0)])
