"""Whether a value is valid under a JSON schema: a plain reading of the standard, for tests of generated answers."""

from __future__ import annotations

import math
import re
from typing import Any

TYPES = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: (
        not isinstance(value, bool) and (isinstance(value, int) or value == math.floor(value))
        if isinstance(value, int | float)
        else False
    ),
}
FORMATS = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
}


def valid(value: Any, schema: Any, document: Any = None) -> bool:
    """Tell whether ``value`` is valid; keywords that the tests do not use are a KeyError, never a yes."""
    document = schema if document is None else document
    if isinstance(schema, bool):
        return schema
    return all(_holds(word, value, schema, document) for word in schema)


def _holds(word: str, value: Any, schema: dict[str, Any], document: Any) -> bool:
    want = schema[word]
    match word:
        case "title" | "description" | "default" | "$defs" | "$schema" | "discriminator":
            return True
        case "$ref":
            target = document
            for step in want.split("/")[1:]:
                target = target[step]
            return valid(value, target, document)
        case "type":
            return any(TYPES[one](value) for one in ([want] if isinstance(want, str) else want))
        case "const":
            return _equal(value, want)
        case "enum":
            return any(_equal(value, one) for one in want)
        case "anyOf":
            return any(valid(value, one, document) for one in want)
        case "oneOf":
            return sum(valid(value, one, document) for one in want) == 1
        case "allOf":
            return all(valid(value, one, document) for one in want)
    if isinstance(value, dict):
        match word:
            case "properties":
                return all(valid(value[name], one, document) for name, one in want.items() if name in value)
            case "required":
                return all(name in value for name in want)
            case "additionalProperties":
                extra = [one for name, one in value.items() if name not in schema.get("properties", {})]
                return all(valid(one, want, document) for one in extra)
            case "minProperties":
                return bool(len(value) >= want)
            case "maxProperties":
                return bool(len(value) <= want)
    if isinstance(value, list):
        prefix = schema.get("prefixItems", [])
        match word:
            case "items":
                return all(valid(one, want, document) for one in value[len(prefix) :])
            case "prefixItems":
                return all(valid(one, part, document) for one, part in zip(value, want, strict=False))
            case "minItems":
                return bool(len(value) >= want)
            case "maxItems":
                return bool(len(value) <= want)
    if isinstance(value, str):
        match word:
            case "minLength":
                return bool(len(value) >= want)
            case "maxLength":
                return bool(len(value) <= want)
            case "pattern":
                return re.search(want, value) is not None
            case "format":
                return re.fullmatch(FORMATS[want], value) is not None
    if TYPES["number"](value):
        match word:
            case "minimum":
                return bool(value >= want)
            case "maximum":
                return bool(value <= want)
            case "exclusiveMinimum":
                return bool(value > want)
            case "exclusiveMaximum":
                return bool(value < want)
            case "multipleOf":
                return bool(abs(value / want - round(value / want)) < 1e-6)
    KNOWN[word]
    return True  # a keyword of another type


KNOWN = dict.fromkeys(
    (
        *("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
        *("items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
