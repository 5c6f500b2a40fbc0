"""Reads a labelled data set: tab-separated with a header line, or one JSON object a line.

A row becomes an `Example`: its fields by name, its label as written, and where it stood.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_offload.tasks.lines import json_object, json_type, read_lines, tsv_header, tsv_rows
from zo_offload.tasks.wording import listed, printable, quote, refuse, text_fault

LABEL = "label"


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
    lines = read_lines(path, shown)
    if not lines:
        refuse(shown, "the file is empty", "expected a header line or JSON objects, and examples")
    parse = _parse_jsonl if is_jsonl(path, lines[0]) else _parse_tsv
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
    lines = read_lines(path, str(path))
    head = [] if is_jsonl(path, lines[0]) else lines[:1]
    body = lines[len(head) :]
    train = [line for number, line in enumerate(body) if number % every]
    return head + train, head + body[::every]


def is_jsonl(path: str | Path, first_line: str) -> bool:
    """By its extension, else by its first character."""
    extension = Path(path).suffix.lower()
    if extension == ".tsv":
        return False
    return extension in (".jsonl", ".json") or first_line.lstrip().startswith("{")


def _parse_tsv(shown: str, lines: list[str]) -> Iterator[Example]:
    header = tsv_header(f"{shown}:1", lines[0])
    if LABEL not in header:
        found = f"no column 'label' among {listed(header)}"
        refuse(f"{shown}:1", found, "name the label's column so, and separate columns by tabs")
    for number, fields in tsv_rows(shown, header, lines):
        label = fields.pop(LABEL)
        yield Example(fields, label, number, shown)


def _parse_jsonl(shown: str, lines: list[str]) -> Iterator[Example]:
    for number, line in enumerate(lines, start=1):
        row = _parse_object(f"{shown}:{number}", line)
        label = row.pop(LABEL)
        yield Example(row, label, number, shown)


def _parse_object(where: str, line: str) -> dict[str, Any]:
    row = json_object(where, line, "expected a flat object of strings")
    if LABEL not in row:
        refuse(where, f"no key 'label' among {listed(row)}", "name the label's key so")
    for name, value in row.items():
        _check_value(where, name, value)
    return row


def _check_value(where: str, name: str, value: Any) -> None:
    expected = "a string or an integer" if name == LABEL else "a string, in quotes"
    if type(value) is not str and not (name == LABEL and type(value) is int):  # true is no label
        refuse(where, f"{quote(name)} is JSON {json_type(value)}", f"expected {expected}")
    if fault := text_fault(str(value)):
        refuse(where, f"{quote(name)} holds {fault}", "expected plain text: remove it")
