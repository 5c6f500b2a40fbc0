"""A slot: one version of one unit on disk, behind a header that says whose (``docs/format.md``)."""

import struct
from dataclasses import dataclass, fields
from typing import Any

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.aio import PAGE
from zo_offload.offload.disk import aligned, padded
from zo_offload.ops import crc32c

MAGIC = b"\x89ZOU\r\n\x1a\n"
FORMAT_VERSION = 1
NO_RUN = "00" * 16  # of a base
AGAIN = "remove its folder to begin again from the base"
CONVERT_AGAIN = "convert the model again"
HEADER_BYTES = PAGE
# magic, version, branch, run, base, shapes, codec, unit, zero, step, sequence, lengths, CRCs, life
LAYOUT = struct.Struct("<8sII16s32s32s16siIQQQQIIQ")
CRC = struct.Struct("<I")
CRC_AT = HEADER_BYTES - CRC.size


def slot_bytes(wire_bytes: int, rest_bytes: int) -> int:
    """On disk, of a unit: a header, and each part up to a whole page.

    Example:
        >>> slot_bytes(5000, 100)
        16384
    """
    return HEADER_BYTES + padded(wire_bytes) + padded(rest_bytes)


@dataclass(frozen=True)
class StoredUnit:
    """What a store knows of a unit.

    Attributes:
        index: Its number; any integer of 32 bits.
        name: For messages.
        wire_bytes: Of what travels.
        rest_bytes: Of what stays with the master.
        shapes: SHA-256 over everything that says what the bytes are, in hexadecimal.
    """

    index: int
    name: str
    wire_bytes: int
    rest_bytes: int
    shapes: str

    @property
    def slot_bytes(self) -> int:
        """On disk: a header, and each part up to a whole page."""
        return slot_bytes(self.wire_bytes, self.rest_bytes)

    @property
    def rest_offset(self) -> int:
        """Where the rest begins in a slot; the wire begins after the header."""
        return HEADER_BYTES + padded(self.wire_bytes)

    def __str__(self) -> str:
        return f"unit {self.index} ({self.name or 'ambient'})"


@dataclass(frozen=True)
class Identity:
    """Whose weights a store holds.

    Attributes:
        run: 16 bytes in hexadecimal; all zero for a base, which is of no run.
        base: SHA-256 of the base weights, in hexadecimal.
        codec: Name of the wire's format, up to 16 characters.
    """

    run: str
    base: str
    codec: str

    def __post_init__(self) -> None:
        assert len(bytes.fromhex(self.run)) == 16
        assert len(bytes.fromhex(self.base)) == 32
        assert 0 < len(self.codec.encode("ascii")) <= 16

    @property
    def mend(self) -> str:
        """What to do about files of it that are not as they were written."""
        return CONVERT_AGAIN if self.run == NO_RUN else AGAIN


@dataclass(frozen=True)
class SlotHeader:
    """The first 4,096 bytes of a slot.

    Attributes:
        identity: Run, base and codec.
        unit: Index of the unit.
        shapes: Its shapes' digest.
        branch: Of the journal.
        step: That the weights carry.
        sequence: Larger than that of everything written before.
        wire_bytes: Without padding, as ``rest_bytes``.
        rest_bytes: Likewise.
        wire_crc: CRC-32C of the wire's bytes.
        rest_crc: Likewise.
        life_bytes: Written to the store's disks since it was made, this slot included.

    Example:
        >>> identity = Identity("00" * 16, "00" * 32, "identity")
        >>> header = SlotHeader(identity, 3, "11" * 32, 0, 7, 1, 5, 0, 0, 0, 8192)
        >>> parse(header.pack().numpy().tobytes()) == header
        True
    """

    identity: Identity
    unit: int
    shapes: str
    branch: int
    step: int
    sequence: int
    wire_bytes: int
    rest_bytes: int
    wire_crc: int
    rest_crc: int
    life_bytes: int

    def pack(self) -> torch.Tensor:
        """The block, uint8 ``[4096]``, ready for direct I/O."""
        head = LAYOUT.pack(
            MAGIC,
            FORMAT_VERSION,
            self.branch,
            bytes.fromhex(self.identity.run),
            bytes.fromhex(self.identity.base),
            bytes.fromhex(self.shapes),
            self.identity.codec.encode(),
            self.unit,
            0,
            self.step,
            self.sequence,
            self.wire_bytes,
            self.rest_bytes,
            self.wire_crc,
            self.rest_crc,
            self.life_bytes,
        )
        block = aligned(HEADER_BYTES)
        block[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        crc = bytearray(CRC.pack(crc32c(block[:CRC_AT])))
        block[CRC_AT:] = torch.frombuffer(crc, dtype=torch.uint8)
        return block


def parse(block: bytes) -> SlotHeader | None:
    """The header in a slot's first block; None where there is none, or a damaged one.

    Raises:
        StoreError: It is whole, and of another format version.
    """
    (crc,) = CRC.unpack_from(block, CRC_AT)
    whole = torch.frombuffer(bytearray(block[:CRC_AT]), dtype=torch.uint8)
    if not block.startswith(MAGIC) or crc32c(whole) != crc:
        return None
    _, version, branch, run, base, shapes, codec, unit, _, *numbers = LAYOUT.unpack_from(block)
    if version != FORMAT_VERSION:
        raise StoreError(
            f"slot format {version}, but this zo_offload reads format {FORMAT_VERSION}"
            "; use the version that wrote it"
        )
    name = codec.rstrip(b"\0")
    if not name or not name.isascii():
        raise StoreError(f"codec {name!r}: expected the name of a wire's format")
    identity = Identity(run.hex(), base.hex(), name.decode())
    return SlotHeader(identity, unit, shapes.hex(), branch, *numbers)


def differences(found: Any, expected: Any) -> list[str]:
    """Names each field in which two of a kind differ, with both values.

    Example:
        >>> run, base = "00" * 16, "00" * 32
        >>> differences(Identity(run, base, "bf16"), Identity(run, base, "int8"))
        ["codec: the disk has 'bf16', this run has 'int8'"]
    """
    pairs = {
        field.name: (getattr(found, field.name), getattr(expected, field.name))
        for field in fields(found)
    }
    return [
        f"{name}: the disk has {a!r}, this run has {b!r}"
        for name, (a, b) in pairs.items()
        if a != b
    ]


def check_sizes(unit: StoredUnit, wire: torch.Tensor, rest: torch.Tensor | None) -> None:
    """That memory is as long as what goes there."""
    assert wire.numel() == unit.wire_bytes, unit
    assert rest is None or rest.numel() == unit.rest_bytes, unit
