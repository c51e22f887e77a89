"""``garrison-agent run NAME`` as people use it: a terminal, a real agent, a real model; and through pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agent_process import DEADLINE_S, AgentProcess

pytestmark = pytest.mark.integration
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A command on a pseudo-terminal, typed at and read from."""

    def __init__(self, words: list[str], **environment: str) -> None:
        self.shown = ""
        self._read = 0
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
            os.environ.update({"TERM": "dumb", "COLUMNS": "80", "LINES": "24", **environment})
            os.execv(sys.executable, [sys.executable, *words])

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C at the prompt until ``pattern`` is shown.

        A signal between a prompt and readline's wait for keys is seen with the next line only (CPython); a busy
        machine makes that likely, so an empty line follows.
        """
        self.type(CTRL_C)
        if not self._shows(pattern, 2.0):
            self.type("\r")
        self.until(pattern)

    def until(self, pattern: str) -> None:
        """Read until ``pattern`` is shown, from where the last look ended."""
        assert self._shows(pattern, DEADLINE_S), f"{pattern!r} was not shown: {self.shown!r}"
        found = re.search(pattern, self.shown[self._read :])
        assert found is not None
        self._read += found.end()

    def _shows(self, pattern: str, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while re.search(pattern, self.shown[self._read :]) is None:
            if not select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            try:
                self.shown += os.read(self._terminal, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended without {pattern!r}: {self.shown!r}") from None
        return True

    def interrupt_to_the_end(self) -> int:
        """Press Ctrl-C at the prompt, as ``interrupt``, and return the exit status."""
        self.type(CTRL_C)
        if not select.select([self._terminal], [], [], 2.0)[0]:
            self.type("\r")
        return self.end()

    def end(self) -> int:
        """Return the exit status once the command has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                self.shown += os.read(self._terminal, 4096).decode(errors="replace")
            except OSError:  # the other side of a pseudo-terminal that was closed
                break
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._terminal)


@pytest.fixture(scope="module")
def board() -> Iterator[AgentProcess]:
    """An agent that serves SmolLM2 and Magika."""
    with tempfile.TemporaryDirectory(prefix="garrison-") as folder:
        agent = AgentProcess(Path(folder))
        agent.enrol(Path(folder))
        agent.install()
        agent.install_text()
        agent.start()
        try:
            agent.wait_for(lambda: all(alias["loaded"] for alias in agent.status()["aliases"]))
            yield agent
        finally:
            agent.end(signal.SIGTERM)


@pytest.fixture
def talk(board: AgentProcess) -> Iterator[Terminal]:
    words = ["run", "smollm2", "--temperature", "0", "--seed", "1", "--system", "You are helpful."]
    terminal = Terminal(["-m", "garrison_agent", *words, "--config", str(board.config)])
    terminal.until("/bye leaves")
    terminal.until(">>> ")
    yield terminal
    terminal.close()


def call(board: AgentProcess, *words: str, piped: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "garrison_agent", *words, "--config", str(board.config)],
        input=piped,
        stdin=subprocess.DEVNULL if piped is None else None,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def active(board: AgentProcess) -> int:
    """Return how many requests the text model works on."""
    views: Any = board.ask("GET", "/garrison/v1/loaded")[1]
    return int(next(view["active"] for view in views if view["alias"] == "smollm2"))


def test_ctrl_c_stops_the_answer_and_the_model_but_not_the_program(board: AgentProcess, talk: Terminal) -> None:
    talk.type("Count from one to five hundred, in words.\r")
    talk.until(r"in words\.\r\n")
    talk.until(r"(?s)(\w+\W+){8}")
    talk.type(CTRL_C)
    talk.until(r"\(stopped\)")
    talk.until(">>> ")
    board.wait_for(lambda: active(board) == 0)
    talk.type("/set max_tokens 6\r")
    talk.until(r"max_tokens +6\r\n>>> ")
    talk.type("Hello\r")
    talk.until(r"6 tokens, [\d.]+ tok/s, first token after [\d.]+ s")
    talk.until(">>> ")
    talk.type("/bye\r")
    assert talk.end() == 0
    assert "Traceback" not in talk.shown


