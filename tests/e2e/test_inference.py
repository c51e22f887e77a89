"""Everything that applications and people do with a board's models, together, on real agents with real models."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import httpx2
import ollama
import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from demo.processes import wait_for
from demo.steps import FILES
from tests.e2e.conftest import GOOD, Scene
from tests.integration.agent_process import DEADLINE_S, AgentProcess

pytestmark = pytest.mark.e2e
TEXT, EMBEDDINGS, TENSORS, GIANT = "smollm2", "embeddings", "files", "giant"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]
LONG: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Write a very long story about the sea."}]
BUDGET_MB = 450
"""Room for either of two models, not for both."""
CRASHES = 5
"""So many in a row, and the agent gives up (``core.service``)."""
WEATHER: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Served:
    """A running agent, and its clients."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.process = AgentProcess(folder)
        self.process.config.write_text(
            f'state_dir = "{self.process.state}"\nruntime_dir = "{self.process.run}"\n'
            f"[runtime]\nthreads = 1\n{settings}"
        )
        self.process.enrol(folder / "pki")
        path = str(self.process.run / "agent.sock")
        self._open = contextlib.ExitStack()
        self.http = self._open.enter_context(
            httpx2.Client(transport=httpx2.HTTPTransport(uds=path), base_url="http://localhost", timeout=DEADLINE_S)
        )
        self.openai = openai.OpenAI(
            base_url="http://localhost/v1", api_key="none", http_client=self.http, max_retries=0
        )
        self.ollama = self._open.enter_context(
            ollama.Client("http://localhost", transport=httpx.HTTPTransport(uds=path), timeout=DEADLINE_S)
        )

    def start(self, expected: set[str]) -> None:
        self.process.start()
        self.process.wait_for(lambda: self.in_memory() >= expected)

    def stop(self) -> None:
        self._open.close()
        self.process.end(signal.SIGTERM, 30)

    def try_cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "garrison_agent", "--config", str(self.process.config), *words]
        home = {**os.environ, "XDG_STATE_HOME": str(self.process.state.parent / "home")}
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=home)

    def cli(self, *words: str) -> str:
        done = self.try_cli(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "-o", "json"))

    def in_memory(self) -> set[str]:
        return {one["alias"] for one in self.process.ask("GET", "/garrison/v1/loaded")[1]}

    def alias(self, alias: str) -> Any:
        return next(one for one in self.process.status()["aliases"] if one["alias"] == alias)

    def say(self, *, max_tokens: int = 4, **options: Any) -> str:
        answer = self.openai.chat.completions.create(model=TEXT, messages=HELLO, max_tokens=max_tokens, **options)
        return answer.choices[0].message.content or ""

    def workers(self) -> set[int]:
        assert self.process.child is not None
        pids = set()
        for task in Path(f"/proc/{self.process.child.pid}/task").iterdir():
            pids |= {int(pid) for pid in (task / "children").read_text().split()}
        return {pid for pid in pids if b"runtimes.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}

    def fresh_worker(self) -> int:
        """Return the process of the text model, loaded anew."""
        self.cli("unload", TEXT)
        before = self.workers()
        self.cli("load", TEXT)
        (pid,) = self.workers() - before
        return pid

    def lines(self, path: str, body: dict[str, Any], then: Callable[[], None]) -> list[str]:
        """Return the lines of a streamed answer; ``then`` is called when it has begun."""
        lines = []
        with self.http.stream("POST", path, json={"model": TEXT, "messages": LONG, "stream": True, **body}) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line:
                    lines.append(line)
                if len(lines) == 3:
                    then()
        return lines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def board(port: int) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="garrison-") as folder:  # short: it holds a socket
        settings = f'stall_timeout_s = 5\npinned = ["{TENSORS}"]\n[api]\nport = {port}\ntcp = "keys"\n'
        served = Served(Path(folder), settings)
        served.process.install()
        served.process.install_text()
        served.process.install_embeddings()
        served.start({TEXT, EMBEDDINGS, TENSORS})
        yield served
        served.stop()


@pytest.fixture(scope="module")
def small_board() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="garrison-") as folder:
        served = Served(Path(folder), f'[api]\ntcp = "off"\n[limits]\nmemory_budget_mb = {BUDGET_MB}\n')
        served.process.install_text()
        served.process.install_embeddings()
        served.process.install_giant()
        served.start(set())
        yield served
        served.stop()


