"""JSON Schema (draft 2020-12) of a whole DeepSpeed JSON: for editors, and for checks elsewhere.

Our block is described by its types, to the last key. Of DeepSpeed's keys those that act here, as
far as they do; those without effect may hold anything, those that are refused may only be off, and
no others are taken. What keys must say together is beyond a schema: ``zo-offload config check``
looks at that.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from zo_offload.config import DEEPSPEED_ONLY, AioConfig, OffloadConfig, ZOConfig
from zo_offload.config_fields import BLOCK

DIALECT = "https://json-schema.org/draft/2020-12/schema"
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
AUTO = {"const": "auto", "description": "filled in by the Trainer of transformers"}
NULL = {"type": "null"}
COUNT = {"type": "integer", "minimum": 1}
NUMBER = {"type": "number", "minimum": 0}
FLAG = {"type": "boolean"}
OBJECT = {"type": "object"}
OFF = {"enum": [None, False, 0, "", [], {}]}


class _Plain(GenerateJsonSchema):
    """Without the titles that repeat a key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def block_schema() -> dict[str, Any]:
    """Of the ``zeroth_order`` block alone; its objects are in ``$defs``, by their classes' names.

    Example:
        >>> block_schema()["$defs"]["RotateConfig"]["properties"]["interval"]["default"]
        50
    """
    schema = ZOConfig.model_json_schema(mode="validation", schema_generator=_Plain)
    for each in (schema, *schema["$defs"].values()):
        each.pop("title", None)
        each["description"] = each["description"].split("\n")[0].replace("``", "`")
        each["properties"] = {key: _or_null(value) for key, value in each["properties"].items()}
    return schema


def json_schema() -> dict[str, Any]:
    """Of the whole JSON."""
    from zo_offload import deepspeed_keys as keys  # imports DeepSpeed

    block = block_schema()
    definitions = block.pop("$defs")
    properties: dict[str, Any] = {
        **{key: _or_null({"anyOf": [COUNT, AUTO]}) for key in keys.COUNTS},
        **{key: _or_null(FLAG) for key in keys.SWITCHES},
        **{key: _or_null(_object(keys.KEYS_INSIDE.get(key))) for key in keys.BLOCKS},
        "steps_per_print": {"type": ["integer", "null"]},
        "bf16": _precision(keys.KEYS_INSIDE["bf16"]),
        "fp16": _precision(keys.KEYS_INSIDE["fp16"]),
        "optimizer": _or_null(_optimizer()),
        "aio": _or_null({"$ref": f"#/$defs/{AioConfig.__name__}"}),
        "zero_optimization": _or_null(_zero(keys.zero_keys(), definitions[OffloadConfig.__name__])),
        BLOCK: {"$ref": f"#/$defs/{ZOConfig.__name__}"},
        **{
            key: {"description": "without effect here"}
            for key in (*keys.WITHOUT_EFFECT, *keys.WRITTEN_BY_ACCELERATE)
        },
        **{key: _refused(mend) for key, mend in keys.MENDS.items()},
    }
    return {
        "$schema": DIALECT,
        "title": "A DeepSpeed JSON for zo_offload",
        "type": "object",
        "properties": _without_links(properties),
        "required": [BLOCK],
        "additionalProperties": False,
        "$defs": _without_links({**definitions, ZOConfig.__name__: block}),
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A key's schema, where null is its default."""
    ways = schema.get("anyOf", [])
    if NULL in ways:
        return schema
    about = {key: schema[key] for key in ("description", "default") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in about}
    if isinstance(about.get("default"), dict):  # the defaults of its own keys
        del about["default"]
    plain = ways if set(rest) == {"anyOf"} else [rest]
    return {"anyOf": [*plain, NULL], **about}


def _object(known: Iterable[str] | None) -> dict[str, Any]:
    """One that takes its own keys only, or any."""
    if known is None:
        return OBJECT
    return {**OBJECT, "properties": {key: {} for key in known}, "additionalProperties": False}


def _precision(known: Iterable[str]) -> dict[str, Any]:
    schema = _object(known)
    schema["properties"]["enabled"] = {"anyOf": [FLAG, AUTO]}
    return schema


def _optimizer() -> dict[str, Any]:
    scalar = _or_null({"anyOf": [NUMBER, AUTO]})
    return {
        **_object(("type", "params", "legacy_fusion")),
        "properties": {
            "type": {"type": "string", "description": '"ZO"; of others lr and weight decay count'},
            "params": _or_null({**OBJECT, "properties": {"lr": scalar, "weight_decay": scalar}}),
            "legacy_fusion": {},
        },
        "if": {"properties": {"type": {"const": "ZO"}}},
        "then": {
            "properties": {
                "params": {"propertyNames": {"enum": ["lr", "weight_decay"]}}
            }
        },
    }  # fmt: skip


def _zero(known: Iterable[str], offload: dict[str, Any]) -> dict[str, Any]:
    theirs = {key: {"description": "without effect here"} for key in DEEPSPEED_ONLY}
    schema = _object(known)
    schema["properties"] |= {
        "stage": {"enum": [0, None]},
        "offload_param": _or_null({**offload, "properties": {**offload["properties"], **theirs}}),
        "offload_optimizer": {"enum": [None, {"device": "none"}]},
        "cpu_offload": OFF,
        "cpu_offload_param": OFF,
    }
    return schema


def _refused(mend: str) -> dict[str, Any]:
    switched_off = {**OBJECT, "properties": {"enabled": OFF}, "required": ["enabled"]}
    return {"anyOf": [OFF, switched_off], "description": f"refused: {mend}"}


def _without_links(schema: Any) -> Any:
    """The page's links have no place beside a schema."""
    if isinstance(schema, Mapping):
        return {
            key: " ".join(LINK.sub(r"\1", value).split())
            if key == "description" and isinstance(value, str)
            else _without_links(value)
            for key, value in schema.items()
        }
    return [_without_links(each) for each in schema] if isinstance(schema, list) else schema