def test_twice_ctrl_c_or_ctrl_d_leaves(board: AgentProcess, talk: Terminal) -> None:
    talk.interrupt("Ctrl-C again, Ctrl-D, or /bye leaves")
    talk.until(">>> ")
    talk.type("/help\r")
    talk.until("/system TEXT")
    talk.until(">>> ")
    talk.interrupt("Ctrl-C again")  # a first one again: something was typed in between
    talk.until(">>> ")
    assert talk.interrupt_to_the_end() == 0
    assert talk.shown.count("Ctrl-C again") == 2
    other = Terminal(["-m", "garrison_agent", "run", "smollm2", "--config", str(board.config)])
    other.until(">>> ")
    other.type(CTRL_D)
    assert other.end() == 0
    other.close()


def test_several_lines_commands_and_a_file(talk: Terminal, tmp_path: Path) -> None:
    talk.type("/set max_tokens 4\r")
    talk.until(">>> ")
    talk.type('"""first line\r')
    talk.until(r"\.\.\. ")
    talk.type('second line"""\r')
    talk.until("4 tokens")
    talk.until(">>> ")
    kept = tmp_path / "talk.json"
    talk.type(f"/save {kept}\r")
    talk.until("2 messages")
    talk.until(">>> ")
    stored = json.loads(kept.read_text())
    assert stored["messages"][0]["content"] == "first line\nsecond line"
    assert stored["system"] == "You are helpful."
    for typed, shown in (
        ("/clear", "forgotten"),
        ("/load " + str(tmp_path / "none"), "cli.file_unusable"),
        (f"/load {kept}", "2 messages from"),
        ("/show", "llama.cpp on CPU"),
        ("/nope", "unknown command"),
        ("/system -", "no system text"),
        ("/set temperature 9", "from 0 to 2"),
    ):
        talk.type(typed + "\r")
        talk.until(re.escape(shown))
        talk.until(">>> ")
    talk.type("/bye\r")
    assert talk.end() == 0


def test_a_conversation_beyond_the_context_says_what_to_do(talk: Terminal, tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": "word " * 400}
        for role in ("user", "assistant", "user", "assistant", "user", "assistant")
    ]
    long = tmp_path / "long.json"
    long.write_text(json.dumps({"format": "garrison-conversation/1", "messages": turns}))
    talk.type(f"/load {long}\r")
    talk.until("6 messages from")
    talk.until(">>> ")
    talk.type("And?\r")
    talk.until("context_length_exceeded")
    talk.until("/clear begins anew")
    talk.until(">>> ")
    talk.type("/clear\r")
    talk.until(">>> ")
    talk.type("/set max_tokens 3\r")
    talk.until(">>> ")
    talk.type("And?\r")
    talk.until("3 tokens")


def test_what_was_typed_is_kept_only_where_that_was_asked_for(board: AgentProcess, tmp_path: Path) -> None:
    words = ["-m", "garrison_agent", "run", "smollm2", "--config", str(board.config)]
    history = tmp_path / "history"
    for environment in ({"HOME": str(tmp_path)}, {"HOME": str(tmp_path), "GARRISON_HISTORY_FILE": str(history)}):
        terminal = Terminal(words, **environment)
        terminal.until(">>> ")
        terminal.type("/system my secret\r")
        terminal.until("my secret\r\n>>> ")
        terminal.type("/bye\r")
        assert terminal.end() == 0
        terminal.close()
        found = [path.name for path in tmp_path.rglob("*") if b"my secret" in path.read_bytes()]
        assert found == (["history"] if "GARRISON_HISTORY_FILE" in environment else [])
    assert history.stat().st_mode & 0o777 == 0o600


