"""Values of the ``zeroth_order`` block: how each is read, and the words that refuse it."""

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from zo_offload.errors import ConfigError
from zo_offload.ops.layout import CODE_BITS, CODECS, GROUPS, layout_of
from zo_offload.wording import hint

BLOCK = "zeroth_order"
KINDS = ("down_proj", "o_proj", "vector")
UNITS = ("block", "sublayer", "linear")
_POWERS = {"": 0, "B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
_BYTES = r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(B|KiB|MiB|GiB|TiB)?\s*"
_LAYER = r"-?\d{1,9}(-(-?\d{1,9}))?"


def parse_bytes(value: Any) -> Any:
    """A number of bytes from an integer or text such as ``8GiB`` (powers of 1024).

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes(7)
        (1536, 7)
    """
    if isinstance(value, str):
        match = re.fullmatch(_BYTES, value)
        if match is not None:
            return int(Decimal(match[1]) * 1024 ** _POWERS[match[2] or ""])
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("expected bytes or text such as '8GiB'")
    return value


def _parse_unit(value: Any) -> Any:
    names = isinstance(value, list | tuple) and all(isinstance(x, str) and x for x in value)
    if not (names and value) and value not in UNITS:
        raise ValueError("expected 'block', 'sublayer', 'linear' or a list of class names")
    return tuple(value) if names else value


def _parse_wire(value: str) -> str:
    kind = value.partition(":")[0]
    if kind not in CODECS:
        raise ValueError(f"expected a codec ({hint(kind, CODECS)})")
    try:
        return layout_of(value).name
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("codec: ")) from None


def _parse_paths(value: Any) -> Any:
    paths = [value] if isinstance(value, str) else value
    if not (isinstance(paths, list | tuple) and paths and all(isinstance(x, str) for x in paths)):
        raise ValueError("expected a directory, or a list of directories to stripe over")
    if not all(paths) or len(set(paths)) < len(paths):
        raise ValueError("expected directories that differ")
    return tuple(paths)


def _parse_patterns(value: Any) -> Any:
    listed = isinstance(value, list | tuple) and all(isinstance(x, str) and x for x in value)
    if not (listed and value):
        raise ValueError("expected a list of patterns on parameter names, such as '*.self_attn.*'")
    return tuple(value)


def _parse_kinds(value: Any) -> Any:
    known = isinstance(value, list | tuple) and all(each in KINDS for each in value)
    if not (known and value):
        raise ValueError(f"expected a list of some of {', '.join(map(repr, KINDS))}")
    return tuple(value)


def _parse_layers(value: Any) -> Any:
    if not (isinstance(value, list | tuple) and value and all(map(_is_layer, value))):
        raise ValueError("expected a list of layer numbers and ranges, such as [0, -1, '20-31']")
    return tuple(value)


def _parse_limit(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if value != "none" and not (number and math.isfinite(value)):
        raise ValueError("expected a positive number, or 'none'")
    return math.inf if value == "none" else float(value)


def _is_layer(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(_LAYER, value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(title: str, *ways: dict[str, Any]) -> WithJsonSchema:
    """The JSON Schema of what a function of ours reads; the title says it in words."""
    return WithJsonSchema({"title": title, **(ways[0] if len(ways) == 1 else {"anyOf": [*ways]})})


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'`"{name}"`' for name in names)


def _list_of(item: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, **others}


def bytes_shown(**bounds: int) -> WithJsonSchema:
    """The JSON Schema of what :func:`parse_bytes` reads; JSON Schema cannot bound the text."""
    text = {"type": "string", "pattern": f"^{_BYTES}$"}
    return _shown('bytes, or text such as `"8GiB"`', {"type": "integer", **bounds}, text)


_TEXT = {"type": "string", "minLength": 1}
_CODEC = f"^({'|'.join(CODECS)}|({'|'.join(CODE_BITS)}):({'|'.join(map(str, GROUPS))}))$"

Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(_parse_paths),
    _shown("a directory, or a list of them", _TEXT, _list_of(_TEXT, uniqueItems=True)),
]
Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(gt=0, lt=2**63),
    bytes_shown(exclusiveMinimum=0, exclusiveMaximum=2**63),
]
UnitChoice = Annotated[
    Literal["block", "sublayer", "linear"] | tuple[str, ...],
    BeforeValidator(_parse_unit),
    _shown(
        f"{_quoted(UNITS)}, or a list of class names",
        {"enum": [*UNITS]},
        _list_of(_TEXT),
    ),
]
Patterns = Annotated[
    tuple[str, ...], BeforeValidator(_parse_patterns), _shown("a list of patterns", _list_of(_TEXT))
]
Kinds = Annotated[
    tuple[str, ...],
    BeforeValidator(_parse_kinds),
    _shown(
        f"a list of some of {_quoted(KINDS)}",
        _list_of({"enum": [*KINDS]}),
    ),
]
Layers = Annotated[
    tuple[int | str, ...],
    BeforeValidator(_parse_layers),
    _shown(
        "a list of numbers and ranges",
        _list_of({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": f"^{_LAYER}$"}]}),
    ),
]
Wire = Annotated[
    str,
    AfterValidator(_parse_wire),
    _shown("a codec, or a codec and its group", {"type": "string", "pattern": _CODEC}),
]
Limit = Annotated[
    float,
    BeforeValidator(_parse_limit),
    _shown(
        'a number above 0, or `"none"`',
        {"type": "number", "exclusiveMinimum": 0},
        {"const": "none"},
    ),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """An object that takes its own keys only; null is a key's default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: v for k, v in values.items() if v is not None or k not in cls.model_fields}
