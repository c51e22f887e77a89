"""A model that is unloaded in the middle of a long answer, by a whole agent with a real model."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.agent_process import AgentProcess

pytestmark = pytest.mark.integration

TOKENS = 1200
"""So long an answer takes longer than the time that a worker without answers has to end."""


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with tempfile.TemporaryDirectory(prefix="garrison-") as name:  # short: it holds a socket
        folder = Path(name)
        process = AgentProcess(folder)
        with process.config.open("a") as file:
            file.write("[runtime]\nthreads = 1\ncontext_length = 2048\n")
        process.enrol(folder)
        process.install_text()
        process.start()
        yield process
        process.end(signal.SIGTERM, 30)


def in_flight(agent: AgentProcess) -> int:
    return sum(one["active"] for one in agent.ask("GET", "/garrison/v1/loaded")[1])


def test_the_answer_comes_to_its_end_and_the_next_one_does_not_wait_for_it(agent: AgentProcess) -> None:
    agent.wait_for(lambda: bool(agent.alias()["loaded"]))
    long = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True}
    with ThreadPoolExecutor() as clients:
        answer = clients.submit(agent.ask, "POST", "/v1/completions", long)
        agent.wait_for(lambda: in_flight(agent) == 1)
        unload = clients.submit(agent.ask, "POST", "/garrison/v1/models/smollm2/unload")
        agent.wait_for(lambda: not agent.alias()["loaded"])
        status, body = agent.ask("POST", "/v1/completions", {**long, "max_tokens": 4})
        assert (status, body["usage"]["completion_tokens"]) == (200, 4)
        status, body = answer.result()
        assert (status, body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (
            200,
            TOKENS,
            "length",
        )
        assert unload.result() == (
            200,
            {"id": "smollm2-135m-instruct:1.0.0", "alias": "smollm2", "outcome": "unloaded"},
        )
