"""Reads a labelled data set: tab-separated with a header line, or one JSON object a line.

A row becomes an `Example`: its fields by name, its label as written, and where it stood. TSV is
plain: a tab always separates, a quote is a character like any other (reviews are full of lone
quotes that a CSV reader would take for the start of a field). What is wrong with a file is said in
one line that names file and line.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_offload.tasks.wording import listed, printable, quote, refuse, text_fault

LABEL = "label"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Example:
    """One row: what a template may name, the raw label (an index or a name), and its place."""

    fields: dict[str, str]
    label: int | str
    line: int
    path: str = "<data>"

    @property
    def where(self) -> str:
        """`file:line`, as an editor takes it."""
        return f"{self.path}:{self.line}"


def read_examples(path: str | Path) -> list[Example]:
    """All examples of a TSV or JSONL file, in order.

    The extension (.tsv, .jsonl, .json) names the format; any other file is JSONL when it starts
    with a brace. A byte order mark, CRLF line ends and blank lines at the end are tolerated.

    Args:
        path: A UTF-8 file with a `label` column or key and at least one example.

    Raises:
        TaskError: The file cannot be read, or a line in it is not an example.
    """
    shown = printable(str(path))
    lines = _split_lines(shown, _read_bytes(path, shown))
    if not lines:
        refuse(shown, "the file is empty", "expected a header line or JSON objects, and examples")
    parse = _parse_jsonl if _is_jsonl(path, lines[0]) else _parse_tsv
    return list(parse(shown, lines))


def split_file(path: str | Path, every: int = 5) -> tuple[list[str], list[str]]:
    """The lines of a data file without every fifth example, and those of the held-out ones.

    Both keep the header of a TSV. The file must be one that `read_examples` accepts.

    Raises:
        TaskError: It is not, or holds too few examples to hold any out.
    """
    count = len(read_examples(path))
    if count < 2:
        refuse(str(path), "only one example", "expected at least 2, to hold one out")
    lines = _split_lines(str(path), _read_bytes(path, str(path)))
    head = [] if _is_jsonl(path, lines[0]) else lines[:1]
    body = lines[len(head) :]
    train = [line for number, line in enumerate(body) if number % every]
    return head + train, head + body[::every]


def _is_jsonl(path: str | Path, first_line: str) -> bool:
    extension = Path(path).suffix.lower()
    if extension == ".tsv":
        return False
    return extension in (".jsonl", ".json") or first_line.lstrip().startswith("{")


def _read_bytes(path: str | Path, shown: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        refuse(shown, "no such file", "check the path", error)
    except IsADirectoryError as error:
        refuse(shown, "a directory", "expected a file: name the .tsv or .jsonl in it", error)
    except PermissionError as error:
        refuse(shown, "not readable by this user", "change its permissions (chmod u+r)", error)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        refuse(shown, f"cannot be read: {reason}", "check the path", error)


def _split_lines(shown: str, data: bytes) -> list[str]:
    """The file's lines without their ends; blank lines at its end are dropped."""
    data = data.removeprefix(BYTE_ORDER_MARK)
    mend = "expected plain UTF-8 text: convert the file (iconv -t UTF-8)"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        refuse(f"{shown}:{line}", f"invalid UTF-8 byte 0x{data[error.start]:02x}", mend, error)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        refuse(f"{shown}:{line}", "a NUL byte", mend)
    # Only \n ends a line: str.splitlines would also cut at the U+2028 and \x0c that web text holds.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _parse_tsv(shown: str, lines: list[str]) -> Iterator[Example]:
    header = _parse_header(f"{shown}:1", lines[0])
    if len(lines) == 1:
        refuse(f"{shown}:1", "only a header line", "expected at least one example after it")
    for number, line in enumerate(lines[1:], start=2):
        values = line.split("\t")
        if len(values) != len(header):
            found = f"{len(values)} columns" if line.strip() else "a blank line"
            expected = f"expected {len(header)}: {listed(header)}, separated by tabs"
            refuse(f"{shown}:{number}", found, f"{expected}; write a tab inside a field as a space")
        fields = dict(zip(header, values, strict=True))
        label = fields.pop(LABEL)
        yield Example(fields, label, number, shown)


def _parse_header(where: str, line: str) -> list[str]:
    header = line.split("\t")
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        refuse(where, f"the header names {quote(name)} {count} times", "rename all but one")
    if LABEL not in header:
        found = f"no column 'label' among {listed(header)}"
        refuse(where, found, "name the label's column so, and separate columns by tabs")
    return header


def _parse_jsonl(shown: str, lines: list[str]) -> Iterator[Example]:
    for number, line in enumerate(lines, start=1):
        row = _parse_object(f"{shown}:{number}", line)
        label = row.pop(LABEL)
        yield Example(row, label, number, shown)


def _parse_object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        fault = f"malformed JSON at column {error.colno}: {error.msg}"
        refuse(where, fault, "expected one whole JSON object on each line", error)
    except (ValueError, RecursionError) as error:  # a key twice, 5,000 digits, 100,000 brackets
        refuse(where, f"unusable JSON: {error}", "expected a flat object of strings", error)
    if not isinstance(row, dict):
        refuse(where, f"JSON {_json_type(row)}", "expected one JSON object on each line")
    if LABEL not in row:
        refuse(where, f"no key 'label' among {listed(row)}", "name the label's key so")
    for name, value in row.items():
        _check_value(where, name, value)
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quote(name)} stands {count} times")
    return row


def _check_value(where: str, name: str, value: Any) -> None:
    expected = "a string or an integer" if name == LABEL else "a string, in quotes"
    if type(value) is not str and not (name == LABEL and type(value) is int):  # true is no label
        refuse(where, f"{quote(name)} is JSON {_json_type(value)}", f"expected {expected}")
    if fault := text_fault(str(value)):
        refuse(where, f"{quote(name)} holds {fault}", "expected plain text: remove it")


def _json_type(value: Any) -> str:
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "number")
