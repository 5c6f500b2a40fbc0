"""Data files as lines, and lines as rows; every fault is said with file and line.

TSV is plain: a tab always separates, a quote is a character like any other (reviews are full of
lone quotes that a CSV reader would take for the start of a field).
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zo_offload.tasks.wording import listed, quote, refuse

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_BYTES = 2 << 30  # of a data file, which is read as a whole


def read_lines(path: str | Path, shown: str) -> list[str]:
    """The file's lines without their ends; blank lines at its end are dropped.

    A byte order mark and CRLF line ends are tolerated.

    Args:
        path: A UTF-8 file of at most 2 GiB.
        shown: Its name in errors.

    Raises:
        TaskError: It cannot be read, or is no text.
    """
    data = _read_bytes(path, shown).removeprefix(BYTE_ORDER_MARK)
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


def tsv_header(where: str, line: str) -> list[str]:
    """The names of the columns."""
    header = line.split("\t")
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        refuse(where, f"the header names {quote(name)} {count} times", "rename all but one")
    return header


def tsv_rows(shown: str, header: list[str], lines: list[str]) -> Iterator[tuple[int, dict]]:
    """``(line, values by column)`` of what follows the header."""
    if len(lines) == 1:
        refuse(f"{shown}:1", "only a header line", "expected at least one example after it")
    for number, line in enumerate(lines[1:], start=2):
        values = line.split("\t")
        if len(values) != len(header):
            found = f"{len(values)} columns" if line.strip() else "a blank line"
            expected = f"expected {len(header)}: {listed(header)}, separated by tabs"
            refuse(f"{shown}:{number}", found, f"{expected}; write a tab inside a field as a space")
        yield number, dict(zip(header, values, strict=True))


def csv_rows(
    shown: str, lines: list[str], columns: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """``(line, values by column)``; a field in quotes may hold commas and line ends.

    Args:
        shown: The file's name in errors.
        lines: At least one.
        columns: Of a file without a header.
    """
    reader = csv.reader([f"{line}\n" for line in lines], strict=True)
    header = list(columns)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            mend = 'expected commas between fields, and " around one that holds any'
            refuse(f"{shown}:{number}", f"malformed CSV: {error}", mend, error)
        if not header:
            header = tsv_header(f"{shown}:1", "\t".join(values))
            continue
        if len(values) != len(header):
            found = f"{len(values)} columns" if values else "a blank line"
            mend = f"expected {len(header)}: {listed(header)}, separated by commas"
            refuse(f"{shown}:{number}", found, mend)
        yield number, dict(zip(header, values, strict=True))


def json_object(where: str, line: str, mend: str = "expected an object") -> dict[str, Any]:
    """The object that a line holds."""
    row = parse_json(where, line, "expected one whole JSON object on each line", mend)
    if not isinstance(row, dict):
        refuse(where, f"JSON {json_type(row)}", "expected one JSON object on each line")
    return row


def parse_json(where: str, text: str, mend: str, mend_value: str) -> Any:
    """A JSON value of which no object has a key twice.

    Args:
        where: Of the text; the line is added where it has several.
        text: One value.
        mend: For what is no JSON.
        mend_value: For JSON that cannot be used.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if "\n" in text else where
        refuse(at, f"malformed JSON at column {error.colno}: {error.msg}", mend, error)
    except (ValueError, RecursionError) as error:  # a key twice, 5,000 digits, 100,000 brackets
        refuse(where, f"unusable JSON: {error}", mend_value, error)


def json_type(value: Any) -> str:
    """What JSON calls it."""
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "number")


def _read_bytes(path: str | Path, shown: str) -> bytes:
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            refuse(shown, f"{size:,} bytes, above {MOST_BYTES:,}", "divide the file")
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quote(name)} stands {count} times")
    return row
