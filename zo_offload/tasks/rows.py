"""The rows of a data file in any format that data sets come in, as nodes whose place is known."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from zo_offload.tasks.lines import (
    csv_rows,
    json_object,
    parse_json,
    read_lines,
    tsv_header,
    tsv_rows,
)
from zo_offload.tasks.node import Node
from zo_offload.tasks.reader import is_jsonl
from zo_offload.tasks.wording import printable, refuse

NOT_LINES = "expected one whole JSON object on each line, or one in the file"


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> Iterator[Node]:
    """Every row: of a TSV, CSV or JSONL file, or the one value of a JSON file.

    A `.json` file is one value (as SQuAD's and DROP's) unless its first line is an object and
    others follow it.

    Args:
        path: What is not JSON by its name or first character, or `.csv`, is a TSV.
        columns: Of a CSV file without a header.

    Raises:
        TaskError: The file cannot be read, or a line is malformed.
    """
    shown = printable(str(path))
    lines = read_lines(path, shown)
    if not lines:
        refuse(shown, "the file is empty", "expected examples")
    if Path(path).suffix.lower() == ".csv":
        for number, values in csv_rows(shown, lines, columns):
            yield Node(values, f"{shown}:{number}")
    elif not is_jsonl(path, lines[0]):
        header = tsv_header(f"{shown}:1", lines[0])
        for number, values in tsv_rows(shown, header, lines):
            yield Node(values, f"{shown}:{number}")
    elif Path(path).suffix.lower() == ".json" and not _has_object_lines(lines):
        value = parse_json(shown, "\n".join(lines), NOT_LINES, "expected the data set's own file")
        yield Node(value, shown)
    else:
        for number, line in enumerate(lines, start=1):
            yield Node(json_object(f"{shown}:{number}", line), f"{shown}:{number}")


def _has_object_lines(lines: list[str]) -> bool:
    return len(lines) > 1 and lines[0].rstrip().endswith("}") and lines[0].startswith("{")