def test_a_request_loads_what_was_unloaded_and_all_agree_on_what_is_in_memory(board: Served) -> None:
    board.cli("unload", TEXT)
    for expected in ({EMBEDDINGS, TENSORS}, {TEXT, EMBEDDINGS, TENSORS}):
        assert board.in_memory() == {one["alias"] for one in board.json("ps")} == expected
        ours = {model.model for model in board.ollama.ps().models}
        assert ours == {f"{name}:latest" for name in expected - {TENSORS}}
        assert board.say()


def test_a_model_leaves_when_its_time_is_over_but_never_under_a_request(board: Served) -> None:
    board.ollama.chat(TEXT, HELLO, keep_alive=0, options={"num_predict": 2})
    board.process.wait_for(lambda: TEXT not in board.in_memory())
    long = {"num_predict": 100, "temperature": 0}
    parts = list(board.ollama.chat(TEXT, LONG, keep_alive="0.2s", stream=True, options=long))
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 100)
    board.process.wait_for(lambda: TEXT not in board.in_memory())
    for alias in (TENSORS, EMBEDDINGS):
        board.cli("load", alias, "--keep-alive", "0")
    board.process.wait_for(lambda: EMBEDDINGS not in board.in_memory())
    assert board.in_memory() == {TENSORS}  # pinned


def test_two_that_do_not_fit_together_take_turns(small_board: Served) -> None:
    def ask(alias: str) -> int:
        if alias == TEXT:
            return len(small_board.say())
        return len(small_board.openai.embeddings.create(model=EMBEDDINGS, input="a cat").data)

    for alias in (TEXT, EMBEDDINGS, TEXT):
        assert ask(alias) > 0
        assert small_board.in_memory() == {alias}
    with ThreadPoolExecutor(4) as pool:  # at the same time: who finds the memory in use waits
        assert min(pool.map(ask, [TEXT, EMBEDDINGS] * 2)) > 0


def test_what_never_fits_is_refused_with_numbers_before_anything_leaves(small_board: Served) -> None:
    small_board.say()
    done = small_board.try_cli("load", GIANT)
    assert done.returncode == 9
    assert "1048576 MiB" in done.stderr
    assert f"budget is {BUDGET_MB} MiB" in done.stderr
    assert small_board.in_memory() == {TEXT}


def test_keys_over_tcp(board: Served, port: int) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)

    key = board.json("app", "add", "camera", "--models", TEXT, "--rate", "2")["key"]
    with client(key) as camera, client("gsk_" + "0" * 64) as stranger:
        for _ in range(2):
            camera.completions.create(model=TEXT, prompt="Once", max_tokens=2)
        with pytest.raises(openai.RateLimitError) as limited:
            camera.completions.create(model=TEXT, prompt="Once", max_tokens=2)
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
        with pytest.raises(openai.PermissionDeniedError):
            camera.embeddings.create(model=EMBEDDINGS, input="a cat")
        assert [model.id for model in camera.models.list()] == [TEXT]
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        (app,) = board.json("app", "list")
        assert (app["name"], app["requests"], app["models"]) == ("camera", 2, [TEXT])
        assert app["tokens"] >= 4
        board.cli("app", "remove", "camera")
        with pytest.raises(openai.AuthenticationError):
            camera.models.list()


def test_a_killed_worker_ends_its_streams_with_an_error_and_the_next_request_is_answered(board: Served) -> None:
    kill = partial(os.kill, board.fresh_worker(), signal.SIGKILL)
    event = board.lines("/v1/chat/completions", {}, kill)[-1]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "worker.died"
    assert board.say()
    kill = partial(os.kill, board.fresh_worker(), signal.SIGKILL)
    assert "worker ended" in json.loads(board.lines("/api/chat", {}, kill)[-1])["error"]
    assert board.say()
    assert "SIGKILL" in board.alias(TEXT)["worker_failure"]


def test_a_worker_that_hangs_is_ended_and_another_one_serves(board: Served) -> None:
    stop = partial(os.kill, board.fresh_worker(), signal.SIGSTOP)
    event = board.lines("/v1/chat/completions", {}, stop)[-1]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "worker.died"
    assert board.say()
    assert board.alias(TEXT)["worker_failure"].startswith("worker.stalled")


