"""Writes the table of our keys in docs/config.md, from the types that read them.

python tests/config_page.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zo_offload.config_schema import block_schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
COMMAND = "python tests/config_page.py"
FIRST = f"<!-- from here on made by `{COMMAND}` -->\n"
LAST = "<!-- up to here -->\n"
HEAD = "| key | values | default | |\n|---|---|---|---|\n"
LARGE = 2**20  # above it a power of two is written as one


def page(written: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = written.partition(FIRST)
    _, _, after = rest.partition(LAST)
    assert after, f"{PAGE}: lacks a line that marks the table"
    return f"{before}{FIRST}\n{HEAD}{''.join(rows())}\n{LAST}{after}"


def rows() -> Iterator[str]:
    """A line for each key, objects before what is in them."""
    schema = block_schema()
    yield from _rows("", schema["properties"], schema["$defs"])


def _rows(prefix: str, properties: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    for key, schema in properties.items():
        found = [way["$ref"].rpartition("/")[2] for way in schema["anyOf"] if "$ref" in way]
        about = " ".join(schema["description"].split())
        default = "" if found and "default" not in schema else f"`{json.dumps(schema['default'])}`"
        yield f"| `{prefix}{key}` | {words(schema)} | {default} | {about} |\n"
        for name in found:
            yield from _rows(f"{prefix}{key}.", definitions[name]["properties"], definitions)


def words(schema: dict[str, Any]) -> str:
    """What a key may be, but for null.

    Example:
        >>> words({"type": "integer", "minimum": 1, "exclusiveMaximum": 2**64})
        'a whole number, at least 1, below 2^64'
    """
    if "title" in schema:
        return schema["title"]
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "anyOf" in schema:
        return " or ".join(words(way) for way in schema["anyOf"] if way != {"type": "null"})
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "`true`, `false`",
    }
    return ", ".join([kinds.get(schema.get("type", ""), "an object"), *_bounds(schema)])


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    named = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    for key, word in named.items():
        if key in schema:
            yield f"{word} {_number(schema[key])}"


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if value > LARGE and value == 2**power else f"{value:g}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
