"""``python -m bench.soak [--minutes 20]``: a board's local API under mixed use, cancellations, unloads, and kills.

Many clients ask at once for what has one right answer; others leave in the middle; an application with a key wants
long answers, more of them than there are places; somebody unloads models and kills workers. In the end every answer
was right or said that it failed, more were right than failed, of each kind some, no worker has work for a client that
has gone, and memory is where it was. Exit status 1 if not. No worker lives for long meanwhile, and a young one grows
until its caches are full; so the clients go on for some more minutes in which nobody disturbs the workers, and their
memory is that of these.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from os import kill
from pathlib import Path
from typing import Any

from bench.machine import this_machine
from bench.serving import FILES, TEXT, serving_board, worker_pids
from demo.fleet import Board
from demo.processes import StepError

SEED = 20261124
TEXT_CLIENTS = 5
FILE_CLIENTS = 2
LEAVERS = 2
TALKERS = 5
"""More than the model has places: without turns their answers would leave none to the other clients."""
TALK_TOKENS = 400
SAMPLE_S = 5.0
UNDISTURBED_MINUTES = 5.0
MIN_MINUTES = 2.0
"""Less gives too few samples of memory."""
MAX_GROWTH = 0.05
"""Of the median memory between the second and the last quarter of the time."""
_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
_KINDS = {
    "a city",
    "a sequence",
    "a schema",
    "two answers",
    "three colours",
    "a zip file",
    "a python file",
    "a long answer",
}
_WORKERS_REQUESTS = re.compile(r"^garrison_worker_requests\{.*\} (\d+)$", re.MULTILINE)


@dataclass
class Tally:
    """What came of all requests, and memory over time. Shared by the clients' threads."""

    right: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    """Failures that the server named, by code."""
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    """What clients who left and the saboteur did."""
    agent_mb: list[float] = field(default_factory=list)
    workers_mb: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_right(self, what: str) -> None:
        with self.lock:
            self.right[what] += 1

    def add_told(self, code: str) -> None:
        with self.lock:
            self.told[code] += 1

    def add_wrong(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)

    def add_done(self, what: str) -> None:
        with self.lock:
            self.done[what] += 1

    @property
    def lacking(self) -> set[str]:
        """What was never answered right."""
        return _KINDS - set(self.right)


class ToldError(Exception):
    """The server said that it cannot answer, and why."""


