"""Units packed by their codecs: in buffers beside the store, on their way to the device.

What is frozen is packed once, when it is taken over, and rests so.
"""

from threading import Lock

import torch

from zo_offload import ops
from zo_offload.offload.memory import host_buffer
from zo_offload.ops import Span
from zo_offload.ops.layout import HEADER_BYTES
from zo_offload.ops.lossless12 import read_header
from zo_offload.units import IDENTITY, Unit

LOSSLESS = "lossless12"
NUM_BUFFERS = 2  # one is filled while a device reads the other
Piece = tuple[int, torch.Tensor]  # first byte in the unit's packed buffer, bytes


def pack(unit: Unit, wire: torch.Tensor, packed: torch.Tensor) -> list[Piece]:
    """Pack a unit, and say which bytes matter.

    Args:
        unit: Which.
        wire: uint8 ``[unit.wire_bytes]``, as it rests.
        packed: uint8 ``[unit.packed_bytes]`` or more, to be written.
    """
    pieces: list[Piece] = []
    for span in unit.spans:
        room, resting = span.packed(packed), span.wire(wire)
        if span.rests_packed:
            used = used_bytes(span, resting)
            room[:used].copy_(resting[:used])
        elif span.codec == IDENTITY:
            room.copy_(resting)
            used = span.wire_bytes
        else:
            used = ops.pack(span.layout, resting, room)
        first = span.packed_offset
        pieces.append((first, packed[first : first + used]))
    return pieces


def resting_pieces(unit: Unit, wire: torch.Tensor) -> list[Piece]:
    """Of a unit that travels as it rests, the bytes that matter."""
    assert not unit.packs_on_its_way
    if not any(span.layout.kind == LOSSLESS for span in unit.spans):
        return [(0, wire)]
    starts = [(span, span.packed_offset) for span in unit.spans]
    return [(first, wire[first : first + used_bytes(s, s.wire(wire))]) for s, first in starts]


def used_bytes(span: Span, packed: torch.Tensor) -> int:
    """How many of a span's resting bytes matter: lossless12 says itself how many."""
    if span.layout.kind != LOSSLESS:
        return span.wire_bytes
    header = packed[:HEADER_BYTES].cpu().numpy()
    return read_header(header, span.elements, num_bytes=packed.nbytes).bytes


class Packer:
    """Packs units for the pipeline, into memory that an accelerator can copy from.

    Args:
        largest: Bytes of the largest packed unit.
        pin_memory: Page-lock the buffers.
    """

    def __init__(self, largest: int, pin_memory: bool) -> None:
        self._buffers = [host_buffer(largest, pin_memory) for _ in range(NUM_BUFFERS)]
        self._until: list[torch.Event | None] = [None] * NUM_BUFFERS
        self._next = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """Of host memory."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def pack(self, unit: Unit, wire: torch.Tensor) -> tuple[list[Piece], int]:
        """The unit's pieces, valid until two more are packed; and the number of their buffer."""
        with self._lock:
            number, self._next = self._next, (self._next + 1) % NUM_BUFFERS
            event = self._until[number]
            if event is not None:
                event.synchronize()
            return pack(unit, wire, self._buffers[number]), number

    def release(self, number: int, after: "torch.Event | None") -> None:
        """A buffer is free, or will be after an event."""
        self._until[number] = after
