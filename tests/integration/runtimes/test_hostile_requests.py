"""A text worker under attack: absurd values, broken HTTP, clients who leave at any moment, and readers who never read.

Whatever comes, it is refused in the words of its API or answered, the worker goes on, and nothing of it stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from garrison_agent.runtimes.process import Exited, RequestDone
from tests.integration.runtimes.workers import DEADLINE_S, WatchedWorker, eventually, llama_spec, smollm2

pytestmark = pytest.mark.integration

CONTEXT = 512
PARIS = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 1}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
COUNT = "/v1/chat/completions/tokenizer/encode/count"
OLLAMA_CHAT = "/api/chat"
OLLAMA_GENERATE = "/api/generate"
SCORE = "/internal/score"
TURNS = [{"role": "user", "content": "hi"}]
HONEST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TURNS, "max_tokens": 1},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 1},
    RESPONSES: {"input": "hi", "max_output_tokens": 1},
    COUNT: {"messages": TURNS},
    OLLAMA_CHAT: {"model": "m", "messages": TURNS, "stream": False, "options": {"num_predict": 1}},
    OLLAMA_GENERATE: {"model": "m", "prompt": "hi", "stream": False, "options": {"num_predict": 1}},
    SCORE: {"prompt": "hi", "choices": ["a"]},
}
OPENAI = (CHAT, COMPLETIONS)
OLLAMA = (OLLAMA_CHAT, OLLAMA_GENERATE)


@pytest.fixture(scope="module")
def worker(short_folder: Path) -> Iterator[WatchedWorker]:
    with WatchedWorker(llama_spec(smollm2(), short_folder / "hostile.sock", context_length=CONTEXT)) as worker:
        worker.ready()
        yield worker


@pytest.fixture(autouse=True)
def still_well(worker: WatchedWorker) -> Iterator[None]:
    """After every test, the worker runs, is idle, and answers right."""
    yield
    eventually(lambda: idle(worker), "nothing is left of the requests")
    assert not [event for event in worker.events if isinstance(event, Exited)]
    assert worker.post(COMPLETIONS, PARIS)["choices"][0]["text"] == " Paris"


def idle(worker: WatchedWorker) -> bool:
    health = worker.health()
    return (health["active"], health["queued"]) == (0, 0)


def status_of(worker: WatchedWorker, request: bytes) -> int:
    """Send bytes as they are and return the status of what comes back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(worker.spec.socket))
        connection.sendall(request)
        head = b""
        while b"\r\n" not in head:
            part = connection.recv(65536)
            assert part, "no answer"
            head += part
    return int(head.split(b" ", 2)[1])


def posted(path: str, body: bytes, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "host: worker", f"content-length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def with_more(body: dict[str, Any], more: str) -> bytes:
    """Return ``body`` as JSON with ``more`` written into it as it is."""
    return f"{json.dumps(body)[:-1]},{more}}}".encode()


NO_JSON: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "nothing": lambda body: b"",
    "null": lambda body: b"null",
    "a list": lambda body: b"[]",
    "something behind": lambda body: json.dumps(body).encode() + b"x",
    "half": lambda body: json.dumps(body).encode()[:-1],
    "UTF-16": lambda body: json.dumps(body).encode("utf-16"),
    "bytes that are no UTF-8": lambda body: json.dumps(body).replace("hi", "\xff").encode("latin-1"),
    "half a pair": lambda body: json.dumps(body).replace("hi", r"\ud800").encode(),
    "arrays in arrays": lambda body: with_more(body, '"x":' + "[" * 100_000 + "]" * 100_000),
    "a number of 5,000 digits": lambda body: with_more(body, '"seed":' + "9" * 5000),
    "nulls": lambda body: json.dumps(dict.fromkeys(body)).encode(),
}


@pytest.mark.parametrize("path", HONEST)
def test_what_is_no_request_is_refused(worker: WatchedWorker, path: str) -> None:
    assert worker.call("POST", path, HONEST[path])[0] == 200
    for name, make in NO_JSON.items():
        status, answer = worker.call("POST", path, make(HONEST[path]))
        assert (name, status) == (name, 400)
        assert answer["error"]


