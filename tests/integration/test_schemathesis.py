"""Requests made up from the OpenAPI document, by schemathesis, at an agent with real models.

Some are such as the document allows, some such as it forbids. Whatever comes must be in the document: the status, the
content type, and the body's form, that of errors included; so no server error but 503 and 504: 502 would mean that a
worker ended. The requests are the same in every run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.core.result import Ok

from scripts.openapi import DOCUMENT
from tests.integration.agent_process import AgentProcess
from tests.integration.whole_board import EMBEDDINGS, FILES, TEXT, WholeBoard

pytestmark = pytest.mark.integration

FEW, MANY = 2, 8
TIMEOUT_S = 30.0
MAX_TOKENS = 4
SCHEMA = schemathesis.openapi.from_dict(json.loads(DOCUMENT.read_text(encoding="utf-8")))
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations() if isinstance(result, Ok)]
assert len(OPERATIONS) > 70
WITH_BODY = [one for one in OPERATIONS if any(body.media_type == "application/json" for body in one.body)]
MODELS = re.compile(r"/v1/(chat|completions|embeddings|responses$)|/api/(chat|generate|embed)|.*/infer")
QUESTIONS = {
    "messages": [{"role": "user", "content": "Hello"}],
    "prompt": "Hello",
    "input": "Hello",
    "inputs": [{"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": [65] * 2048}],
    "outputs": [{"name": "target_label"}],
}
DOCUMENTED_FAILURES = {503, 504}


class Client:
    """Somebody with an admin key, who may do everything over TCP."""

    def __init__(self, board: WholeBoard) -> None:
        self.url = f"http://127.0.0.1:{board.port}"
        self.board: AgentProcess = board.process
        status, added = self.board.ask("POST", "/garrison/v1/apps", {"name": "tester", "admin": True})
        assert status == 200
        self.headers = {"authorization": f"Bearer {added['key']}"}
        self.session = requests.Session()

    def try_out(self, case: Case[Any]) -> int:
        """Send a request, hold the answer against the document, and return its status."""
        response = case.call(self.url, session=self.session, headers=self.headers, timeout=TIMEOUT_S)
        checks = [status_code_conformance, content_type_conformance]
        if response.status_code not in DOCUMENTED_FAILURES:
            checks.append(not_a_server_error)
        if "json" in str(response.headers.get("content-type")):  # there are no schemas of streams
            checks.append(response_schema_conformance)
        case.validate_response(response, checks=checks, headers=self.headers)
        return response.status_code


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with WholeBoard.running() as board:
        client = Client(board)
        yield client
        client.session.close()


def aimed(case: Case[Any]) -> Case[Any]:
    """Return a request to a model that is there, for a few tokens; made-up names would all be 404.

    Every second one asks something sensible, so that the rest of it is not refused for that reason alone.
    """
    path, body = case.operation.path, case.body
    model = EMBEDDINGS if "embed" in path else FILES if path.startswith("/v2/") else TEXT
    if isinstance(case.path_parameters, dict) and path not in ("/garrison/v1/apps/{name}", "/v1/responses/{name}"):
        known = {"name": model, "version": "1.0.0"}
        case.path_parameters |= {name: known[name] for name in known.keys() & case.path_parameters.keys()}
    if "x-garrison-timeout" in case.headers:
        case.headers["x-garrison-timeout"] = "20"  # the ones made up are microseconds, or hours
    if isinstance(body, dict):
        sensible: dict[str, Any] = QUESTIONS if len(body) % 2 else {}
        body.update({field: value for field, value in sensible.items() if field in body})
        if "model" in body:
            body["model"] = model
            limits = {"/v1/responses": "max_output_tokens", "/v1/chat/completions": "max_completion_tokens"}
            body[limits.get(path, "max_tokens")] = MAX_TOKENS
            if path.startswith("/api/"):
                options = body.get("options")
                body["options"] = {**(options if isinstance(options, dict) else {}), "num_predict": MAX_TOKENS}
    return case


def try_all(client: Client, operation: Any, mode: GenerationMode, count: int) -> Counter[int]:
    """Send ``count`` requests, always the same ones, and return how often each status came."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case[Any]) -> None:
        statuses[client.try_out(aimed(case))] += 1

    run()
    return statuses


def name_of(operation: Any) -> str:
    return f"{operation.method.upper()} {operation.path}"


@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
def test_what_the_document_allows_is_answered_as_it_says(client: Client, operation: Any) -> None:
    statuses = try_all(client, operation, GenerationMode.POSITIVE, MANY if operation in WITH_BODY else FEW)
    if MODELS.match(operation.path):  # or else all of it was refused, and nothing tried
        assert statuses[200], statuses


@pytest.mark.parametrize("operation", WITH_BODY, ids=name_of)
def test_what_it_forbids_is_answered_as_it_says(client: Client, operation: Any) -> None:
    statuses = try_all(client, operation, GenerationMode.NEGATIVE, MANY)
    assert any(400 <= status < 500 for status in statuses), statuses


def test_an_import_of_a_name_beyond_ascii_is_unknown(client: Client) -> None:
    client.board.ask("POST", "/garrison/v1/bundle")  # or one is under way already
    answer = client.session.post(f"{client.url}/garrison/v1/bundle/%C3%B8", headers=client.headers, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["code"]) == (404, "bundle.session_unknown")


def test_no_request_ended_a_worker(client: Client) -> None:
    aliases = client.board.status()["aliases"]
    assert {one["alias"]: one["worker_failure"] for one in aliases} == {TEXT: None, EMBEDDINGS: None, FILES: None}
