"""Grammars under llama.cpp's own sampler: what they take, what they refuse, and where chance leads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from garrison_agent.runtimes.grammars.grammar import json_object_grammar, json_schema_grammar, tool_call_grammar
from garrison_agent.runtimes.grammars.schema_grammar import MAX_TEXT
from tests.integration.runtimes.grammar_walk import Vocabulary
from tests.integration.runtimes.schema_check import valid
from tests.integration.runtimes.workers import smollm2

pytestmark = pytest.mark.integration

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 'qu"ote', "back\\slash", "new\nline", "ü"]}},
    },
    "required": ["name", "age", "mail", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
OPTIONAL = {
    "type": "object",
    "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
    "required": ["b"],
}
SHAPES = {
    "oneOf": [
        {"type": "object", "properties": {"k": {"const": "dot"}}, "required": ["k"], "additionalProperties": False},
        {
            "type": "object",
            "properties": {"k": {"enum": ["line", "arc"]}, "n": {"type": "integer"}},
            "required": ["k", "n"],
            "additionalProperties": False,
        },
    ],
}
NAMES: dict[str, Any] = {
    "type": "object",
    "properties": {'say "hi"': {"type": "boolean"}, "back\\slash\n": {"type": "null"}, "rest ::= x": {"const": None}},
    "required": ['say "hi"', "back\\slash\n", "rest ::= x"],
}
CASES: list[tuple[str, Any, list[str], list[str]]] = [
    (
        "person",
        PERSON,
        [
            '{"name":"Ada","age":36,"mail":null,"tags":[]}',
            '{\n  "name": "Ünï",\n  "age": 0,\n  "mail": "a@b",\n  "tags": ["a","b"]\n}',
            '{"name":"x","age":130,"mail":"","tags":["qu\\"ote","back\\\\slash","new\\nline","ü"]}',
        ],
        [
            '{"name":"","age":3,"mail":null,"tags":[]}',
            '{"name":"thirteen char","age":3,"mail":null,"tags":[]}',
            '{"name":"x","age":131,"mail":null,"tags":[]}',
            '{"name":"x","age":-1,"mail":null,"tags":[]}',
            '{"name":"x","age":03,"mail":null,"tags":[]}',
            '{"name":"x","age":3,"mail":null,"tags":["c"]}',
            '{"name":"x","age":3,"mail":null,"tags":[],"more":1}',
            '{"name":"x","age":3,"mail":null}',
            '{"name":"a\nb","age":3,"mail":null,"tags":[]}',
        ],
    ),
    (
        "tree",
        TREE,
        ['{"value":1,"next":null}', '{"value":1,"next":{"value":-2,"next":null}}'],
        ['{"value":1,"next":1}', '{"value":1.5,"next":null}', '{"value":1}'],
    ),
    (
        "optional",
        OPTIONAL,
        ['{"b":2}', '{"a":1,"b":2}', '{"b":2,"c":3}', '{"a":1,"b":2,"c":3}'],
        ["{}", '{"a":1}', '{"a":1,"c":3}', '{"b":2,}', '{,"b":2}', '{"b":3}', '{"b":2,"c":3,"c":3}'],
    ),
    (
        "all optional",
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
        ["{}", '{"a":null}', '{"b":null}', '{"a":null,"b":null}'],
        ['{"a":null,}', '{"b":null,"a":null}', '{"c":null}'],
    ),
    ("one of", SHAPES, ['{"k":"dot"}', '{"k":"arc","n":3}'], ['{"k":"dot","n":3}', '{"k":"line"}', '{"k":"x"}']),
    (
        "names",
        NAMES,
        ['{"say \\"hi\\"":true,"back\\\\slash\\n":null,"rest ::= x":null}'],
        ['{"say "hi"":true,"back\\\\slash\\n":null,"rest ::= x":null}'],
    ),
    (
        "the same last word twice",
        {
            "$defs": {"a": {"x": {"const": "first"}}, "b": {"x": {"const": "second"}}, "string": {"const": "third"}},
            "prefixItems": [{"$ref": "#/$defs/a/x"}, {"$ref": "#/$defs/b/x"}, {"$ref": "#/$defs/string"}],
            "items": False,
            "minItems": 3,
        },
        ['["first","second","third"]'],
        ['["first","first","third"]', '["first","second"]', '["first","second","third",1]'],
    ),
    (
        "tuple with a rest",
        {"prefixItems": [{"type": "boolean"}], "items": {"type": "null"}, "minItems": 2, "maxItems": 3},
        ["[true,null]", "[true,null,null]"],
        ["[true]", "[null]", "[true,null,null,null]"],
    ),
    (
        "nullable object keeps its properties",
        {"type": ["object", "null"], "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
        ["null", '{"a":true}'],
        ["{}", '{"b":1}', '{"a":1}'],
    ),
    (
        "counts",
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        ["[true,false]", "[true,false,true]"],
        ["[]", "[true]", "[true,true,true,true]"],
    ),
    ("no items", {"type": "array", "items": False}, ["[]"], ["[1]", "[null]"]),
    (
        "a map",
        {"type": "object", "additionalProperties": {"type": "integer", "exclusiveMinimum": 0}, "maxProperties": 2},
        ["{}", '{"a":1}', '{"a":1,"b":22}'],
        ['{"a":0}', '{"a":"1"}', '{"a":1,"b":2,"c":3}'],
    ),
    (
        "decimals",
        {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
        ["-1.5", "-1.499", "-1", "0", "0.0", "2", "2.249999", "2.2", "1.999"],
        ["-1.51", "-2", "2.25", "2.3", "3", "2.250", "1e0", "--1"],
    ),
    ("hundredths", {"type": "number", "multipleOf": 0.01, "minimum": 0}, ["0.25", "3", "3.1"], ["0.255", "-1"]),
    ("any number", {"type": "number"}, ["1", "-0.5", "1e5", "12.5E-3"], ["1.", ".5", "+1", "1e999", "0x1"]),
    ("a pattern", {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"}, ['"AB-123"'], ['"A-123"', '"AB-12"', '"ab-123"']),
    ("a loose pattern", {"type": "string", "pattern": "a+b"}, ['"ab"', '"xxaaby"'], ['"ba"', '""']),
    (
        "a pattern of quotes",
        {"type": "string", "pattern": '^(?:"|\\\\|\\n)[^a]$'},
        ['"\\"b"', '"\\\\\\\\"', '"\\nb"', '"\\"\\""'],
        ['""b"', '"\\"a"', '"b"'],
    ),
    ("a date", {"type": "string", "format": "date"}, ['"2026-02-28"'], ['"2026-02-30"', '"2026-13-01"', '"26-1-1"']),
    (
        "a time",
        {"type": "string", "format": "time"},
        ['"23:59:59Z"', '"01:02:03.5+02:00"'],
        ['"24:00:00Z"', '"1:2:3Z"'],
    ),
    (
        "a uuid",
        {"type": "string", "format": "uuid"},
        ['"123e4567-e89b-12d3-a456-426614174000"'],
        ['"123e4567e89b12d3a456426614174000"'],
    ),
    (
        "two thousand characters exactly",
        {"type": "string", "minLength": 2000, "maxLength": 2000},
        ['"' + "ab" * 1000 + '"'],
        ['"' + "a" * 1999 + '"', '"' + "a" * 2001 + '"'],
    ),
    (
        "more than llama.cpp repeats",
        {"type": "string", "maxLength": 2500},
        ['"' + "a" * 2500 + '"'],
        ['"' + "a" * 2501 + '"'],
    ),
    (
        "type beside anyOf",
        {"type": "string", "anyOf": [{"const": "a"}, {"maxLength": 1, "type": "string"}]},
        ['"a"'],
        ["1"],
    ),
    ("enum within a type", {"type": ["integer", "null"], "enum": ["a", 3, None]}, ["3", "null"], ['"a"']),
    (
        "allOf of one",
        {"allOf": [{"$ref": "#/$defs/t"}], "title": "T", "$defs": {"t": {"type": "boolean"}}},
        ["true"],
        ["1"],
    ),
    (
        "an impossible option is left out",
        {"type": "object", "properties": {"a": {"type": "null"}, "b": False}, "required": ["a"]},
        ['{"a":null}'],
        ['{"a":null,"b":1}'],
    ),
    ("anything", True, ["1", "null", '{"a":[{}]}', '"x"'], ["nul", "{", "[1,]"]),
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(smollm2())


@pytest.mark.parametrize(("schema", "good", "bad"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_schema_takes_what_is_valid_and_nothing_else(
    vocabulary: Vocabulary, schema: Any, good: list[str], bad: list[str]
) -> None:
    grammar = json_schema_grammar(schema)
    for text in good:
        assert valid(json.loads(text), schema), f"the case itself is wrong: {text}"
        assert vocabulary.accepts(grammar, text), text
    for text in bad:
        assert not vocabulary.accepts(grammar, text), text


@pytest.mark.parametrize("schema", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_chance_never_leaves_a_schema(vocabulary: Vocabulary, schema: Any) -> None:
    grammar = json_schema_grammar(schema)
    ended = 0
    for seed in range(6):
        text = vocabulary.wander(grammar, seed)
        if text is not None:
            assert valid(json.loads(text), schema), text
            ended += 1
    assert ended or schema in ({"type": "string", "minLength": 2000, "maxLength": 2000}, TREE)


def test_any_json_object_and_no_blanks_for_ever(vocabulary: Vocabulary) -> None:
    grammar = json_object_grammar()
    for text in ("{}", '{"a":1}', '{ "a": [1, {"b": null}], "c": "x\\n\\u00e9" }', '{\n  "a": true\n}'):
        assert vocabulary.accepts(grammar, text), text
    for text in ("", "[]", "1", '{"a":1', '{"a":1} ', " {}", "{}{}", '{"a":01}', '{"a":"\n"}', '{"a":"\\ud800"}'):
        assert not vocabulary.accepts(grammar, text), text
    assert not vocabulary.accepts(grammar, "{" + " " * 2 + "}")
    assert not vocabulary.accepts(grammar, "{\n\n}")
    assert not vocabulary.accepts(grammar, "{\n" + " " * 21 + "}")
    assert not vocabulary.accepts(grammar, '{"a":' + "[" * 20 + "]" * 20 + "}")
    for seed in range(20):
        wandered = vocabulary.wander(grammar, seed)
        assert wandered is None or isinstance(json.loads(wandered), dict)


TOOLS: list[tuple[str, object]] = [
    ("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    ("stop", None),
]
WEATHER = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'


def test_a_call_names_a_tool_and_fits_its_parameters(vocabulary: Vocabulary) -> None:
    grammar = tool_call_grammar(TOOLS)
    for text in (WEATHER, '{"name":"stop","arguments":{}}'):
        assert vocabulary.accepts(grammar, text), text
    for text in (
        '{"name":"stop","arguments":{"city":"Oslo"}}',
        '{"name":"get_weather","arguments":{}}',
        '{"name":"other","arguments":{}}',
        '{"name":"stop"}',
        WEATHER + "\n" + WEATHER,
    ):
        assert not vocabulary.accepts(grammar, text), text


def test_several_calls_in_a_templates_own_marks(vocabulary: Vocabulary) -> None:
    grammar = tool_call_grammar(
        TOOLS, open_text="<tool>\n", close_text="\n</tool>", max_calls=2, arguments_key="parameters"
    )
    call = "<tool>\n" + WEATHER.replace("arguments", "parameters") + "\n</tool>"
    assert vocabulary.accepts(grammar, call)
    assert vocabulary.accepts(grammar, call + "\n" + call)
    assert not vocabulary.accepts(grammar, call + "\n" + call + "\n" + call)
    assert not vocabulary.accepts(grammar, WEATHER)


def test_the_largest_grammars_are_taken_by_llama_cpp(vocabulary: Vocabulary) -> None:
    many = {f"p{at}": {"type": "string", "maxLength": 100} for at in range(200)}
    for schema in (
        {"type": "string", "maxLength": MAX_TEXT, "minLength": MAX_TEXT - 1},
        {"type": "object", "properties": many},
        {"type": "array", "items": {"type": "array", "maxItems": 1000}, "maxItems": 1000, "minItems": 999},
        {"type": "string", "pattern": "^(a{1,100}|[b-z]{2,50}){3,4}$"},
        {"enum": [f"value {at}" for at in range(1000)]},
    ):
        with vocabulary.sampler(json_schema_grammar(schema)) as walk:
            assert walk.allowed(list(range(vocabulary.size)))
