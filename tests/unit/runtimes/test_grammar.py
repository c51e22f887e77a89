"""Which schemas are refused, by which keyword; and that bounds of numbers mean what they say."""

from __future__ import annotations

import random
import re
import time
from decimal import Decimal
from typing import Any

import pytest

from garrison_agent.runtimes.grammars.grammar import (
    json_schema_grammar,
    tool_call_grammar,
)
from garrison_agent.runtimes.grammars.number_grammar import integer_between, number_between
from garrison_agent.runtimes.grammars.string_formats import FORMATS
from garrison_protocol.errors import InvalidError


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chain(length: int) -> dict[str, Any]:
    refs = {f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**refs, f"d{length}": {"type": "null"}}}


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


REFUSED: list[tuple[str, Any, str]] = [
    ("no schema", 3, ""),
    ("no JSON", {"const": float("nan")}, ""),
    ("half a surrogate pair", {"const": "\ud800"}, ""),
    ("unknown keyword", obj(a={"type": "string", "contentEncoding": "base64"}), "properties.a.contentEncoding"),
    ("not", {"not": {"type": "string"}}, "not"),
    ("if", {"type": "object", "if": {}, "then": {}}, "if"),
    ("patternProperties", {"type": "object", "patternProperties": {"^a": {}}}, "patternProperties"),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    ("contains", {"type": "array", "contains": {}}, "contains"),
    ("uniqueItems", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ("nullable", {"type": "string", "nullable": True}, "nullable"),
    ("allOf of two", {"allOf": [{"type": "object"}, {"required": ["a"]}]}, "allOf"),
    ("oneOf that overlaps", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ("oneOf of 1 and 1.0", {"oneOf": [{"const": 1}, {"const": 1.0}]}, "oneOf"),
    ("beside a $ref", {"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {"type": "string"}}}, "maxLength"),
    ("beside anyOf", {"anyOf": [{"type": "string"}], "maxLength": 3}, "maxLength"),
    ("beside enum", {"enum": ["a"], "maxLength": 3}, "maxLength"),
    ("a wider type beside anyOf", {"type": "string", "anyOf": [{"type": "integer"}]}, "anyOf.0"),
    ("remote $ref", {"$ref": "https://example.org/schema"}, "$ref"),
    ("lost $ref", {"$ref": "#/$defs/none"}, "$ref"),
    ("$ref to itself", {"$ref": "#"}, ""),
    ("$ref in its own union", {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "$ref"),
    ("type", {"type": "text"}, "type"),
    ("no type", {"type": []}, "type"),
    ("unknown format", {"type": "string", "format": "iri"}, "format"),
    ("format and length", {"type": "string", "format": "date", "maxLength": 3}, "format"),
    ("multipleOf", {"type": "integer", "multipleOf": 3}, "multipleOf"),
    ("minProperties", {"type": "object", "minProperties": 2}, "minProperties"),
    ("maxItems", {"type": "array", "maxItems": 100_000}, "maxItems"),
    ("maxLength", {"type": "string", "maxLength": 10**9}, "maxLength"),
    ("a negative length", {"type": "string", "minLength": -1}, "minLength"),
    ("a length of text", {"type": "string", "minLength": "3"}, "minLength"),
    ("a minimum of text", {"type": "integer", "minimum": "3"}, "minimum"),
    ("a draft-4 bound", {"type": "integer", "minimum": 3, "exclusiveMinimum": True}, "exclusiveMinimum"),
    ("too fine a bound", {"type": "number", "minimum": 1e-30}, "minimum"),
    ("empty enum", {"enum": []}, "enum"),
    ("required is no list", {"type": "object", "properties": {}, "required": "a"}, "required"),
    ("too deep", nested(200), ""),
    ("so deep that Python cannot write it", nested(100_000), ""),
    ("a long chain of $ref", chain(500), "$defs"),
    ("too large", {"enum": ["x" * 200_000]}, ""),
    ("too many values", {"enum": list(range(1001))}, "enum"),
    ("too many long texts", {"anyOf": [{"type": "string", "maxLength": 65_536 - at} for at in range(1500)]}, ""),
    ("too many parts", {"anyOf": [{"type": "array", "items": {"type": "null"}}] * 1500}, "anyOf"),
]
IMPOSSIBLE: list[tuple[str, Any]] = [
    ("false", False),
    ("a required property of schema false", obj(a=False)),
    ("a required name that additionalProperties forbids", {**obj(), "required": ["a"]}),
    ("minLength above maxLength", {"type": "string", "minLength": 3, "maxLength": 2}),
    ("minItems above maxItems", {"type": "array", "minItems": 3, "maxItems": 2}),
    ("minItems of items that cannot be", {"type": "array", "items": False, "minItems": 1}),
    ("minimum above maximum", {"type": "integer", "minimum": 3, "maximum": 2}),
    ("no integer between", {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}),
    ("an object that requires itself", obj(a={"$ref": "#"})),
    ("two that require each other", {**obj(a={"$ref": "#/$defs/b"}), "$defs": {"b": obj(a={"$ref": "#"})}}),
    ("const outside its type", {"type": "string", "const": 3}),
    ("const outside its enum", {"enum": [1, 2], "const": 3}),
    ("anyOf of nothing possible", {"anyOf": [False, obj(a=False)]}),
]
PATTERNS = [
    *("(?=a)b", "(?!a)b", "(?<=a)b", "(a)\\1", "a*?", "a++", "a**", "(a*)*", "(a?)+", "(|a){2}", "a{5000}"),
    *("(a{100}){100}", "((a{30}){30}){30}", "[b-a]", "[", "(", ")", "a{", "a{2,1}", "*a", "\\pL", "\\b", "a^b", "(^a)"),
    *("a" * 600, "(" * 50 + "a" + ")" * 50, "[\\x00-\\x07]", "\\"),
]


def refused(schema: Any) -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        json_schema_grammar(schema)
    assert caught.value.code == "inference.schema_unsupported"
    return caught.value


@pytest.mark.parametrize(("schema", "param"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_not_honoured_is_refused_by_its_path(schema: Any, param: str) -> None:
    began = time.process_time()
    assert str(refused(schema).fields["param"]).startswith(param)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("schema", [case[1] for case in IMPOSSIBLE], ids=[case[0] for case in IMPOSSIBLE])
def test_what_nothing_can_satisfy_is_refused(schema: Any) -> None:
    refused(schema)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_beyond_the_subset_are_refused(pattern: str) -> None:
    assert refused({"type": "string", "pattern": pattern}).fields["param"] == "pattern"


def test_a_property_of_a_forbidden_option_may_be_missing() -> None:
    grammar = json_schema_grammar({"type": "object", "properties": {"a": obj(b=False), "c": {"type": "null"}}})
    assert '"\\"c\\""' in grammar
    assert '"\\"a\\""' not in grammar


def test_names_and_values_never_become_rules() -> None:
    evil = 'x" | root ::= "y'
    grammar = json_schema_grammar(obj(**{evil: {"const": evil}}))
    assert grammar.count("root ::=") == 1 + grammar.count('| root ::= \\\\\\"y')


def as_regex(text: str) -> re.Pattern[str]:
    """The number grammars use literals, classes, groups, and counts only: unquoted, they are a regular expression."""
    unquoted = re.sub(r'"([^"]*)"', lambda found: "(?:" + re.escape(found.group(1)) + ")", text)
    return re.compile(unquoted.replace(" ", ""))


def test_integers_between_bounds_are_exactly_those() -> None:
    chance = random.Random(1)
    for _ in range(150):
        low, high = sorted(chance.randint(-300, 1200) for _ in range(2))
        text = integer_between(low, high)
        assert text is not None
        pattern = as_regex(text)
        taken = {number for number in range(-1500, 1500) if pattern.fullmatch(str(number))}
        assert taken == set(range(low, high + 1))
        assert not pattern.fullmatch("-0")
        assert not pattern.fullmatch("01")
    assert integer_between(3, 2) is None


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_decimals_between_bounds_are_exactly_those(above: bool, below: bool) -> None:
    chance = random.Random(2)
    numbers = [Decimal(number).scaleb(-2) for number in range(-1300, 1300)]
    for _ in range(60):
        low, high = sorted(Decimal(chance.randint(-1250, 1250)).scaleb(-chance.randint(0, 2)) for _ in range(2))
        low, high = max(low, Decimal(-12)), min(high, Decimal(12))
        text = number_between(low, high, above=above, below=below, places=2)
        pattern = as_regex(text) if text is not None else re.compile("(?!)")
        for number in numbers:
            want = (low < number if above else low <= number) and (number < high if below else number <= high)
            forms = {f"{number:.2f}"} | {f"{number:f}".rstrip("0").rstrip(".")}
            for form in forms - {"-0.00", "-0"}:
                ended_in_zeros = form.endswith(".00") or re.search(r"\.\d0$", form)
                found = bool(pattern.fullmatch(form))
                assert not found or want, (text, form)
                assert found or not want or ended_in_zeros, (low, high, above, below, form)


def test_every_format_is_a_rule() -> None:
    for name in FORMATS:
        assert "root ::=" in json_schema_grammar({"type": "string", "format": name})


def test_tools_are_bounded_and_named_in_errors() -> None:
    with pytest.raises(InvalidError) as caught:
        tool_call_grammar([("a", None), ("b", {"type": "object", "properties": {"x": {"not": {}}}})])
    assert caught.value.fields["param"] == "1.parameters.properties.x.not"
    for tools in ([], [("a", None)] * 200, [('a"b', None)], [("é", None)]):
        with pytest.raises(InvalidError):
            tool_call_grammar(tools)
