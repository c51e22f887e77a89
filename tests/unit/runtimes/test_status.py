from __future__ import annotations

import os
from pathlib import Path

import pytest

from garrison_agent.runtimes.spec import WorkerFile, WorkerSpec, decode_order, encode_order
from garrison_agent.runtimes.status import (
    MAX_MESSAGE,
    Failed,
    Ready,
    RequestDone,
    RequestRecord,
    StatusWriter,
    Verified,
    decode_event,
    encode_event,
)
from garrison_protocol.states import Engine

EVENTS = [
    Verified(12.5),
    Ready(100.0, 64.5, {"inputs": [{"name": "x"}]}),
    Failed("model.load_failed", "two\nlines"),
    RequestDone(RequestRecord("chat", ok=True, prompt_tokens=3, completion_tokens=4, ttft_ms=1.5, tokens_per_s=9.0)),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_the_pipe_as_one_line(event: Verified | Ready | Failed | RequestDone) -> None:
    reading, writing = os.pipe()
    StatusWriter(writing).send(event)
    os.close(writing)
    with open(reading, "rb") as lines:
        (line,) = lines.readlines()
    assert decode_event(line) == event


REQUEST = '{"event":"request","kind":"chat","ok":true,%s}'


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{",
        b'{"event":"surprise"}',
        b'{"event":[]}',
        b'{"event":"verified"}',
        b"\xff\n",
        b"[" * 100_000,
        b'{"event":"ready","load_ms":NaN,"rss_mb":1}',
        b'{"event":"ready","load_ms":1,"rss_mb":"much"}',
        b'{"event":"ready","load_ms":1,"rss_mb":1,"metadata":[]}',
        b'{"event":"failed","code":"x","message":null}',
        b'{"event":"failed","code":"x","message":"%s"}' % (b"x" * 4001),
        b'{"event":"request","kind":"surprise","ok":true}',
        *(
            (REQUEST % field).encode()
            for field in (
                '"prompt_tokens":"many"',
                '"prompt_tokens":-1',
                f'"completion_tokens":{10**400}',
                '"duration_ms":Infinity',
                '"ttft_ms":-1',
                '"tokens_per_s":0',
                '"status":0',
                '"app":["camera"]',
                f'"error_code":"{"x" * 101}"',
            )
        ),
    ],
)
def test_anything_else_on_the_pipe_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  its subclasses differ by what is wrong
        decode_event(line)


def test_a_long_explanation_is_cut_off() -> None:
    assert decode_event(encode_event(Failed("model.load_failed", "x" * 9000))) == Failed(
        "model.load_failed", "x" * MAX_MESSAGE
    )


def test_a_record_holds_no_text_of_the_request() -> None:
    line = encode_event(RequestDone(RequestRecord("chat", ok=True)))
    assert b'prompt"' not in line
    assert b"content" not in line


def test_an_order_reaches_the_worker_whole() -> None:
    file = WorkerFile("model.gguf", "ab" * 32, 7, Path("/data/blob"))
    spec = WorkerSpec(
        "tiny:1.0", Engine.LLAMA_CPP, (file,), Path("/run/w.sock"), 3, 2048, 4, {"a": 1, "b": True, "c": "x"}
    )
    order = decode_order(encode_order(spec, (9,), 11))
    assert (order.name, order.version, order.engine) == ("tiny", "1.0", Engine.LLAMA_CPP)
    assert (order.threads, order.context_length, order.parallel) == (3, 2048, 4)
    assert (order.files[0].path, order.files[0].descriptor, order.files[0].size) == ("model.gguf", 9, 7)
    assert order.files[0].native_path == "/proc/self/fd/9"
    assert order.settings == {"a": 1, "b": True, "c": "x"}
    assert (order.socket, order.status_descriptor) == ("/run/w.sock", 11)
