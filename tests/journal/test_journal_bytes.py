"""The bytes: every float's bits, every cut, every flipped byte, and files made to hurt."""

import logging
import os
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_offload.errors import JournalError
from zo_offload.journal import Flags, Journal, Probe, Record
from zo_offload.journal import records as records_module
from zo_offload.journal.header import (
    HEADER,
    HEADER_BYTES,
    SYNCED_OFFSET,
    Header,
    as_stored,
    read_header,
)
from zo_offload.journal.record import (
    MARKER,
    pack_record,
    pack_rewind,
    unpack_record,
    valid_record_bytes,
)
from zo_offload.journal.records import Scan

FORMAT_PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"

any_bits = st.integers(0, 2**64 - 1).map(
    lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]
)
any_float = st.one_of(st.floats(), any_bits)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
any_record = st.builds(
    Record,
    step=uint64,
    probes=st.lists(st.builds(Probe, uint64, any_float, any_float), max_size=9).map(tuple),
    losses=st.lists(any_float, max_size=20).map(tuple),
    eps=any_float,
    lr=any_float,
    decay=any_float,
    owed=any_float,
    loader_position=uint64,
    generator_position=uint64,
    flags=uint32.map(Flags),
    branch=uint32,
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)  # fmt: skip


def float_bits(record: Record) -> bytes:
    grads = [value for probe in record.probes for value in probe[1:]]
    values = [record.eps, record.lr, record.decay, record.owed, *record.losses, *grads]
    return struct.pack(f"<{len(values)}d", *values)


def integers(record: Record) -> list[int]:
    numbers = [probe.number for probe in record.probes]
    positions = [record.loader_position, record.generator_position]
    return [record.step, record.branch, record.flags, *positions, *numbers]


@given(any_record, uint32)
def test_a_record_round_trips_to_the_bit(record, header_crc):
    packed = pack_record(record, header_crc)
    assert valid_record_bytes(packed, 0, header_crc) == len(packed)
    back = unpack_record(packed, 0)
    assert float_bits(back) == float_bits(record)
    assert integers(back) == integers(record)


@given(st.dictionaries(st.text(), any_json, max_size=5), uint32, uint32)
def test_a_header_round_trips(fields, contract, branch):
    packed = Header(fields, contract, branch).pack()
    found = read_header(BytesIO(packed), Path("j"), len(packed))
    assert found.header == Header(as_stored(fields), contract, branch)
    assert (found.num_bytes, found.synced) == (len(packed), len(packed))


@given(any_record, uint32)
def test_a_record_is_not_valid_under_another_header(record, header_crc):
    packed = pack_record(record, header_crc)
    assert valid_record_bytes(packed, 0, header_crc ^ 1) == 0


@given(st.lists(any_record, max_size=6), st.integers(1, 300))
def test_a_scan_does_not_depend_on_its_chunks(records, chunk_bytes):
    packed = [
        pack_record(Record(step, r.probes, r.losses, r.eps, r.lr, r.decay), 1)
        for step, r in enumerate(records)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "CHUNK_BYTES", chunk_bytes)
        found, tail = Scan(Path("j"), 0, 1, 0).read(BytesIO(b"".join(packed) + b"\xb5ZO"))
    assert [pack_record(record, 1) for record in found] == packed
    assert tail == 3


def unmarked(content: bytes) -> bytes:
    """Without what says how much of it is on the disk."""
    return content[:SYNCED_OFFSET] + content[HEADER_BYTES:]


def ends(content: bytes) -> list[int]:
    """Offsets at which the header and each record end."""
    *starts, end = (
        *(match.start() for match in re.finditer(re.escape(MARKER), content)),
        len(content),
    )
    return [*starts, end]