@pytest.mark.parametrize(
    ("paths", "more"),
    [
        (OPENAI, '"temperature":NaN'),
        (OPENAI, '"temperature":1e400'),
        (OPENAI, '"top_p":-Infinity'),
        (OPENAI, '"presence_penalty":-2.1'),
        (OPENAI, '"max_tokens":0'),
        (OPENAI, '"max_tokens":9223372036854775808'),
        (OPENAI, '"n":9'),
        (OPENAI, '"seed":18446744073709551616'),
        (OPENAI, '"stop":""'),
        (OPENAI, f'"stop":"{"s" * 257}"'),
        (OPENAI, f'"stop":{json.dumps(["s"] * 10_000)}'),
        (OPENAI, '"logit_bias":{"-1":1}'),
        (OPENAI, '"logit_bias":{"999999999":1}'),
        (OPENAI, '"logit_bias":{"1":NaN}'),
        (OPENAI, f'"logit_bias":{json.dumps({str(token): -100 for token in range(10_000)})}'),
        (OPENAI, '"stream":{}'),
        ((COMPLETIONS,), '"logprobs":21'),
        ((COMPLETIONS,), '"prompt":[-1]'),
        ((COMPLETIONS,), '"prompt":[2147483647]'),
        ((COMPLETIONS,), '"prompt":[]'),
        ((CHAT,), '"top_logprobs":21,"logprobs":true'),
        ((RESPONSES,), '"max_output_tokens":-1'),
        (OLLAMA, '"options":{"temperature":NaN}'),
        (OLLAMA, '"options":{"num_ctx":1180591620717411303424}'),
        (OLLAMA, '"options":{"top_p":1e400}'),
        (OLLAMA, f'"options":{{"stop":{json.dumps(["s"] * 10_000)}}}'),
    ],
)
def test_absurd_values_are_refused(worker: WatchedWorker, paths: tuple[str, ...], more: str) -> None:
    for path in paths:
        status, answer = worker.call("POST", path, with_more(HONEST[path], more))
        assert (path, status) == (path, 400)
        assert answer["error"]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-40},
        {"temperature": 1e-38},
        {"temperature": 2, "top_p": 5e-324},
        {"temperature": 2, "top_k": 1},
        {"seed": 2**64 - 1, "top_k": 1, "n": 8, "logprobs": 20},
        {"seed": -(2**63), "top_k": 1},
        {"temperature": 0, "max_tokens": 2**31 - 1, "stop": "."},
        {"temperature": 0, "stop": ["s" * 256, "<|im_end|>"]},
    ],
)
def test_values_at_their_bounds_mean_what_they_say(worker: WatchedWorker, values: dict[str, Any]) -> None:
    answer = worker.post(COMPLETIONS, {**PARIS, "temperature": 1, **values})
    assert [choice["text"] for choice in answer["choices"]] == [" Paris"] * values.get("n", 1)


def test_stop_strings_may_be_a_blank(worker: WatchedWorker) -> None:
    (choice,) = worker.post(COMPLETIONS, {**PARIS, "max_tokens": 50, "stop": " "})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_a_bias_against_a_thousand_words_leaves_others(worker: WatchedWorker) -> None:
    banned = {str(token): -100 for token in range(1024)}
    (choice,) = worker.post(COMPLETIONS, {**PARIS, "max_tokens": 4, "logit_bias": banned})["choices"]
    assert choice["text"].startswith(" Paris")


@pytest.mark.parametrize(("tokens", "status"), [(CONTEXT - 1, 200), (CONTEXT, 400), (CONTEXT + 1, 400)])
def test_a_prompt_leaves_room_for_an_answer(worker: WatchedWorker, tokens: int, status: int) -> None:
    got, answer = worker.call("POST", COMPLETIONS, {"prompt": [28] * tokens, "max_tokens": 9, "ignore_eos": True})
    assert got == status
    if status == 200:
        assert answer["usage"]["completion_tokens"] == 1
        assert answer["choices"][0]["finish_reason"] == "length"
    else:
        assert answer["error"]["code"] == "context_length_exceeded"


def test_a_prompt_of_megabytes_is_refused_before_its_tokens_are_counted(worker: WatchedWorker) -> None:
    """To count them takes seconds of the only thread that answers anybody."""
    for path, field in ((COMPLETIONS, "prompt"), (RESPONSES, "input")):
        status, answer = worker.call("POST", path, {field: "ab " * 4_000_000})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "characters" in answer["error"]["message"]