def ask(port: int, path: str, body: dict[str, Any], key: str = "") -> Any:
    """Return the JSON answer.

    Raises:
        ToldError: An error in the API's own form.
        OSError, HTTPException, ValueError: Anything else, which a client cannot make sense of.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request("POST", path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise ToldError(_code(answer))
    return answer


def stream(port: int, path: str, body: dict[str, Any]) -> str:
    """Return the text of a streamed answer that ended as it should; raises like ``ask``."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}).encode())
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ToldError(_code(json.loads(data)))
    text, ended = "", False
    for event in data.decode().split("\n\n"):
        if event == "data: [DONE]":
            ended = True
        elif event:
            found = json.loads(event.removeprefix("data: "))
            if "error" in found:
                raise ToldError(_code(found))
            for choice in found["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    if not ended:
        raise ValueError("the stream ended without [DONE] and without an error")
    return text


def _code(answer: Any) -> str:
    error = answer["error"]
    return str(error["code"]) if isinstance(error, dict) else str(error).split(":")[0]


def run(board: Board, minutes: float, tally: Tally) -> None:
    """Use and disturb ``board`` for ``minutes``, then use it for some more; everything found is in ``tally``."""
    over, calm = threading.Event(), threading.Event()
    work: list[Callable[[random.Random], None]] = []
    work += [lambda chance: _use_text(board.port, chance, tally)] * TEXT_CLIENTS
    work += [lambda chance: _use_files(board.port, chance, tally)] * FILE_CLIENTS
    work += [lambda chance: _leave(board.port, chance, tally)] * LEAVERS
    key = str(board.run("app", "add", "talker")["key"])
    work += [lambda chance: _talk(board.port, key, chance, tally)] * TALKERS

    def client(number: int) -> None:
        chance = random.Random(SEED + number)
        while not over.is_set():
            try:
                work[number](chance)
            except ToldError as error:
                tally.add_told(str(error))
                over.wait(chance.uniform(0.05, 0.5))
            except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                tally.add_wrong(f"client {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(work))]
    threads.append(threading.Thread(target=_sabotage, args=(board, calm, tally)))
    for thread in threads:
        thread.start()
    try:
        _watch(board, minutes, tally)
        calm.set()
        threads.pop().join()
        for model in (TEXT, FILES):  # whatever was done to it last
            board.run("model", "load", model)
        tally.workers_mb.clear()
        pids = set(worker_pids(board))
        _watch(board, UNDISTURBED_MINUTES, tally)
        if set(worker_pids(board)) != pids:
            tally.add_wrong("a worker ended although nobody disturbed it")
    finally:
        calm.set()
        over.set()
        for thread in threads:
            thread.join()


def _watch(board: Board, minutes: float, tally: Tally) -> None:
    end_s = time.monotonic() + minutes * 60
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(SAMPLE_S, left_s))
        tally.agent_mb.append(_rss_mb(board.agent.pid))
        with suppress(OSError, StopIteration):  # one ends in this moment
            tally.workers_mb.append(sum(_anonymous_mb(pid) for pid in worker_pids(board)))


def _use_text(port: int, chance: random.Random, tally: Tally) -> None:
    match chance.randrange(5):
        case 0:
            body = {"model": TEXT, "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
            _check("a city", stream(port, "/v1/completions", body).startswith(" Paris"), tally)
        case 1:
            words = "one two three four " * chance.randint(4, 16)
            body = {"model": TEXT, "prompt": words + "one", "max_tokens": 4, "temperature": 0}
            answer = ask(port, "/v1/completions", body)["choices"][0]["text"]
            # Of the words behind it this model is not sure enough: alone, too, it goes wrong at four of the lengths.
            _check("a sequence", answer.startswith(" two"), tally)
        case 2:
            turns = [{"role": "user", "content": "Name a colour and a count."}]
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}}
            body = {"model": TEXT, "messages": turns, "response_format": form, "max_tokens": 60, "temperature": 0.9}
            choice = ask(port, "/v1/chat/completions", body)["choices"][0]
            if choice["finish_reason"] == "length":
                tally.add_right("a schema, cut off")  # by max_tokens: nothing to check, and not counted as a schema
            else:
                _check("a schema", _fits(choice["message"]["content"]), tally)
        case 3:
            turns = [{"role": "user", "content": f"Tell me about the number {chance.randint(1, 9)}."}]
            body = {"model": TEXT, "messages": turns, "n": 2, "max_tokens": 12, "seed": chance.randint(1, 99)}
            answer = ask(port, "/v1/chat/completions", body)
            right = [choice["index"] for choice in answer["choices"]] == [0, 1]
            _check("two answers", right and answer["usage"]["completion_tokens"] >= 2, tally)
        case _:
            turns = [{"role": "user", "content": "Name three colors."}]
            # Without a limit it may repeat itself for minutes, until the context is full; four such hold all places.
            body = {"model": TEXT, "messages": turns, "max_tokens": 100, "temperature": 0}
            text = stream(port, "/v1/chat/completions", body)
            _check("three colours", bool(re.search("red|blue|green|yellow", text, re.IGNORECASE)), tally)


def _use_files(port: int, chance: random.Random, tally: Tally) -> None:
    """Zip archives and Python sources, told apart by their first bytes."""
    kind = chance.choice(("zip", "python"))
    if kind == "zip":
        begin = b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + chance.randbytes(1000)
    else:
        begin = b"from __future__ import annotations\nimport os\n\n\ndef main() -> None:\n    print(os)\n" * 12
    padded = [*begin[:1024], *[256] * (1024 - len(begin[:1024])), *begin[-1024:]]
    data = [*padded, *[256] * (2048 - len(padded))]
    tensor = {"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": data}
    first = ask(port, f"/v2/models/{FILES}/infer", {"inputs": [tensor]})["outputs"][0]["data"]
    again = ask(port, f"/v2/models/{FILES}/infer", {"inputs": [tensor]})["outputs"][0]["data"]
    same = max(abs(one - other) for one, other in zip(first, again, strict=True)) < 1e-4
    _check(f"a {kind} file", same and len(first) == 214 and abs(sum(first) - 1) < 1e-3, tally)