def test_one_answer_for_a_program(board: AgentProcess) -> None:
    options = ("--temperature", "0", "--max-tokens", "5")
    done = call(board, "run", "smollm2", *options, "Say", "hello", "-o", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"]
    assert answer["usage"]["completion_tokens"] <= 5
    assert answer["timings"]["ttft_ms"] > 0
    plain = call(board, "run", "smollm2", *options, "Say", "hello")
    assert (plain.stdout, plain.stderr) == (answer["text"] + "\n", "")
    piped = call(board, "run", "smollm2", *options, piped="Say hello")
    assert piped.stdout == plain.stdout
    loud = call(board, "run", "smollm2", *options, "Say", "--verbose", piped="hello")
    assert "tok/s" in loud.stderr
    assert json.loads(call(board, "run", "smollm2", *options, "Say", "-o", "json", piped="hello\n").stdout)["text"]


def test_what_cannot_be_answered_is_one_line_with_what_to_do(board: AgentProcess) -> None:
    for words, status, says in (
        (("run", "nobody", "hi"), 4, "known here: "),
        (("run", "files", "hi"), 2, "garrison-agent bench files"),
        (("run", "smollm2"), 2, "nothing to answer"),
        (("run", "smollm2", "hi", "--max-tokens", "0"), 2, "max_tokens is a whole number"),
        (("run", "smollm2", "word " * 5000), 2, "context_length_exceeded"),
        (("run", "smollm2", "hi", "--json-schema", "/nonexistent"), 2, "cli.file_unusable"),
    ):
        done = call(board, *words)
        assert (done.returncode, done.stdout) == (status, ""), words
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_an_answer_bound_by_a_schema(board: AgentProcess, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "properties": {"town": {"enum": ["Ulm", "Bonn"]}}, "required": ["town"]})
    )
    done = call(board, "run", "smollm2", "A town?", "--json-schema", str(schema), "--max-tokens", "60")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["town"] in ("Ulm", "Bonn")


def test_bench_measures_text_and_tensors_and_remembers(
    board: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    quick = ("-p", "64", "-n", "16", "-r", "2", "--concurrent", "2", "-o", "json")
    done = call(board, "bench", "smollm2", *quick)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["test"] for row in rows] == ["pp64", "tg16", "tg16@2"]
    assert all(len(row["samples_ts"]) == 2 and row["avg_ts"] > 0 for row in rows)
    assert rows[0]["rss_bytes"] > 50 * 2**20
    done = call(board, "bench", "files", "-n", "10", "-r", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^infer +[\d.]+ ± [\d.]+ +req/s +[\d.]+ / [\d.]+", done.stdout, re.MULTILINE)
    assert "infer@8" in done.stdout
    history = call(board, "bench", "--history")
    assert history.stdout.count("smollm2") == 3
    assert history.stdout.count("magika") == 2
    again = call(board, "bench", "smollm2", "-p", "64", "-n", "16", "-r", "1")
    assert re.search(r"pp64 .*[+-][\d.]+ %", again.stdout)


def test_models_come_and_go_by_hand(board: AgentProcess) -> None:
    assert call(board, "unload", "files").stdout == "files (magika:1.0.0): unloaded\n"
    assert [view["alias"] for view in json.loads(call(board, "ps", "-o", "json").stdout)] == ["smollm2"]
    assert call(board, "load", "files", "--keep-alive", "10m").stdout == "files (magika:1.0.0): loaded\n"
    loaded = {view["alias"]: view for view in json.loads(call(board, "ps", "-o", "json").stdout)}
    assert 0 < loaded["files"]["expires_at"] - time.time() <= 600
    assert "files" in call(board, "ps").stdout
    variants = json.loads(call(board, "model", "info", "smollm2", "--variants", "-o", "json").stdout)
    assert [(one["fits"], one["chosen"], one["missing_bytes"]) for one in variants["variants"]] == [(True, True, 0)]


def test_a_damaged_file_is_found_and_named(board: AgentProcess) -> None:
    assert call(board, "cache", "verify").returncode == 0
    (model,) = [path for path in board.state.glob("blobs/sha256/??/*") if 2**20 < path.stat().st_size < 4 * 2**20]
    with model.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    try:
        done = call(board, "cache", "verify", "files", "--repair", "-o", "json")
        assert done.returncode == 1
        outcomes = {file["path"]: file for file in json.loads(done.stdout)["files"]}
        assert outcomes["manifest.json"]["outcome"] == "ok"
        assert outcomes["model.onnx"]["outcome"] == "damaged"
        assert "not repaired" in outcomes["model.onnx"]["detail"]  # its controller cannot be reached
    finally:
        with model.open("r+b") as file:
            file.seek(1000)
            file.write(bytes([byte]))
    assert call(board, "cache", "verify", "files").returncode == 0
