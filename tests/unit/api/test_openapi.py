"""The OpenAPI document of the local API: fresh, and of exactly what is served."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from garrison_agent.api.asgi import BodyBudget, Request
from garrison_agent.api.openapi import Description
from scripts.openapi import DOCUMENT, text
from tests.fakes.route_list import served

PARSED: dict[str, Any] = json.loads(DOCUMENT.read_text(encoding="utf-8"))


def test_the_document_is_fresh() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == text(), "run: python -m scripts.openapi"


def test_it_describes_what_is_served_and_nothing_else() -> None:
    described = {(method.upper(), path) for path, methods in PARSED["paths"].items() for method in methods}
    assert described == {(method, route.path) for route in served() for method in route.methods}


def test_operations_have_names_of_their_own() -> None:
    names = Counter(one["operationId"] for methods in PARSED["paths"].values() for one in methods.values())
    assert [name for name, count in names.items() if count > 1] == []


def test_every_reference_leads_somewhere_and_no_component_is_left_over() -> None:
    def refs(value: Any) -> set[str]:
        if isinstance(value, list):
            return {ref for one in value for ref in refs(one)}
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*(refs(one) for one in value.values()))
        return set()

    components = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in PARSED["components"][kind]
    }
    assert refs(PARSED) == components


def test_it_is_answered_as_it_lies_on_the_disk() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/openapi.json", "headers": [], "state": {}}
    asyncio.run(Description().document(Request(scope, receive, send, BodyBudget(), None)))
    start, body = sent
    assert (start["status"], dict(start["headers"])[b"content-type"]) == (200, b"application/json")
    assert body["body"] == DOCUMENT.read_bytes()
    assert int(dict(start["headers"])[b"content-length"]) == len(body["body"])
