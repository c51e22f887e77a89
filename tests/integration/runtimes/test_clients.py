"""Official clients of other makers, unchanged, through the agent's local API to the real SmolLM2."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest

from garrison_agent.api.server import LocalApi
from tests.fakes.local_owner import LocalOwner, make_route
from tests.integration.runtimes.test_llama_worker import COLORS, QUESTION
from tests.integration.runtimes.workers import WatchedWorker, eventually
from tests.integration.surfaces import serving

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
CLIENTS = ROOT / "tests" / "node"
DEADLINE_S = 120


@pytest.fixture(scope="module")
def api(llama: WatchedWorker, short_folder: Path) -> Iterator[LocalApi]:
    owner = LocalOwner(make_route(socket=llama.spec.socket), answer=lambda command: "done")
    with serving(owner, short_folder / "agent.sock") as running:
        yield running


@pytest.fixture(scope="module")
def heard(api: LocalApi, node: Path) -> dict[str, Any]:
    """What the official Node client heard."""
    command = [str(node), "openai.mjs", f"{api.endpoints[0]}/v1"]
    run = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert isinstance(told, dict)
    return told


def test_the_node_client_lists_and_chats(heard: dict[str, Any]) -> None:
    assert heard["models"] == ["chat"]
    assert (heard["model"]["id"], heard["model"]["object"]) == ("chat", "model")
    assert heard["chat"]["choices"][0]["message"]["content"] == COLORS
    assert heard["response"] == COLORS


def test_the_node_client_streams(heard: dict[str, Any]) -> None:
    assert "".join(heard["deltas"]) == COLORS
    assert len(heard["deltas"]) > 3
    assert heard["usage"]["completion_tokens"] > 8


def test_the_node_client_gets_what_its_schema_says(heard: dict[str, Any]) -> None:
    assert json.loads(heard["structured"]["choices"][0]["message"]["content"])["color"] in ("red", "blue")


def test_the_node_client_understands_errors(heard: dict[str, Any]) -> None:
    expected = {"status": 404, "code": "model_not_found", "type": "invalid_request_error", "name": "NotFoundError"}
    assert heard["error"] == expected


def test_a_node_client_that_leaves_stops_the_answer(heard: dict[str, Any], llama: WatchedWorker) -> None:
    eventually(lambda: llama.health()["active"] == 0, "nobody generates any more", timeout_s=20)


def test_the_ollama_client_through_the_agent(api: LocalApi) -> None:
    options = {"temperature": 0, "repeat_penalty": 1.0}
    with ollama.Client(api.endpoints[0]) as client:
        parts = list(client.chat("chat:latest", QUESTION, stream=True, options=options, keep_alive="5m"))
        assert "".join(part.message.content or "" for part in parts) == COLORS
        assert parts[-1].done_reason == "stop"
        assert client.generate("smollm2", "Name three colors.", options=options).response == COLORS
        with pytest.raises(ollama.ResponseError, match="context"):
            client.generate("chat", "word " * 4000)