def _leave(port: int, chance: random.Random, tally: Tally) -> None:
    """Ask for a long answer and go: at once, within the prompt, or in the middle of the stream."""
    prompt = "Once upon a time. " * chance.choice((1, 20, 300))
    body = {"model": TEXT, "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        for _ in range(chance.choice((0, 0, 1, 5))):
            if not connection.recv(4096):
                break
        threading.Event().wait(chance.uniform(0, 0.3))
    tally.add_done("client left")


def _talk(port: int, key: str, chance: random.Random, tally: Tally) -> None:
    """Have a long text go on to its last token."""
    prompt = f"Once upon a time, {chance.randint(1, 99)} years ago"
    body = {"model": TEXT, "prompt": prompt, "max_tokens": TALK_TOKENS, "ignore_eos": True}
    answer = ask(port, "/v1/completions", body, key)
    whole = answer["usage"]["completion_tokens"] == TALK_TOKENS and len(answer["choices"][0]["text"]) > TALK_TOKENS
    _check("a long answer", whole and answer["choices"][0]["finish_reason"] == "length", tally)


def _sabotage(board: Board, over: threading.Event, tally: Tally) -> None:
    chance = random.Random(SEED)
    while not over.wait(chance.uniform(8, 25)):
        try:
            _disturb(board, chance, tally)
        except subprocess.TimeoutExpired as error:
            tally.add_wrong(f"saboteur: {error}")


def _disturb(board: Board, chance: random.Random, tally: Tally) -> None:
    match chance.randrange(3):
        case 0:
            what = chance.choice((TEXT, FILES))
            done = board.try_run("model", "unload", what)
            if done.returncode == 0:
                tally.add_done(f"{what} unloaded")
            else:
                tally.add_wrong(f"unload: {done.stderr.strip()[-200:]}")
        case 1:
            with suppress(OSError):  # one has ended meanwhile
                if pids := worker_pids(board):
                    kill(chance.choice(pids), signal.SIGKILL)
                    tally.add_done("worker killed")
        case _:
            if board.try_run("model", "load", chance.choice((TEXT, FILES))).returncode == 0:
                tally.add_done("model loaded")
            else:
                tally.add_told("model load")  # its worker may have been killed a moment ago


def _check(what: str, right: bool, tally: Tally) -> None:
    if right:
        tally.add_right(what)
    else:
        tally.add_wrong(f"a wrong answer: {what}")


def _fits(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"colour", "count"}
        and value["colour"] in ("red", "green", "blue")
        and type(value["count"]) is int
    )


def _rss_mb(pid: int) -> float:
    return _field_mb(pid, "Rss")


def _anonymous_mb(pid: int) -> float:
    return _field_mb(pid, "Anonymous")


def _field_mb(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def growth(samples: Sequence[float]) -> float:
    """Return by what share memory grew from the second quarter of the time to the last."""
    quarter = max(1, len(samples) // 4)
    return statistics.median(samples[-quarter:]) / statistics.median(samples[quarter : 2 * quarter]) - 1


def leaked(board: Board, timeout_s: float = 60) -> int:
    """Return how many sequences and waiting requests workers and agent still hold once every client has gone."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        busy = sum(int(one["active"]) for one in board.run("ps")["items"])  # as the agent counts them
        busy += _workers_requests(board.port)
        if not busy or time.monotonic() > deadline_s:
            return busy
        threading.Event().wait(0.2)


def _workers_requests(port: int) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        found = _WORKERS_REQUESTS.findall(connection.getresponse().read().decode())
    finally:
        connection.close()
    return sum(int(value) for value in found)


def main() -> int:
    """Run the soak and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    arguments = parser.parse_args()
    if arguments.minutes < MIN_MINUTES:
        parser.error(f"--minutes must be at least {MIN_MINUTES:g}")
    folder = Path(tempfile.mkdtemp(prefix="garrison-soak-", dir="/var/tmp"))
    tally = Tally()
    try:
        with serving_board(folder / "board", TEXT, FILES, threads=1, parallel=4) as board:
            run(board, arguments.minutes, tally)
            left = leaked(board)
    except StepError as error:
        print(f"soak: {error}; state and logs: {folder}", file=sys.stderr)
        return 1
    grown = {"agent": growth(tally.agent_mb), "workers": growth(tally.workers_mb)}
    print(f"{this_machine(folder)}; {arguments.minutes:g} minutes, then {UNDISTURBED_MINUTES:g} undisturbed")
    print(f"right answers: {dict(tally.right)}; never: {sorted(tally.lacking) or 'none'}")
    print(f"failures that were told: {dict(tally.told)}")
    print(f"done to it: {dict(tally.done)}")
    print(f"wrong answers: {len(tally.wrong)} {tally.wrong[:5]}")
    print(f"requests held after the last client left: {left}")
    print(f"workers, undisturbed, each half minute: {' '.join(f'{mb:.0f}' for mb in tally.workers_mb[::6])} MB")
    print(f"growth of memory: {', '.join(f'{name} {100 * share:+.1f} %' for name, share in grown.items())}")
    answered = not tally.lacking and tally.right.total() > tally.told.total() and bool(tally.done["worker killed"])
    good = answered and not tally.wrong and not left and max(grown.values()) <= MAX_GROWTH
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
