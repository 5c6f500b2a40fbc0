"""Bytes for the parsers: their own, changed; what is answered is a value or an error of ours.

A plain fuzzer, seeded: no coverage is measured. Bits flip, pieces go, come twice or from elsewhere,
numbers become the largest there are; in JSON any value becomes an odd one. Half of what has a
checksum gets the right one again, or nothing behind it would ever be reached.

Each parser has a process of its own, whose memory and processor time are bounded, and which tells
of every file opened outside its folder. An input that was answered wrongly goes to ``corpus/``.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from forked import Forked

import zo_offload
from faults.parsers import PARSERS, Parser
from zo_offload.errors import ZOError

CORPUS = Path(__file__).with_name("corpus")
ROOM = 1 << 30  # bytes of address space, more than at first
CPU_SECONDS = 10.0  # of one input
MOST_SHOWN = 5
ODD: list[Any] = [
    None, True, -1, 0, 2**31, 2**64, -(2**63), 10**400, 1e308, float("inf"), float("nan"), "", "\0",
    "../../etc/passwd", "/etc/passwd", "\ud800", "x" * 70_000, [], {}, [[]], {"": None}, "8GiB",
    [["/etc/passwd", 1, "", 0]], "@deep@",
]  # fmt: skip
DEEP = b"[" * 100_000 + b"]" * 100_000
TEXTS = [
    b"\xff", b"\0", b"\r\n", b"\t", b'"', b"{", b"[" * 100_000, b"9" * 5000, b"NaN", b"1e999",
    b"../../x", b"\xef\xbb\xbf", "\u0663\u2028".encode(), b"-0", b'{"a":' * 50_000,
]  # fmt: skip


def run(count: int, seed: int) -> Iterator[tuple[str, list[str], int]]:
    """Every parser, in equal parts: its name, what was answered wrongly, and how many inputs."""
    each = -(-count // len(PARSERS))
    for name in PARSERS:
        with tempfile.TemporaryDirectory() as folder:
            faults, done = in_a_child(name, each, seed, Path(folder))
        yield name, faults, done


def in_a_child(name: str, count: int, seed: int, folder: Path) -> tuple[list[str], int]:
    """Fuzz one parser in a process of its own."""
    out, errors, last = (folder / each for each in ("out", "errors", "last"))
    child = Forked("faults.fuzz:program", name, count, seed, str(folder), out=out, errors=errors)
    code = child.wait(3600)
    if code == 0:
        found = json.loads(child.stdout.splitlines()[-1])
        return found["faults"], found["inputs"]
    child.kill()
    kept = _keep(name, last.read_bytes() if last.exists() else b"")
    return [f"ended with {code} at {kept}: {errors.read_text()[-2000:]}"], 0


def program(name: str, count: int, seed: int, folder: str) -> None:
    faults, parser = [], PARSERS[name]
    chance = random.Random(f"{name} {seed}")
    reader = Reader(parser, Path(folder))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    for _ in range(count):
        data = changed(parser, chance)
        fault = reader.answer(data)
        if fault:
            faults.append(f"{_keep(name, data)}: {fault}")
            if len(faults) == MOST_SHOWN:
                break
    print(json.dumps({"faults": faults, "inputs": reader.answered}))


class Reader:
    """Gives a parser bytes, within bounds.

    Args:
        parser: The parser.
        folder: For its files.
    """

    def __init__(self, parser: Parser, folder: Path) -> None:
        self._parser = parser
        self._place, self._last = folder / "place", folder / "last"
        self._opened: list[str] = []
        self._watched = False
        self.answered = 0
        self._place.mkdir()
        for sample in parser.samples():
            with suppress(ZOError):  # imports what it needs
                parser.read(sample, self._empty())
        allowed = (sys.prefix, sys.base_prefix, str(Path(zo_offload.__file__).parent), "/proc")
        self._allowed = (*allowed, str(folder))
        _listen_for(self)
        signal.signal(signal.SIGVTALRM, _too_long)

    def answer(self, data: bytes) -> str | None:
        """What is wrong with how an input is answered; None where nothing is."""
        place = self._empty()
        self._last.write_bytes(data)
        self.answered += 1
        try:
            self._opened.clear()
            self._watched = True
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
            self._parser.read(data, place)
        except ZOError as error:
            return f"more than a line: {error!r}" if "\n" in str(error) else self._escaped()
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self._watched = False
        return self._escaped()

    def _empty(self) -> Path:
        shutil.rmtree(self._place)
        self._place.mkdir()
        return self._place

    def _escaped(self) -> str | None:
        return f"opened {self._opened[0]}" if self._opened else None

    def hear(self, what: Any) -> None:
        """A file is opened."""
        if self._watched and isinstance(what, str | bytes):
            path = os.path.realpath(os.fsdecode(what))
            if not path.startswith(self._allowed):
                self._opened.append(path)


_listening: list[Reader] = []


def _listen_for(reader: Reader) -> None:
    """A hook cannot be taken back: there is one, for whoever asked last."""
    if not _listening:
        sys.addaudithook(
            lambda event, given: _listening[0].hear(given[0]) if event == "open" else None
        )
    _listening[:] = [reader]


def _too_long(*_: Any) -> NoReturn:
    raise TimeoutError(f"more than {CPU_SECONDS} s of processor time")


def changed(parser: Parser, chance: random.Random) -> bytes:
    """One of the parser's samples, otherwise."""
    samples = parser.samples()
    data = chance.choice(samples)
    if parser.is_json and chance.random() < 0.6:
        data = _with_odd_values(data, chance)
    for _ in range(chance.choice((0, 1, 1, 2, 5)) if parser.is_json else chance.randint(1, 5)):
        data = chance.choice(CHANGES)(data, chance)
    if parser.seal and chance.random() < 0.6:
        data = parser.seal(data)
    return data


