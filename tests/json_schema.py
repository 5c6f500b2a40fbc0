"""Just enough of JSON Schema to hold a JSON against ours; an unknown keyword is an error."""

import re
from collections.abc import Callable, Iterator
from typing import Any

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda x: isinstance(x, dict),
    "array": lambda x: isinstance(x, list),
    "string": lambda x: isinstance(x, str),
    "boolean": lambda x: isinstance(x, bool),
    "null": lambda x: x is None,
    "number": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "integer": lambda x: isinstance(x, int) and not isinstance(x, bool),
}
BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "minimum": lambda x, bound: x >= bound,
    "maximum": lambda x, bound: x <= bound,
    "exclusiveMinimum": lambda x, bound: x > bound,
    "exclusiveMaximum": lambda x, bound: x < bound,
    "multipleOf": lambda x, bound: x % bound == 0,
}
SILENT = {"$schema", "$defs", "title", "description", "default", "then", "properties"}


def mistakes(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Where the value is not what the schema says; empty where it is.

    Args:
        value: Of the JSON.
        schema: Of this value.
        whole: The schema that holds its definitions.
    """
    return list(_mistakes("", value, schema, whole))


def _mistakes(path: str, value: Any, schema: Any, whole: dict[str, Any]) -> Iterator[str]:
    def good(wanted: Any) -> bool:
        return not list(_mistakes(path, value, wanted, whole))

    for keyword, wanted in schema.items():
        match keyword:
            case "$ref":
                name = wanted.removeprefix("#/$defs/")
                yield from _mistakes(path, value, whole["$defs"][name], whole)
            case "type":
                kinds = [wanted] if isinstance(wanted, str) else wanted
                if not any(TYPES[kind](value) for kind in kinds):
                    yield f"{path}: no {wanted}: {value!r}"
            case "enum" | "const":
                allowed = wanted if keyword == "enum" else [wanted]
                if not any(value == each and type(value) is type(each) for each in allowed):
                    yield f"{path}: none of {allowed}: {value!r}"
            case "anyOf":
                if not any(map(good, wanted)):
                    yield f"{path}: in no way allowed: {value!r}"
            case "if":
                if good(wanted):
                    yield from _mistakes(path, value, schema["then"], whole)
            case _ if keyword in BOUNDS:
                if TYPES["number"](value) and not BOUNDS[keyword](value, wanted):
                    yield f"{path}: {keyword} {wanted}: {value!r}"
            case _ if keyword not in SILENT:
                yield from _inside(path, value, keyword, wanted, schema)
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _mistakes(f"{path}.{key}", value[key], inner, whole)
    if isinstance(value, list) and "items" in schema:
        for item in value:
            yield from _mistakes(f"{path}[]", item, schema["items"], whole)


def _inside(path: str, value: Any, keyword: str, wanted: Any, schema: Any) -> Iterator[str]:
    is_object, is_list, is_text = (isinstance(value, kind) for kind in (dict, list, str))
    bad = {
        "required": lambda: is_object and any(key not in value for key in wanted),
        "additionalProperties": lambda: (
            is_object and wanted is False and any(key not in schema["properties"] for key in value)
        ),
        "propertyNames": lambda: is_object and any(key not in wanted["enum"] for key in value),
        "items": lambda: False,
        "minItems": lambda: is_list and len(value) < wanted,
        "uniqueItems": lambda: is_list and len({*map(repr, value)}) < len(value),
        "minLength": lambda: is_text and len(value) < wanted,
        "pattern": lambda: is_text and re.search(wanted, value) is None,
    }
    if bad[keyword]():
        yield f"{path}: {keyword} {wanted}: {value!r}"