def test_a_worker_that_keeps_crashing_is_given_up_with_a_reason_until_somebody_loads_it(board: Served) -> None:
    board.cli("unload", TEXT)
    others = board.workers()
    for _ in range(CRASHES):
        if board.alias(TEXT)["worker"] == "failed":
            break  # the crashes of other tests count
        board.cli("load", TEXT)
        for pid in board.workers() - others:
            os.kill(pid, signal.SIGKILL)
        board.process.wait_for(lambda: board.alias(TEXT)["worker"] in ("backoff", "failed"))
    assert board.alias(TEXT)["worker"] == "failed"
    assert "SIGKILL" in board.cli("status")
    with pytest.raises(openai.InternalServerError) as failed:
        board.say()
    assert (failed.value.status_code, failed.value.code) == (503, "model.failed")
    board.cli("load", TEXT)
    assert board.say()


def test_the_official_client_gets_what_it_asks_for(board: Served) -> None:
    chat = board.openai.chat.completions
    called = chat.create(
        model=TEXT,
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice="required",
        temperature=0,
        max_tokens=80,
    ).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls is not None
    assert called.message.tool_calls[0].type == "function"
    assert json.loads(called.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")

    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    text = board.say(
        response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}},
        max_tokens=60,
        temperature=0,
    )
    assert list(json.loads(text)) == ["n"]

    several = chat.create(model=TEXT, messages=HELLO, n=2, max_tokens=3, logprobs=True, top_logprobs=2)
    assert len(several.choices) == 2
    for choice in several.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 3

    with board.openai.responses.create(model=TEXT, input="Say hello.", max_output_tokens=16, stream=True) as events:
        seen = list(events)
    words = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert words
    assert seen[-1].type in ("response.completed", "response.incomplete")
    assert seen[-1].response.output_text == words

    answer = board.openai.embeddings.create(model=EMBEDDINGS, input=["a cat", "a dog"])
    assert [len(one.embedding) for one in answer.data] == [576, 576]

    with pytest.raises(openai.InternalServerError) as late:
        chat.create(model=TEXT, messages=LONG, max_tokens=1000, extra_headers={"x-garrison-timeout": "0.2"})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


def test_histograms_grow_with_requests(board: Served) -> None:
    def counts() -> Counter[str]:
        found: Counter[str] = Counter()
        for line in board.http.get("/metrics").text.splitlines():
            name, _, labels = line.partition("{")
            if name.endswith("_count") and f'"{TEXT}",gen_ai_operation_name="chat"' in labels:
                found[name] += int(labels.split()[-1])
        return found

    board.say()
    before = counts()
    assert {
        "gen_ai_client_token_usage_count",
        "gen_ai_server_time_to_first_token_seconds_count",
        "gen_ai_server_time_per_output_token_seconds_count",
    } <= set(before)
    board.say()
    board.process.wait_for(lambda: all(count > before[name] for name, count in counts().items()))


def test_by_hand(board: Served) -> None:
    assert board.cli("run", TEXT, "Name three colors.").strip()
    reading, writing = board.json("bench", TEXT, "-p", "64", "-n", "16", "-r", "2")
    assert [(one["test"], len(one["samples_ts"])) for one in (reading, writing)] == [("pp64", 2), ("tg16", 2)]
    assert reading["avg_ts"] > 0
    assert "fits" in board.cli("model", "info", TEXT, "--variants")
    files = board.json("cache", "verify")["files"]
    assert {file["outcome"] for file in files} == {"ok"}


def test_a_flipped_byte_is_found_and_repaired_from_the_controller(scene: Scene) -> None:
    board = scene.board("damaged")
    board.start()
    assert scene.settle(scene.roll_out(board, GOOD))["status"] == "FINISHED"
    (blob,) = (path for path in (board.state / "blobs").glob("sha256/??/*") if len(path.name) == 64)
    content = blob.read_bytes()
    with blob.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 1]))
    found = board.try_run("cache", "verify", "-o", "json")
    assert found.returncode == 1
    assert "damaged" in {file["outcome"] for file in json.loads(found.stdout)["files"]}
    repaired = board.try_run("cache", "verify", "--repair", "-o", "json")
    assert (repaired.returncode, json.loads(repaired.stdout)["ok"]) == (0, True)
    assert blob.read_bytes() == content
    board.run("unload", FILES)
    board.run("load", FILES)
    wait_for("the model to serve", lambda: board.alias(FILES)["loaded"], timeout_s=30, alive=[board.agent])
    board.agent.stop()
