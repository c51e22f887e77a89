"""JSON Schema -> rules of a grammar: every text of the grammar is valid under the schema.

A text may be narrower than the schema (no members beyond ``properties``, members in the schema's order), never wider:
a keyword that is not honoured is refused by its path. Annotations are ignored, and so are keywords of other types than
``type`` names, as the standard has it. Source: JSON Schema 2020-12, "core" and "validation"; OpenAI, "Structured
outputs".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from garrison_agent.runtimes.grammars.gbnf import MAX_REPEAT, Grammar, Part, Ref, Repeat, literal
from garrison_agent.runtimes.grammars.number_grammar import MAX_WHOLE, integer_between, number_between
from garrison_agent.runtimes.grammars.pattern_grammar import pattern_rule
from garrison_agent.runtimes.grammars.string_formats import FORMATS, quoted_format
from garrison_protocol.errors import InvalidError

MAX_SCHEMA_BYTES = 128 * 1024
MAX_DEPTH = 64
MAX_NODES = 2000
MAX_ENUM = 1000
MAX_TEXT = 65_536
_PLACES = 6
"""Digits after the point of a number with bounds."""
_MAX_PLACES = 9

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "strict"}
    | {"$comment", "$schema", "$id", "$defs", "definitions", "discriminator"}
)
_KEYWORDS = {
    "object": "properties required additionalProperties minProperties maxProperties",
    "array": "items prefixItems minItems maxItems uniqueItems",
    "string": "minLength maxLength pattern format",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "integer": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "boolean": "",
    "null": "",
}
_OF_TYPE = {name: frozenset(words.split()) for name, words in _KEYWORDS.items()}
_ALL_OF_TYPES = frozenset().union(*_OF_TYPE.values())
_COMBINERS = ("$ref", "anyOf", "oneOf", "allOf")

Schema = Mapping[str, Any]
_MISSING = object()


def refuse(param: str, message: str) -> NoReturn:
    """Raise the error of a schema that is not supported; ``param`` is the path of the keyword inside it."""
    raise InvalidError("inference.schema_unsupported", message, hint="change the schema", param=param)


def check_size(schema: object) -> None:
    """Return if ``schema`` is JSON of a bounded size, so that everything after this takes a bounded time.

    Raises:
        InvalidError: ``inference.schema_unsupported``.
    """
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH * 2):  # a schema and the map that holds it are two levels
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list, tuple))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            break
    else:
        refuse("", "the schema nests too deep")
    try:
        size = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError):
        refuse("", "the schema is no JSON, or holds a string that is no Unicode text")
    if size > MAX_SCHEMA_BYTES:
        refuse("", f"the schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken")


class SchemaRules:
    """Adds the rules of one schema document to a grammar."""

    def __init__(self, document: object, grammar: Grammar, *, path: str = "") -> None:
        """``document`` was checked by ``check_size``; ``path`` stands before every ``param``."""
        self._document = document
        self._grammar = grammar
        self._path = path
        self._refs: dict[str, Ref] = {}
        self._nodes = 0
        self._depth = 0

    def root(self) -> Ref:
        """Return the rule of the whole document.

        Raises:
            InvalidError: ``inference.schema_unsupported``; ``param`` is the path of what is not supported.
        """
        return self._rule(self._document, self._path)

    def _rule(self, schema: object, path: str) -> Ref:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            refuse(path, f"the schema has more than {MAX_NODES} parts")
        if self._depth >= MAX_DEPTH:
            refuse(path, "the schema nests too deep")
        self._depth += 1
        try:
            return self._plain(schema, path)
        finally:
            self._depth -= 1

    def _plain(self, schema: object, path: str) -> Ref:
        if schema is True or schema == {}:
            return self._grammar.any_value()
        if schema is False:
            return self._grammar.add()
        if not isinstance(schema, dict):
            refuse(path, "a schema is an object, true, or false")
        given = {word: value for word, value in schema.items() if not _ignored(word)}
        for word in _COMBINERS:
            if word in given:
                return self._combined(word, given, path)
        if "const" in given or "enum" in given:
            return self._constants(given, path)
        types = _types(given, path)
        if types is None:
            return self._grammar.any_value()
        for word in given:
            if word != "type" and word not in _ALL_OF_TYPES:
                refuse(_join(path, word), f"the keyword {word!r} is not supported")
        return self._grammar.add(*([self._typed(kind, given, path)] for kind in types))

    def _combined(self, word: str, given: Schema, path: str) -> Ref:
        here = _join(path, word)
        for other in given:
            if other != word and not (word in ("anyOf", "oneOf") and other == "type"):
                refuse(_join(path, other), f"{other!r} beside {word!r} is not supported")
        if word == "$ref":
            return self._reference(given[word], here)
        parts = given[word]
        if not isinstance(parts, list) or not parts:
            refuse(here, f"{word} is a list of schemas")
        if word == "allOf":
            if len(parts) > 1:
                refuse(here, "allOf of more than one schema is not supported")
            return self._rule(parts[0], _join(here, "0"))
        if "type" in given:
            kinds = _types(given, path) or ()
            parts = [_narrowed(part, kinds, _join(here, str(at))) for at, part in enumerate(parts)]
        if word == "oneOf":
            for at, one in enumerate(parts):
                if not all(self._apart(one, other) for other in parts[:at]):
                    refuse(here, "oneOf is supported where no value can fit two of its schemas; use anyOf")
        return self._grammar.add(*([self._rule(part, _join(here, str(at)))] for at, part in enumerate(parts)))

    def _reference(self, pointer: object, path: str) -> Ref:
        if not isinstance(pointer, str):
            refuse(path, "a $ref is a string")
        known = self._refs.get(pointer)
        if known is None:
            target = self._resolve(pointer, path)
            name = self._grammar.reserve()
            known = self._refs[pointer] = Ref(name)
            self._grammar.fill(name, [[self._rule(target, _join(self._path, pointer[2:].replace("/", ".")))]])
        return known

    def _resolve(self, pointer: str, path: str) -> object:
        if pointer != "#" and not pointer.startswith("#/"):
            refuse(path, "a $ref leads to a place in the same schema: #/$defs/...")
        target: Any = self._document
        for step in pointer.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isascii() and name.isdigit() and int(name[:6]) < len(target):
                target = target[int(name[:6])]
            else:
                refuse(path, "a $ref leads nowhere")
        return target

    def _apart(self, one: object, other: object) -> bool:
        """Tell whether surely no value fits both schemas."""
        first, second = (self._followed(schema) for schema in (one, other))
        if not (isinstance(first, dict) and isinstance(second, dict)):
            return False
        left, right = _values(first), _values(second)
        if left is not None and right is not None:
            return not left & right
        kinds, others = _kinds(first), _kinds(second)
        if kinds and others and not kinds & others:
            return True
        if kinds != {"object"} or others != {"object"}:
            return False
        shared = set(_strings(first.get("required"))) & set(_strings(second.get("required")))
        for name in shared:
            members = [_dict(schema.get("properties")).get(name) for schema in (first, second)]
            values = [_values(_dict(self._followed(member))) for member in members]
            if values[0] is not None and values[1] is not None and not values[0] & values[1]:
                return True
        return False

    def _followed(self, schema: object) -> object:
        for _ in range(MAX_DEPTH):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                return schema
            schema = self._resolve(schema["$ref"], "$ref")
        return None

    def _constants(self, given: Schema, path: str) -> Ref:
        for word in given:
            if word not in ("type", "enum", "const"):
                refuse(_join(path, word), f"{word!r} beside enum or const is not supported")
        values = given.get("enum", [given.get("const")])
        if not isinstance(values, list) or not values:
            refuse(_join(path, "enum"), "enum is a list of at least one value")
        if len(values) > MAX_ENUM:
            refuse(_join(path, "enum"), f"enum has more than {MAX_ENUM} values")
        kinds = _types({"type": given["type"]}, path) if "type" in given else None
        if "const" in given:
            values = [value for value in values if _same(value, given["const"])]
        texts = {
            json.dumps(value, ensure_ascii=False, separators=(",", ":")): None
            for value in values
            if kinds is None or any(_is(kind, value) for kind in kinds)
        }
        return self._grammar.add(*([literal(text)] for text in texts))

    def _typed(self, kind: str, given: Schema, path: str) -> Part:
        match kind:
            case "object":
                return self._object(given, path)
            case "array":
                return self._array(given, path)
            case "string":
                return self._string(given, path)
            case "number" | "integer":
                return self._number(kind, given, path)
            case "boolean":
                return self._grammar.add(['"true"'], ['"false"'])
            case _:
                return '"null"'

    def _object(self, given: Schema, path: str) -> Ref:
        members = given.get("properties", {})
        required = given.get("required", [])
        if not isinstance(members, dict):
            refuse(_join(path, "properties"), "properties is an object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            refuse(_join(path, "required"), "required is a list of names")
        more = given.get("additionalProperties", True)
        low, high = self._bounds(given, "minProperties", "maxProperties", path)
        if not members and not required and "properties" not in given:
            if low > 1:
                refuse(_join(path, "minProperties"), "minProperties above 1 is not supported here")
            value = self._rule(more, _join(path, "additionalProperties"))
            if more is True and low == 0 and high is None:
                return self._grammar.any_object()
            return self._grammar.mapping(value, low, high)
        schemas = {**members, **{name: more for name in required if name not in members}}
        must = set(required)
        if low > len(must):
            refuse(_join(path, "minProperties"), "minProperties above the number of required ones is not supported")
        if high is not None and high < len(schemas):
            refuse(_join(path, "maxProperties"), "maxProperties below the number of properties is not supported")
        return self._members(schemas, must, _join(path, "properties"))

    def _members(self, schemas: Mapping[str, object], must: set[str], path: str) -> Ref:
        """Return the rule of an object with these members in this order; those not in ``must`` may be left out."""
        ws = self._grammar.builtin("ws")
        after = self._grammar.add([f'{ws} "}}"'])
        first = self._grammar.add([f'{ws} "}}"'])
        for name, schema in reversed(list(schemas.items())):
            value = self._rule(schema, _join(path, name))
            member = self._grammar.add([f'{literal(json.dumps(name, ensure_ascii=False))} ":" " "?', value])
            left_out = name not in must
            first = self._grammar.add([ws, member, after], *([[first]] if left_out else []))
            after = self._grammar.add([f'"," {ws}', member, after], *([[after]] if left_out else []))
        return self._grammar.add(['"{"', first])

    def _array(self, given: Schema, path: str) -> Ref:
        low, high = self._bounds(given, "minItems", "maxItems", path)
        if given.get("uniqueItems", False) is not False and (high is None or high > 1):
            refuse(_join(path, "uniqueItems"), "the keyword 'uniqueItems' is not supported")
        prefix = given.get("prefixItems", [])
        if not isinstance(prefix, list):
            refuse(_join(path, "prefixItems"), "prefixItems is a list of schemas")
        item = self._rule(given.get("items", True), _join(path, "items"))
        if not prefix:
            return self._grammar.array(item, low, high)
        if "items" not in given:
            high = len(prefix) if high is None else min(high, len(prefix))
        if high is not None and high < low:
            refuse(_join(path, "minItems"), "no array can have so many items")
        return self._tuple(prefix, item, low, high, path)

    def _tuple(self, prefix: Sequence[object], item: Ref, low: int, high: int | None, path: str) -> Ref:
        ws = self._grammar.builtin("ws")
        end: list[Part] = [f'{ws} "]"']
        count = len(prefix) if high is None else min(high, len(prefix))
        beyond = None if high is None else high - count
        tail = self._grammar.add(end)
        if beyond != 0:
            more = self._grammar.add([f'"," {ws}', item])
            tail = self._grammar.add([Repeat(more.rule, max(low - count, 0), beyond), *end])
        for at in reversed(range(count)):
            rule = self._rule(prefix[at], _join(_join(path, "prefixItems"), str(at)))
            here: list[Part] = [ws if at == 0 else f'"," {ws}', rule, tail]
            tail = self._grammar.add(here, *([end] if at >= low else []))
        return self._grammar.add(['"["', tail])

    def _string(self, given: Schema, path: str) -> Part:
        low, high = self._bounds(given, "minLength", "maxLength", path, most=MAX_TEXT)
        bounded = low > 0 or high is not None
        for word in ("pattern", "format"):
            if word in given and not isinstance(given[word], str):
                refuse(_join(path, word), f"{word} is a string")
            if word in given and (bounded or ("pattern" in given and "format" in given)):
                refuse(_join(path, word), f"{word} beside another limit of the text is not supported")
        if "pattern" in given:
            return pattern_rule(given["pattern"], self._grammar, _join(path, "pattern"))
        if "format" in given:
            if given["format"] not in FORMATS:
                refuse(_join(path, "format"), f"the format {given['format'][:32]!r} is not supported")
            return quoted_format(given["format"])
        return self._grammar.text(low, high) if bounded else self._grammar.builtin("string")

    def _number(self, kind: str, given: Schema, path: str) -> Part:
        places = _places(kind, given, path)
        if not (_OF_TYPE["number"] - {"multipleOf"}) & given.keys() and places is None:
            return self._grammar.builtin(kind)
        low, above = _limit(given, "minimum", "exclusiveMinimum", path, sign=1)
        high, below = _limit(given, "maximum", "exclusiveMaximum", path, sign=-1)
        if kind == "integer" or places == 0:
            least = math.floor(low) + 1 if above else math.ceil(low)
            most = math.ceil(high) - 1 if below else math.floor(high)
            text = integer_between(least, most)
        else:
            text = number_between(low, high, above=above, below=below, places=_PLACES if places is None else places)
        return self._grammar.add(*([] if text is None else [[text]]))

    def _bounds(
        self, given: Schema, low_word: str, high_word: str, path: str, *, most: int = MAX_REPEAT
    ) -> tuple[int, int | None]:
        found: list[int | None] = []
        for word in (low_word, high_word):
            value = given.get(word, _MISSING)
            if value is _MISSING:
                found.append(None)
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is not int or value < 0:
                refuse(_join(path, word), f"{word} is a whole number, at least 0")
            if value > most:
                refuse(_join(path, word), f"{word} is at most {most} here")
            found.append(value)
        low, high = found[0] or 0, found[1]
        if high is not None and low > high:
            refuse(_join(path, low_word), f"{low_word} is above {high_word}: nothing can satisfy this schema")
        return low, high


def _ignored(word: str) -> bool:
    return word in _ANNOTATIONS or word.startswith("x-")


def _join(path: str, word: str) -> str:
    return f"{path}.{word}" if path and word else path or word


def _types(given: Schema, path: str) -> tuple[str, ...] | None:
    """Return the types that a schema allows, in its order; None: all, without further limits."""
    named = given.get("type", _MISSING)
    if named is _MISSING:
        meant = [kind for kind in ("object", "array", "string", "number") if _OF_TYPE[kind] & given.keys()]
        return tuple(meant) or (None if not given else ())
    kinds = named if isinstance(named, list) else [named]
    if not kinds or not all(isinstance(kind, str) and kind in _OF_TYPE for kind in kinds):
        refuse(_join(path, "type"), "type is one of object, array, string, number, integer, boolean, null, or a list")
    if "number" in kinds:
        kinds = [kind for kind in kinds if kind != "integer"]
    return tuple(dict.fromkeys(kinds))


def _narrowed(part: object, kinds: Sequence[str], path: str) -> object:
    """Return ``part`` where ``kinds`` allows all of its types; a type beside anyOf says no more than that."""
    if isinstance(part, dict):
        own = part.get("type")
        if own in kinds or (own is None and not _COMBINED & part.keys()):
            return part if own is not None else {**part, "type": list(kinds)}
    refuse(path, "a type beside anyOf is supported where each of its schemas allows it")


_COMBINED = frozenset(_COMBINERS)


def _limit(given: Schema, word: str, open_word: str, path: str, *, sign: int) -> tuple[Decimal, bool]:
    """Return the tighter of two bounds, and whether it is left out itself; our own widest where there is none."""
    best, excluded = Decimal(-sign * MAX_WHOLE), False
    for name, is_open in ((word, False), (open_word, True)):
        value = given.get(name, _MISSING)
        if value is _MISSING:
            continue
        if type(value) not in (int, float):
            refuse(_join(path, name), f"{name} is a number")
        bound = Decimal(repr(value))
        if sign * bound > MAX_WHOLE:
            refuse(_join(path, name), f"{name} is beyond what is generated: {MAX_WHOLE} either way")
        if sign * bound > sign * best or (bound == best and is_open):
            best, excluded = bound, is_open
    _, _, fraction = f"{best:f}".partition(".")
    if len(fraction.rstrip("0")) > _MAX_PLACES:
        refuse(_join(path, word), f"{word} has more than {_MAX_PLACES} digits after the point")
    return best, excluded


def _places(kind: str, given: Schema, path: str) -> int | None:
    """Return how many digits after the point ``multipleOf`` allows, None if there is none."""
    step = given.get("multipleOf", _MISSING)
    if step is _MISSING:
        return None
    if type(step) in (int, float) and step == 1:
        return 0
    for places in range(1, _MAX_PLACES + 1):
        if kind == "number" and type(step) is float and Decimal(repr(step)) == Decimal(1).scaleb(-places):
            return places
    refuse(_join(path, "multipleOf"), "multipleOf is supported for 1, and for number also 0.1, 0.01, ...")


def _is(kind: str, value: object) -> bool:
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return whole or (kind == "number" and isinstance(value, float))


def _same(one: object, other: object) -> bool:
    return _written(one) == _written(other)


def _written(value: object) -> str:
    """Return one text for all ways to write a value: 1.0 is 1, and the order of members says nothing."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_whole), sort_keys=True)


def _whole(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _values(schema: Schema) -> set[str] | None:
    """Return the only values that a schema allows, as texts; None where it names none."""
    if "const" in schema:
        return {_written(schema["const"])}
    values = schema.get("enum")
    return {_written(value) for value in values} if isinstance(values, list) else None


def _kinds(schema: Schema) -> set[str]:
    """Return the types that a schema names, number standing for integer too; nothing where it names none."""
    named = schema.get("type")
    kinds = named if isinstance(named, list) else [named]
    return {"number" if kind == "integer" else kind for kind in kinds if isinstance(kind, str)}


def _strings(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _dict(value: object) -> Schema:
    return value if isinstance(value, dict) else {}
