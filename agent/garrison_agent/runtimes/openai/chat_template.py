"""A model's chat template: it comes with the model, so it is data, not our code, and may be hostile.

Jinja's sandbox keeps a template from Python's internals, but bounds neither its time nor its memory: nested loops, one
``'a'.center(10**9)``, or a sort of a long list run for as long as they like, within a single bytecode and with the
interpreter's lock held. No thread can be stopped there, and a list of forbidden operations would never be complete. So
templates run in a process of their own (``template_process``), which the kernel bounds in memory and processor time,
and which is killed here when an answer takes too long. It is started once, with the model, and serves one request at a
time; a rendering costs a fraction of a millisecond more than within this process, and never holds the event loop.
Jinja itself is loaded there only, which pays for most of that process's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

RENDER_TIMEOUT_S = 5.0
"""An honest template takes milliseconds, even on a slow board that is busy."""
_START_TIMEOUT_S = 60.0
"""To start Python and load Jinja, beside a model that is being loaded from a slow card."""
_LENGTH_BYTES = 4
_MAX_ANSWER_BYTES = 256 * 1024 * 1024
"""The longest prompt that the process may give, each character escaped."""


class _EndedError(Exception):
    """The process ended, or had to be ended, before it answered."""


@dataclass
class _Process:
    """A running template process."""

    popen: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, request: object, timeout_s: float) -> dict[str, Any]:
        """Return the answer to one request.

        Raises:
            _EndedError: There is none, or not in time.
        """
        data = json.dumps(request).encode()
        try:
            async with asyncio.timeout(timeout_s):
                self.writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
                await self.writer.drain()
                size = int.from_bytes(await self.reader.readexactly(_LENGTH_BYTES), "big")
                if size > _MAX_ANSWER_BYTES:
                    raise _EndedError
                answer = json.loads(await self.reader.readexactly(size))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise _EndedError from error
        if not isinstance(answer, dict):
            raise _EndedError
        return answer

    def kill(self) -> None:
        """End it at once."""
        self.writer.transport.abort()
        self.popen.kill()
        self.popen.wait()


async def _start() -> _Process:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # -P: nothing from the working directory is imported. Its errors could quote a prompt: they go nowhere.
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "garrison_agent.runtimes.openai.template_process"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
    except OSError:
        ours.close()
        raise
    return _Process(popen, reader, writer)


class ChatTemplate:
    """Turns messages into a prompt, the way the model was trained. Belongs to one event loop."""

    def __init__(self) -> None:
        self._order: dict[str, str] = {}
        self._process: _Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self.takes_tools = False
        """Whether the template writes a list of tools into the prompt by itself."""
        self.source = ""
        self._takes_developer = False

    async def start(self) -> None:
        """Start the process, so that it is there once the model is.

        Raises:
            UnavailableError: ``inference.template_failed``: no process can be started.
        """
        try:
            self._process = await _start()
        except OSError as error:
            raise UnavailableError(
                "inference.template_failed",
                f"the process for the chat template cannot be started: {error.strerror or error}",
                hint="free memory, or allow more processes",
                retryable=True,
            ) from error

    async def load(self, source: str, *, begin_text: str, end_text: str) -> None:
        """Compile ``source``; the two texts are what it knows as ``bos_token`` and ``eos_token``.

        Raises:
            InvalidError: ``model.load_failed``: the template is not valid Jinja, or too costly.
            UnavailableError: ``inference.template_failed``: no process can be started.
        """
        self.source = source
        self._order = {"source": source, "begin_text": begin_text, "end_text": end_text}
        async with self._one_at_a_time:
            try:
                await self._compiled()
            except _EndedError as error:
                raise InvalidError(
                    "model.load_failed", "the model's chat template takes too much time or memory to be read"
                ) from error

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt that asks for the assistant's next turn.

        Raises:
            InvalidError: ``inference.messages_refused``: the template does not take this conversation.
            GarrisonError: ``inference.template_failed``: the template ran over its limits.
            UnavailableError: The same code: no process can be started.
        """
        if not self._takes_developer:
            messages = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]
        request = {"messages": messages, "tools": list(tools) or None, "variables": dict(variables or {})}
        async with self._one_at_a_time:
            try:
                process = self._process or await self._compiled()
                answer = await self._ask(process, request, RENDER_TIMEOUT_S)
            except _EndedError as error:
                raise GarrisonError(
                    "inference.template_failed",
                    "the model's chat template took too much time or memory",
                    hint="the template is part of the model: tell its publisher",
                ) from error
        if "refused" in answer:
            raise InvalidError(
                "inference.messages_refused",
                f"the model's chat template refuses these messages: {answer['refused']}",
                hint="check the order of roles; many models want user and assistant in turns",
            )
        prompt = answer["prompt"]
        assert isinstance(prompt, str)
        return prompt

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    async def _compiled(self) -> _Process:
        """Return a process that holds the compiled template, started anew if the last one is gone."""
        if self._process is None:
            await self.start()
        assert self._process is not None
        answer = await self._ask(self._process, self._order, _START_TIMEOUT_S)
        if "refused" in answer:
            self.close()
            raise InvalidError("model.load_failed", f"the model's chat template is not valid: {answer['refused']}")
        self.takes_tools, self._takes_developer = answer["takes_tools"], answer["takes_developer"]
        return self._process

    async def _ask(self, process: _Process, request: object, timeout_s: float) -> dict[str, Any]:
        """Ask ``process``; whatever breaks the exchange, a cancelled caller too, ends it: it would answer another."""
        answered = False
        try:
            answer = await process.ask(request, timeout_s)
            answered = True
        finally:
            if not answered:
                with contextlib.suppress(ProcessLookupError):
                    self.close()
        return answer
