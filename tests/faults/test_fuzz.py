"""The short form of the fuzzer, and every input that was once answered wrongly."""

import random
from pathlib import Path
from typing import Any

import pytest

from faults import fuzz
from faults.fuzz import CORPUS, Reader, changed
from faults.parsers import PARSERS, Parser
from zo_offload.errors import ZOError

INPUTS = 8


@pytest.mark.parametrize("name", PARSERS)
def test_bytes_are_read_or_refused(name: str, tmp_path: Path):
    chance, reader = random.Random(name), Reader(PARSERS[name], tmp_path)
    for _ in range(INPUTS):
        data = changed(PARSERS[name], chance)
        assert reader.answer(data) is None, data[:200]


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_was_answered_wrongly_once(path: Path, tmp_path: Path):
    name = path.name.rpartition("-")[0]
    assert Reader(PARSERS[name], tmp_path).answer(path.read_bytes()) is None


def refuse(*_: Any) -> None:
    raise ZOError("one line")


def refuse_at_length(*_: Any) -> None:
    raise ZOError("two\nlines")


def fail(*_: Any) -> None:
    raise KeyError("name")


def look_elsewhere(data: bytes, folder: Path) -> None:
    (folder / "../../elsewhere").resolve().write_bytes(data)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (refuse, None),
        (refuse_at_length, "more than a line"),
        (fail, "KeyError: 'name'"),
        (look_elsewhere, "opened "),
    ],
)
def test_a_wrong_answer_is_seen(tmp_path: Path, read: Any, fault: str | None):
    place = tmp_path / "fuzz"
    place.mkdir()
    reader = Reader(Parser(list, read), place)
    found = reader.answer(b"data")
    assert found is None if fault is None else found is not None and found.startswith(fault)


def test_a_parser_that_fails_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a process of its own, whose memory is bounded."""
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    faults, done = fuzz.in_a_child("no such parser", 3, 0, tmp_path)
    assert done == 0
    assert "KeyError" in faults[0]