@pytest.mark.parametrize("path", HONEST)
def test_http_that_nobody_sends_is_answered(worker: WatchedWorker, path: str) -> None:
    body = json.dumps(HONEST[path]).encode()
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "NONSENSE"):
        assert status_of(worker, f"{method} {path} HTTP/1.1\r\nhost: worker\r\n\r\n".encode()) in (400, 404, 405)
    assert status_of(worker, posted(path, body, "content-type: application/x-nonsense; charset=ebcdic")) == 200
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body)
    head = f"POST {path} HTTP/1.1\r\nhost: worker\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    assert status_of(worker, head + chunks + b"0\r\n\r\n") == 200
    assert status_of(worker, posted(path, b"[" * (16 * 1024 * 1024 + 1))) == 413
    assert status_of(worker, b"\x16\x03\x01" + os.urandom(200) + b"\r\n\r\n") == 400


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("x-garrison-timeout-ms: -1", 400),
        ("x-garrison-timeout-ms: \xb2", 400),
        ("x-garrison-timeout-ms: 9999999999999", 400),
        ("x-garrison-timeout-ms: 0", 504),
        ("x-garrison-timeout-ms: 999999999999", 200),
        ("x-garrison-app: " + "\xff" * 60_000, 200),
    ],
)
def test_the_agents_own_headers_are_bounded_too(worker: WatchedWorker, header: str, status: int) -> None:
    """A name that made a record's line longer than it may be would end the worker."""
    records = len(records_of(worker))
    assert status_of(worker, posted(COMPLETIONS, json.dumps(PARIS).encode(), header)) == status
    worker.expect(RequestDone, count=records + 1)


def records_of(worker: WatchedWorker) -> list[RequestDone]:
    return [event for event in worker.events if isinstance(event, RequestDone)]


def test_each_of_many_quick_requests_is_recorded(worker: WatchedWorker) -> None:
    before = len(records_of(worker))
    with ThreadPoolExecutor(16) as pool:
        statuses = set(pool.map(lambda _: worker.call("POST", CHAT, b"{}")[0], range(500)))
    assert statuses == {400}
    worker.expect(RequestDone, count=before + 500)


def test_a_reader_who_reads_nothing_holds_up_nobody(worker: WatchedWorker) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 250, "ignore_eos": True, "logprobs": 20}
    before = worker.worker.rss_mb() or 0.0
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(contextlib.closing(begun(worker, COMPLETIONS, {**body, "stream": True})))
        eventually(lambda: worker.health()["active"] == 2, "they are being answered")
        assert worker.post(COMPLETIONS, PARIS)["choices"][0]["text"] == " Paris"
        eventually(lambda: idle(worker), "what nobody reads is finished, and gives its sequence back")
        assert (worker.worker.rss_mb() or 0.0) < before + 24


def begun(worker: WatchedWorker, path: str, body: object, *, part: int | None = None) -> socket.socket:
    """Return a connection on which a request, or the first ``part`` bytes of its body, has been sent."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE_S)
    connection.connect(str(worker.spec.socket))
    data = json.dumps(body).encode()
    head = posted(path, b"").replace(b"content-length: 0", f"content-length: {len(data)}".encode())
    connection.sendall(head + data[:part])
    return connection


def test_clients_who_leave_at_any_moment_leave_nothing_behind(worker: WatchedWorker) -> None:
    dice = random.Random(20261124)
    schema = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(30)}}
    held = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    def leave(number: int) -> None:
        """Ask for something else each time, wait for an answer's first bytes or not, and go."""
        long = f"{number} " + "ships at night follow a red lamp " * 50
        asked: tuple[tuple[str, dict[str, Any], int | None], ...] = (
            (COMPLETIONS, {"prompt": long, "max_tokens": 4}, 20),
            (COMPLETIONS, {"prompt": long, "max_tokens": 4}, None),
            (COMPLETIONS, {"prompt": f"Once {number}", "max_tokens": 300, "stream": True}, None),
            (CHAT, {"messages": TURNS, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": True}, None),
            (CHAT, {"messages": TURNS, "response_format": held, "stream": True}, None),
            (RESPONSES, {"input": f"hi {number}", "stream": True}, None),
            (OLLAMA_CHAT, {"model": "m", "messages": TURNS}, None),
            (SCORE, {"prompt": long, "choices": ["a", "b"]}, None),
            (COUNT, {"messages": TURNS}, None),
        )
        path, body, part = asked[number % len(asked)]
        with contextlib.closing(begun(worker, path, body, part=part)) as connection:
            heard = b""
            while body.get("stream") and stays[number] and heard.count(b"data:") < 12:
                part_of_answer = connection.recv(2000)
                heard += part_of_answer or b"data:" * 12

    process = worker.worker.pid
    seen = []
    for _ in range(3):
        stays = [dice.random() < 0.5 for _ in range(54)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(leave, range(54)))
        eventually(lambda: idle(worker), "nobody is answered any more")
        assert worker.post(COMPLETIONS, PARIS)["choices"][0]["text"] == " Paris"
        seen.append((len(os.listdir(f"/proc/{process}/fd")), worker.worker.rss_mb() or 0.0))
    assert max(open_files for open_files, _ in seen) <= seen[0][0] + 2
    assert seen[-1][1] - seen[0][1] < 24, seen
