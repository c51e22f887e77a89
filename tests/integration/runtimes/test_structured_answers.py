"""SmolLM2 at a high temperature, held to schemas through the API: every answer that ends is valid."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.runtimes.schema_check import valid
from tests.integration.runtimes.workers import WatchedWorker

pytestmark = pytest.mark.integration

SEEDS = range(4)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "height": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2.5},
        "mail": {"anyOf": [{"type": "string", "maxLength": 10}, {"type": "null"}]},
        "colors": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "height", "mail", "colors", "born"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "string", "pattern": "^[A-Z][a-z]{2,5}$"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}


def ask(worker: WatchedWorker, response_format: dict[str, Any], seed: int) -> tuple[str, str]:
    answer = worker.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Describe a person."}],
            "response_format": response_format,
            "temperature": 1.5,
            "top_p": 1,
            "min_p": 0,
            "top_k": 0,
            "seed": seed,
            "max_tokens": 160,
        },
    )
    (choice,) = answer["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def ask_all(worker: WatchedWorker, response_format: dict[str, Any]) -> list[str]:
    """Return the answers that ended by themselves."""
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        answers = list(pool.map(lambda seed: ask(worker, response_format, seed), SEEDS))
    return [text for text, finish in answers if finish == "stop"]


@pytest.mark.parametrize("schema", [PERSON, TREE], ids=["person", "tree"])
def test_an_answer_that_ends_is_valid(llama: WatchedWorker, schema: dict[str, Any]) -> None:
    ended = ask_all(llama, {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}})
    assert ended
    for text in ended:
        assert valid(json.loads(text), schema), text


def test_any_object_is_one_object(llama: WatchedWorker) -> None:
    for text in ask_all(llama, {"type": "json_object"}):
        assert isinstance(json.loads(text), dict), text