def _with_odd_values(data: bytes, chance: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return data
    for _ in range(chance.randint(1, 2)):
        value = _odd_somewhere(value, chance)
    return json.dumps(value).encode().replace(b'"@deep@"', DEEP)


def _odd_somewhere(value: Any, chance: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = chance.choice(keys)
    if chance.random() < 0.15:
        if isinstance(value, dict) and chance.random() < 0.5:
            return {**value, "more": 1}
        return [v for k, v in enumerate(value) if k != key] if isinstance(value, list) else {
            k: v for k, v in value.items() if k != key
        }  # fmt: skip
    changed = _odd_somewhere(value[key], chance)
    if isinstance(value, dict):
        return {**value, key: changed}
    return [changed if k == key else v for k, v in enumerate(value)]


def _flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return data
    out = bytearray(data)
    out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))]


def _without(data: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randint(0, len(data)) for _ in range(2))
    return data[:start] + data[end:]


def _twice(data: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randint(0, len(data)) for _ in range(2))
    return data[:end] + data[start:end] * chance.choice((1, 1, 50)) + data[end:]


def _number(data: bytes, chance: random.Random) -> bytes:
    """An integer of 1, 2, 4 or 8 bytes becomes one at an edge."""
    form = chance.choice("BHIQ")
    width = struct.calcsize(form)
    if len(data) < width:
        return data
    at = chance.randrange(len(data) - width + 1)
    most = (1 << 8 * width) - 1
    edge = chance.choice((0, 1, most, most // 2, most // 2 + 1, most - 1, 1 << 20))
    packed = struct.pack("<" + form, min(edge, most))
    return data[:at] + packed + data[at + width :]


def _text(data: bytes, chance: random.Random) -> bytes:
    at = chance.randint(0, len(data))
    return data[:at] + chance.choice(TEXTS) + data[at + chance.choice((0, 1, 3)) :]


CHANGES = (_flip, _flip, _cut, _without, _twice, _number, _number, _text)


def _keep(name: str, data: bytes) -> Path:
    """The corpus has a file for each input that was answered wrongly: PARSER-DIGEST."""
    path = CORPUS / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path
