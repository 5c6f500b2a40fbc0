"""A slot's header is what the format page says, to the byte."""

import re
from pathlib import Path

import torch

from offload.common import IDENTITY, created, opened
from zo_offload.offload.aio import PAGE
from zo_offload.offload.disk import aligned
from zo_offload.offload.slot import SlotHeader, parse
from zo_offload.ops import crc32c

FORMAT_PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
BYTES = {"u32": 4, "i32": 4, "u64": 8}
HEADER = SlotHeader(IDENTITY, -1, "ef" * 32, 3, 1 << 40, 5, 6, 7, 8, 9, 10)
MAGIC = bytes.fromhex("895a4f550d0a1a0a")


def rows() -> list[tuple[int, int]]:
    """Offset and length of each field on the page."""
    text = FORMAT_PAGE.read_text().split("## Slot\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    lengths = [BYTES.get(kind) or int(kind.split()[0].replace(",", "")) for _, kind in found]
    return [(int(at), length) for (at, _), length in zip(found, lengths, strict=True)]


def test_the_page_leaves_no_gap():
    end = 0
    for at, length in rows():
        assert at == end
        end = at + length
    assert end == PAGE


def test_the_fields_are_where_the_page_says():
    block = HEADER.pack().numpy().tobytes()
    fields = [block[at : at + length] for at, length in rows()]
    assert fields[0] == MAGIC
    assert [fields[i] for i in (3, 4, 5)] == [b"\xab" * 16, b"\xcd" * 32, b"\xef" * 32]
    assert fields[6] == b"bf16".ljust(16, b"\0")
    numbers = [int.from_bytes(fields[i], "little") for i in (1, 2, *range(7, 16))]
    assert numbers == [1, 3, 2**32 - 1, 0, 1 << 40, 5, 6, 7, 8, 9, 10]
    assert not any(fields[16])
    crc = crc32c(torch.frombuffer(bytearray(block[:-4]), dtype=torch.uint8))
    assert fields[17] == crc.to_bytes(4, "little")
    assert parse(block) == HEADER


def test_a_slot_on_disk(tmp_path: Path):
    """Header, wire and rest, each to a whole page."""
    (place,) = created(tmp_path)
    wire, rest = aligned(PAGE + 100), aligned(77)
    with opened([place]) as store:
        store.write(1, wire.fill_(1), rest.fill_(2), step=4, branch=1).result()
    slot = (place / "units.bin").read_bytes()[: 4 * PAGE]
    assert parse(slot[:PAGE]) == SlotHeader(
        IDENTITY,
        unit=1,
        shapes=store._units[1].shapes,
        branch=1,
        step=4,
        sequence=1,
        wire_bytes=PAGE + 100,
        rest_bytes=77,
        wire_crc=crc32c(wire),
        rest_crc=crc32c(rest),
        life_bytes=4 * PAGE,
    )
    assert slot[PAGE : 3 * PAGE] == (b"\1" * (PAGE + 100)).ljust(2 * PAGE, b"\0")
    assert slot[3 * PAGE :] == (b"\2" * 77).ljust(PAGE, b"\0")
