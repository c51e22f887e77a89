"""Write the OpenAPI 3.1 document of the local API: ``python -m scripts.openapi``. A test says when that is due."""

from __future__ import annotations

import json
import re
from pathlib import Path

from scripts.openapi_operations import BYTES, JSON, SURFACES, VIEWS, Operation
from scripts.openapi_schemas import FLAG, TEXT, Schema, record, ref, request_components, view_components

DOCUMENT = Path(__file__).resolve().parents[1] / "agent" / "garrison_agent" / "api" / "openapi.json"
_ERRORS: dict[str, Schema] = {
    "OpenAiError": record(
        error=record(
            message=TEXT,
            type=TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        )
    ),
    "PlainError": record("error", error=TEXT, code=TEXT),
    "GarrisonError": record(code=TEXT, message=TEXT, hint=TEXT, retryable=FLAG, fields={"type": "object"}),
}
_FAILURES = {
    "4XX": "Refused; 429 has Retry-After",
    "502": "The worker ended before its answer was complete",
    "503": "Busy, loading, or failed; mostly with Retry-After",
    "504": "The time that the request had has passed",
}
_ANSWERS = "#/components/responses/"
_ASKS_MODELS = re.compile(r"/v1/(chat|completions|embeddings|responses)|/v2/models|/api/(chat|generate|embed)")


def document() -> Schema:
    """Return the document."""
    paths: dict[str, Schema] = {}
    for tag, operations in SURFACES.items():
        for operation in operations:
            paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(tag, operation)
    components = {**request_components(), **view_components(*VIEWS), **_ERRORS}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Garrison local API",
            "version": "1",
            "summary": "Signed AI models on this board, as OpenAI, Ollama, Foundry Local, and KServe have them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:5273"}],
        "security": [{}, {"key": []}],
        "tags": [{"name": tag} for tag in SURFACES],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "responses": _failures(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "Of garrison-agent app add: gsk_..."}
            },
        },
    }


def _operation(tag: str, operation: Operation) -> Schema:
    described: Schema = {"tags": [tag], "operationId": _id(operation), "summary": operation.summary}
    if operation.manages:
        described["description"] = "Over TCP for the key of an admin application alone."
    parameters = _parameters(operation)
    if parameters:
        described["parameters"] = parameters
    content: dict[str, Schema] = {}
    if operation.body is not None:
        content[JSON] = {"schema": operation.body}
    if operation.binary:
        content[BYTES] = {}
    if content:
        described["requestBody"] = {"required": not operation.optional, "content": content}
    return {**described, "responses": _answers(operation)}


def _id(operation: Operation) -> str:
    words = re.findall(r"[a-z0-9]+", operation.path.replace("{", "").lower())
    return "_".join([operation.method.lower(), *words])


def _parameters(operation: Operation) -> list[Schema]:
    names = re.findall(r"\{(\w+)\}", operation.path)
    found = [{"name": name, "in": "path", "required": True, "schema": {**TEXT, "minLength": 1}} for name in names]
    found += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    found += [{"name": name, "in": "header", "schema": schema} for name, schema in operation.headers.items()]
    if _ASKS_MODELS.match(operation.path) and not operation.refused:
        seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400}
        about = "Seconds until the answer must be complete."
        found.append({"name": "x-garrison-timeout", "in": "header", "schema": seconds, "description": about})
    return found


def _answers(operation: Operation) -> dict[str, Schema]:
    answers: dict[str, Schema] = {}
    if not operation.refused:
        content = {kind: {"schema": schema} if schema else {} for kind, schema in operation.answers.items()}
        answers["200"] = {"description": "Done", **({"content": content} if content else {})}
    return {**answers, **{status: {"$ref": f"{_ANSWERS}{_error(operation.path)}.{status}"} for status in _FAILURES}}


def _failures() -> dict[str, Schema]:
    return {
        f"{error}.{status}": {"description": why, "content": {JSON: {"schema": ref(error)}}}
        for error in _ERRORS
        for status, why in _FAILURES.items()
    }


def _error(path: str) -> str:
    if path.startswith("/v1/"):
        return "OpenAiError"
    return "PlainError" if path.startswith(("/v2/", "/api/")) else "GarrisonError"


def text() -> str:
    """Return the document as it is checked in."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
