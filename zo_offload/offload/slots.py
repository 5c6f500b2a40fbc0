r"""A slot of the unit files, and its first page: which unit, of which run, after which step.

::

    magic     8 bytes   "ZOUNIT\x00\x01", the last byte is the format's version
    unit      u32       index in the model
    shapes   16 bytes   digest of the unit's parameters: names, shapes, dtypes, kind of master
    lineage  32 bytes   digest of the run and its records up to the step
    sequence  u64       of the write among all writes of these files
    step      u64       number of steps in the masters
    written   u64       bytes that these files have taken in all, this slot among them
    wire, rest   u64 each    bytes, without padding
    wire, rest   u32 each    checks (``ops/crc32c.py``)
    check     u32       CRC32C of the page with this field zero
    zeros to 4,096 bytes

Then follow wire and rest, each padded to whole pages. Little-endian throughout.
"""

import struct
from dataclasses import dataclass

import torch

from zo_offload.offload.direct import PAGE, padded
from zo_offload.ops.crc32c import page_crcs

MAGIC = b"ZOUNIT\x00\x01"
PACKED = struct.Struct("<8sI16s32sQQQQQII")
CHECK = struct.Struct("<I")


@dataclass(frozen=True)
class Resident:
    """A unit, as the files know it.

    Attributes:
        index: In the model.
        name: For messages.
        wire_bytes: Of its wire.
        rest_bytes: Of its rest.
        shapes: Sixteen bytes: digest of what its parameters are.
    """

    index: int
    name: str
    wire_bytes: int
    rest_bytes: int
    shapes: bytes

    @property
    def slot_bytes(self) -> int:
        """With the first page."""
        return PAGE + padded(self.wire_bytes) + padded(self.rest_bytes)


@dataclass(frozen=True)
class SlotHeader:
    """See the module."""

    unit: int
    shapes: bytes
    lineage: bytes
    sequence: int
    step: int
    written: int
    wire_bytes: int
    rest_bytes: int
    wire_check: int
    rest_check: int

    def pack(self, page: torch.Tensor) -> None:
        """Write it to a page, uint8 ``[4096]``."""
        page.zero_()
        view = page.numpy().data
        PACKED.pack_into(
            view, 0, MAGIC, self.unit, self.shapes, self.lineage, self.sequence, self.step,
            self.written, self.wire_bytes, self.rest_bytes, self.wire_check, self.rest_check,
        )  # fmt: skip
        CHECK.pack_into(view, PACKED.size, int(page_crcs(page)[0]))

    def is_of(self, unit: Resident) -> bool:
        """Whether the slot holds such a unit."""
        held = (self.unit, self.shapes, self.wire_bytes, self.rest_bytes)
        return held == (unit.index, unit.shapes, unit.wire_bytes, unit.rest_bytes)


def read_header(page: torch.Tensor) -> SlotHeader | None:
    """What a page says; None where it is no header, or a damaged one."""
    raw = bytes(page.numpy().data)
    magic, *fields = PACKED.unpack_from(raw)
    (check,) = CHECK.unpack_from(raw, PACKED.size)
    bare = page.clone()
    bare[PACKED.size : PACKED.size + CHECK.size] = 0
    if magic != MAGIC or int(page_crcs(bare)[0]) != check or any(raw[PACKED.size + CHECK.size :]):
        return None
    return SlotHeader(*fields)
