"""Two models that do not fit into a board's memory together, one of which always has a request in flight."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.agent_process import AgentProcess

pytestmark = pytest.mark.integration

BUDGET_MB = 350
"""Holds either model, whatever is measured of it, and never both."""


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with tempfile.TemporaryDirectory(prefix="garrison-") as name:  # short: it holds a socket
        folder = Path(name)
        process = AgentProcess(folder)
        with process.config.open("a") as file:
            file.write(f"[limits]\nmemory_budget_mb = {BUDGET_MB}\n[runtime]\nthreads = 1\ncontext_length = 512\n")
        process.enrol(folder)
        process.install_text()
        process.install_embeddings()
        process.start()
        yield process
        process.end(signal.SIGTERM, 30)


def loaded(agent: AgentProcess) -> set[str]:
    return {one["alias"] for one in agent.status()["aliases"] if one["loaded"]}


def test_a_model_that_is_never_idle_makes_way_and_comes_back(agent: AgentProcess) -> None:
    agent.wait_for(lambda: len(loaded(agent)) == 1)
    answers: Counter[int] = Counter()
    over, answered = threading.Event(), threading.Semaphore(0)

    def keep_busy() -> None:
        body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 16, "ignore_eos": True}
        while not over.is_set():
            status, _ = agent.ask("POST", "/v1/completions", body)
            answers[status] += 1
            answered.release()

    clients = [threading.Thread(target=keep_busy) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        for _ in range(3):
            assert answered.acquire(timeout=60)
        for _ in range(2):
            status, body = agent.ask("POST", "/v1/embeddings", {"model": "embeddings", "input": "a lighthouse"})
            assert status == 200, body
            before = answers.total()
            agent.wait_for(lambda before=before: answers.total() >= before + 6)  # type: ignore[misc]
    finally:
        over.set()
        for client in clients:
            client.join(60)
    assert set(answers) == {200}
    assert len(loaded(agent)) == 1