def test_every_cut_opens_to_the_longest_whole_prefix(small, header, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of them
    content = small.read_bytes()
    for cut in range(len(content)):
        small.write_bytes(content[:cut])
        num_whole = sum(end <= cut for end in ends(content)) - 1
        if num_whole < 0:
            with pytest.raises(JournalError, match=r"not a journal|does not fit"):
                Journal.open(small, header)
            continue
        assert len(Journal.read(small).records) == num_whole
        assert small.stat().st_size == cut, "read changed the file"
        Journal.open(small, header).close()
        assert unmarked(small.read_bytes()) == unmarked(content[: ends(content)[num_whole]])


def test_every_flipped_byte_is_seen(small, header, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of them
    content = small.read_bytes()
    _, _, last_start, _ = ends(content)
    of_the_mark = range(SYNCED_OFFSET, HEADER_BYTES)  # a damaged one is none
    for at in sorted(set(range(len(content))) - set(of_the_mark)):
        for mask in (0x01, 0x80, 0xFF):
            small.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
            if at < last_start:
                with pytest.raises(JournalError):
                    Journal.open(small, header)
            else:  # the last record fails: a torn tail
                Journal.open(small, header).close()
                assert unmarked(small.read_bytes()) == unmarked(content[:last_start])


def test_damage_inside_names_step_and_byte(small, header):
    content = bytearray(small.read_bytes())
    start, following, *_ = ends(bytes(content))[1:]
    content[start + 50] ^= 1
    small.write_bytes(content)
    message = (
        f"the record of step 1 at byte {start} is damaged: step 2 at byte {following} is intact"
    )
    with pytest.raises(JournalError, match=message):
        Journal.open(small, header)
    assert small.read_bytes() == content


def torn_inside(path, header, make_record, synced_steps):
    """Four steps, so many of them synced, and a power cut that left the last alone whole."""
    with Journal.create(path, header) as journal:
        for step in range(4):
            journal.append(make_record(step))
            if step + 1 == synced_steps:
                journal.sync()
        content = bytearray(path.read_bytes())
    at = ends(bytes(content))[2] + 50
    content[at : at + 8] = bytes(8)
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("synced_steps", [0, 2])
def test_what_was_not_synced_is_a_tail_whatever_lies_behind(
    path, header, make_record, caplog, synced_steps
):
    torn_inside(path, header, make_record, synced_steps)
    assert Journal.read(path).next_step == 2
    with Journal.open(path, header) as journal:
        assert journal.next_step == 2
        for step in (2, 3):
            journal.append(make_record(step))
    assert "torn tail" in caplog.text
    Journal.create(path.with_name("whole"), header).close()
    with Journal.open(path.with_name("whole"), header) as whole:
        for step in range(4):
            whole.append(make_record(step))
    assert path.read_bytes() == path.with_name("whole").read_bytes()


@pytest.mark.parametrize("marked", [True, False])
def test_what_was_synced_is_damaged(path, header, make_record, marked):
    """Also where what says how much that is has been damaged."""
    content = bytearray(torn_inside(path, header, make_record, synced_steps=3 if marked else 0))
    if not marked:
        content[SYNCED_OFFSET] ^= 1
        path.write_bytes(content)
    with pytest.raises(JournalError, match=r"the record of step 2 .* step 3 at .* is intact"):
        Journal.open(path, header)
    assert path.read_bytes() == content


@pytest.mark.parametrize("order", [(0, 2), (0, 0), (1,), (0, 1, 2, 2)])
def test_a_step_out_of_sequence_is_refused(small, order):
    content = small.read_bytes()
    bounds = ends(content)
    pieces = [content[bounds[step] : bounds[step + 1]] for step in order]
    small.write_bytes(content[: bounds[0]] + b"".join(pieces))
    with pytest.raises(
        JournalError, match=rf"\(1, 0, {order[-1]}\) where \(1, 0, {len(order) - 1}\)"
    ):
        Journal.read(small)


def test_a_torn_tail_is_cut_with_a_warning(small, header, caplog):
    whole = small.read_bytes()
    small.write_bytes(whole + bytes(5000))  # some file systems leave zeros
    with caplog.at_level(logging.WARNING):
        Journal.open(small, header).close()
    assert small.read_bytes() == whole
    assert f"torn tail of 5000 bytes at byte {len(whole)}" in caplog.text


def test_marker_bytes_in_a_torn_record_are_not_a_record(path, header):
    trap = struct.unpack("<d", MARKER * 2)[0]
    with Journal.create(path, header) as journal:
        journal.append(Record(0, (), (trap,) * 50, eps=trap, lr=trap))
    path.write_bytes(path.read_bytes()[:-1])
    with Journal.open(path, header) as journal:
        assert journal.next_step == 0


def test_a_record_of_another_run_is_refused(small, tmp_path, header):
    content = small.read_bytes()
    Journal.create(tmp_path / "other", header | {"seed": 8}).close()
    (tmp_path / "other").write_bytes(
        (tmp_path / "other").read_bytes() + content[ends(content)[0] :]
    )
    assert len(Journal.read(tmp_path / "other").records) == 0


def test_a_tail_longer_than_a_crash_leaves_is_refused(small, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_TAIL_BYTES", 1000)
    small.write_bytes(small.read_bytes() + bytes(1001))
    with pytest.raises(JournalError, match=r"step 3 at byte .* over 1000 bytes lie behind it"):
        Journal.read(small)


def test_a_sparse_terabyte_is_refused_without_reading_it(small):
    with small.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(JournalError, match="bytes lie behind it"):
        Journal.read(small)


def test_a_tail_of_false_markers_is_refused(small):
    content = bytearray(small.read_bytes() + MARKER * 5000)
    content[SYNCED_OFFSET] ^= 1  # so that all of it counts
    small.write_bytes(content)
    with pytest.raises(JournalError, match="false records"):
        Journal.read(small)


def header_of(text: bytes, *, length: int | None = None, version: int = 2) -> bytes:
    size = len(text) if length is None else length
    start = HEADER.pack(b"\x89ZOJ\r\n\x1a\n", version, 1, size, 0)
    return start + struct.pack("<IQI", zlib.crc32(text, zlib.crc32(start)), 0, 0) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a journal"),
        (b"PK\x03\x04" + bytes(100), "not a journal"),
        (header_of(b"{}", version=1), "format 1, but this zo_offload reads format 2"),
        (header_of(b"{}", length=3), "does not fit: the file has 46"),
        (header_of(b"{}", length=2**64 - 1), "does not fit"),
        (header_of(b"{}")[:-1] + b"]", "header is damaged"),
        (header_of(b"{"), "not JSON"),
        (header_of(b"\xff"), "not JSON"),
        (header_of(b"[" * 200_000), "not JSON"),
        (header_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (header_of(b'{"a":NaN}'), "not JSON"),
        (header_of(b"[]"), "not a canonical JSON object"),
        (header_of(b'{"a":1,"a":2}'), "not a canonical JSON object"),
        (header_of(b'{"b":1,"a":2}'), "not a canonical JSON object"),
        (header_of(b'{"a": 1}'), "not a canonical JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_headers_are_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(JournalError, match=message):
        Journal.read(path)


def test_an_unknown_kind_of_record_is_refused(small):
    content = small.read_bytes()
    start = ends(content)[-2]
    header_crc = struct.unpack_from("<I", content, HEADER.size)[0]
    body = content[start + 8 : start + 12] + struct.pack("<I", 2) + content[start + 16 :]
    crc = struct.pack("<I", zlib.crc32(body, header_crc))
    small.write_bytes(content[:start] + MARKER + crc + body)
    with pytest.raises(JournalError, match=r"\(2, 0, 2\) where \(1, 0, 2\) belongs"):
        Journal.read(small)


def test_a_rewind_takes_steps_back_and_begins_a_branch(small, make_record, capsys):
    with Journal.open(small, Journal.read(small).header.fields) as journal:
        journal.rewind(1)
        assert (journal.branch, journal.next_step) == (1, 1)
        with pytest.raises(JournalError, match=r"\(branch, step\) \(0, 1\) cannot follow"):
            journal.append(make_record(1))
        journal.append(make_record(1, branch=1))
        journal.rewind(2)  # takes nothing back
        journal.append(make_record(2, num_probes=3, branch=2))
        kept = list(journal.records)
    back = Journal.read(small)
    assert list(back.records) == kept == list(Journal.of(small.read_bytes(), "copy").records)
    assert (back.branch, [record.branch for record in kept]) == (2, [0, 1, 2])
    (program,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(), re.DOTALL)
    exec(compile(program, str(FORMAT_PAGE), "exec"), names := {})
    _, steps = names["read_journal"](small)
    assert [len(step["coefficients"]) for step in steps] == [1, 1, 3]


def test_a_rewind_past_the_end_is_refused(small):
    with Journal.open(small, Journal.read(small).header.fields) as journal:
        with pytest.raises(JournalError, match="cannot rewind to step 4: there are 3"):
            journal.rewind(4)
        assert journal.next_step == 3


@pytest.mark.parametrize(("branch", "step"), [(0, 1), (2, 1), (1, 4)])
def test_a_rewind_out_of_place_is_damage(small, branch, step):
    journal = Journal.read(small)
    with small.open("ab") as file:
        file.write(pack_rewind(branch, step, journal.header.crc))
    with pytest.raises(JournalError, match=r"step 3 .* is damaged: \(kind, branch, step\) is \(2"):
        Journal.read(small)


def test_in_memory_as_in_a_file(path, header, make_record):
    memory = Journal.memory(header)
    with Journal.create(path, header) as journal:
        for step in range(3):
            memory.append(make_record(step))
            journal.append(make_record(step))
        memory.rewind(2)
        journal.rewind(2)
    assert memory.content == path.read_bytes()
    assert list(Journal.of(memory.content, "memory").records) == list(memory.records)


def test_the_format_page_shows_these_bytes(path):
    rows = re.findall(r"^[0-9a-f]{8}  ((?:[0-9a-f]{2} ?)+)", FORMAT_PAGE.read_text(), re.MULTILINE)
    shown = bytes.fromhex(" ".join(rows))
    with Journal.create(path, {"seed": 0}) as journal:
        journal.append(
            Record(0, (Probe(0, 2.5, 2.5e-6),), (0.75, 0.5), 1e-3, 1e-6, 1.0, 1.0, 16, 2)
        )
    assert path.read_bytes() == shown


def test_the_reader_on_the_format_page_reads(small, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(), re.DOTALL)
    names = {}
    exec(compile(program, str(FORMAT_PAGE), "exec"), names)
    header, steps = names["read_journal"](small)
    journal = Journal.read(small)
    assert header == journal.header.fields
    assert [step["coefficients"] for step in steps] == [
        [probe.coefficient for probe in record.probes] for record in journal.records
    ]


def test_a_hundred_thousand_steps_load(path, header):
    Journal.create(path, header).close()
    content = path.read_bytes()
    crc = struct.unpack_from("<I", content, HEADER.size)[0]
    probes, losses = (Probe(0, 2.5, 2.5e-6),), (0.7, 0.6)
    steps = (pack_record(Record(step, probes, losses, 1e-3, 1e-6), crc) for step in range(100_000))
    path.write_bytes(content + b"".join(steps))
    records = Journal.read(path).records
    assert len(records) == 100_000
    assert records[99_999].step == 99_999
