"""What a store's slots hold when it is opened: each unit's newest version that is whole.

After a clean end headers are believed. After any other, the bytes behind them are read and their
CRC compared, since a crash may have left a header of one version before the bytes of another.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from zo_offload.errors import StoreError
from zo_offload.offload.direct import DirectFile, Piece
from zo_offload.offload.disk import aligned
from zo_offload.offload.manifest import Geometry
from zo_offload.offload.slot import (
    HEADER_BYTES,
    Identity,
    SlotHeader,
    StoredUnit,
    differences,
    parse,
)


@dataclass
class Recovery:
    """What was found.

    Attributes:
        headers: Of each unit's newest whole version.
        slots: Where that lies.
        torn: Slots that hold part of a version, newer than that in ``headers`` or with a damaged
            header of their own, in words.
        sequence: The largest number seen.
        life_bytes: Written to the disks so far, as far as it was recorded.
        verified: Whether all bytes were read and compared.
    """

    headers: dict[int, SlotHeader] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    torn: dict[int, str] = field(default_factory=dict)
    sequence: int = 0
    life_bytes: int = 0
    verified: bool = False


def recover(
    file: DirectFile,
    geometry: Geometry,
    identity: Identity,
    units: Sequence[StoredUnit],
    clean: tuple[int, int] | None,
) -> Recovery:
    """Read the headers, and what is behind them where that is in doubt.

    Args:
        file: The slots.
        geometry: Where they lie.
        identity: Whose they must be.
        units: What they may hold.
        clean: What the last clean end said of them; None after an unclean one.

    Raises:
        StoreError: A slot is whole, and of another run, base, codec or model.
    """
    known = {unit.index: unit for unit in units}
    found = Recovery()
    versions: dict[int, list[tuple[SlotHeader, int]]] = {}
    for slot in range(geometry.num_slots):
        header = _header(file, slot, geometry, identity, known, found.torn)
        if header:
            versions.setdefault(header.unit, []).append((header, slot))
            found.sequence = max(found.sequence, header.sequence)
            found.life_bytes = max(found.life_bytes, header.life_bytes)
    found.verified = clean is None or clean[0] != found.sequence or bool(found.torn)
    if clean is not None:
        found.life_bytes = max(found.life_bytes, clean[1])
    room = aligned(geometry.slot_bytes) if found.verified and versions else None
    for index, candidates in versions.items():
        candidates.sort(key=lambda pair: pair[0].sequence, reverse=True)
        _choose(found, file, geometry, known[index], candidates, room)
    return found


def _header(
    file: DirectFile,
    slot: int,
    geometry: Geometry,
    identity: Identity,
    known: dict[int, StoredUnit],
    torn: dict[int, str],
) -> SlotHeader | None:
    offset = slot * geometry.slot_bytes
    block = aligned(HEADER_BYTES)
    file.read_now(Piece(offset, block))
    path, at = file.where(offset)
    try:
        header = parse(block.numpy().tobytes())
    except StoreError as error:
        raise StoreError(f"{path}: at offset {at:,}: {error}; {identity.mend}") from error
    if header is None:
        if block.any():
            torn[slot] = f"slot {slot}: its header is damaged"
        return None
    differing = differences(header.identity, identity)
    unit = known.get(header.unit)
    if unit is None:
        differing.append(f"unit {header.unit}: this run has none of that number")
    elif (header.shapes, header.wire_bytes, header.rest_bytes) != (
        unit.shapes,
        unit.wire_bytes,
        unit.rest_bytes,
    ):
        differing.append(f"{unit}: its shapes are others in this run")
    if differing:
        raise StoreError(
            f"{path}: slot {slot} at offset {at:,} is of something else: {differing[0]}; "
            f"{identity.mend}"
        )
    return header


def _choose(
    found: Recovery,
    file: DirectFile,
    geometry: Geometry,
    unit: StoredUnit,
    candidates: Sequence[tuple[SlotHeader, int]],
    room: torch.Tensor | None,
) -> None:
    """Take the newest whole version; newer ones are torn."""
    for header, slot in candidates:
        fault = None
        if room is not None:
            fault = _fault(file, slot * geometry.slot_bytes, unit, header, room)
        if fault is None:
            found.headers[unit.index], found.slots[unit.index] = header, slot
            return
        found.torn[slot] = f"{unit}, step {header.step}: {fault}"


def _fault(
    file: DirectFile, offset: int, unit: StoredUnit, header: SlotHeader, room: torch.Tensor
) -> str | None:
    """What is wrong with a slot's bytes."""
    wire, rest = slot_pieces(
        offset, unit, room[: unit.wire_bytes], room[unit.rest_offset :][: unit.rest_bytes]
    )
    try:
        return damage(header, file.read([wire, rest]).result())
    except StoreError as error:  # a sector that cannot be read: an older version may be whole
        return str(error)


def slot_pieces(
    offset: int, unit: StoredUnit, wire: torch.Tensor, rest: torch.Tensor | None
) -> list[Piece]:
    """Where a version's parts lie."""
    pieces = [Piece(offset + HEADER_BYTES, wire)]
    return pieces if rest is None else [*pieces, Piece(offset + unit.rest_offset, rest)]


def read_version(
    file: DirectFile,
    offset: int,
    unit: StoredUnit,
    header: SlotHeader,
    outs: tuple[torch.Tensor, torch.Tensor | None],
    release: Callable[[bool], None],
    mend: str = "start again, and the unit is restored",
) -> Future[int]:
    """Read a version and compare it with its header.

    Args:
        file: The slots.
        offset: Of the version's slot.
        unit: Whose version it is.
        header: Of the version.
        outs: Memory for the wire, and for the rest if that is wanted.
        release: Called when the read is over, with whether the bytes are right.
        mend: What to do about bytes that are not, for the message.

    Returns:
        A future of the step that the version carries; a StoreError where the bytes are others.
    """
    right = False

    def finish(crcs: list[int]) -> int:
        nonlocal right
        fault = damage(header, crcs)
        if fault:
            path, at = file.where(offset)
            raise StoreError(
                f"{path}: {unit}, step {header.step}, in the slot at offset {at:,}: {fault}; the "
                f"disk or memory is at fault: {mend}"
            )
        right = True
        return header.step

    pieces = slot_pieces(offset, unit, *outs)
    return file.read(pieces, finish, lambda: release(right))


def damage(header: SlotHeader, crcs: Sequence[int]) -> str | None:
    """The first part that is not what was written; None where all are.

    Args:
        header: Of the version.
        crcs: Of the wire, and of the rest if that was read.
    """
    parts = ("wire", header.wire_crc), ("rest", header.rest_crc)
    for (name, written), crc in zip(parts, crcs, strict=False):
        if crc != written:
            return f"its {name} has CRC-32C {crc:08x}, written with {written:08x}"
    return None
