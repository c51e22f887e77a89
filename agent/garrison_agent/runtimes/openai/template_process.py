"""The process that compiles and renders a model's chat template; started by ``chat_template`` only.

On standard input and output: frames of a length (4 bytes, big-endian) and that much JSON. The first asks to compile,
each further one to render; each gets one answer. The end of the input ends the process. So does running over a limit,
in the middle of whatever the template does: a process is what the kernel can bound.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 384 * 1024 * 1024
"""Of address space, the interpreter's own included. The longest request (16 MiB) fits several times."""
MAX_CPU_S = 10
"""For one frame: what ends a process whose parent is no longer there to do it."""
MAX_PROMPT_BYTES = 32 * 1024 * 1024
LENGTH = struct.Struct(">I")

_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template may end with, by mistake or on purpose: it is the model's, and may refuse whatever it likes."""
_MAX_MESSAGE_CHARS = 500


class Renderer:
    """A compiled template."""

    def __init__(self, source: str, *, begin_text: str, end_text: str) -> None:
        """Compile ``source``.

        Raises:
            jinja2.TemplateError and others in ``_REFUSALS``: It is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(source)
        self._texts = {"bos_token": begin_text, "eos_token": end_text}
        self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self.takes_developer = "developer" in source

    def render(self, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any]) -> str:
        """Return the prompt that asks for the assistant's next turn.

        Raises:
            jinja2.TemplateError and others in ``_REFUSALS``: The template does not take this conversation.
        """
        values = {**variables, "messages": messages, "tools": tools, "add_generation_prompt": True, **self._texts}
        parts: list[str] = []
        size = 0
        for part in self._template.generate(values):
            size += len(part.encode())  # lone surrogates are refused here: no tokenizer takes them
            if size > MAX_PROMPT_BYTES:
                raise MemoryError
            parts.append(part)
        return "".join(parts)


def main() -> None:
    """Serve until the end of the input."""
    time.localtime()  # reads the zone's file, which strftime_now needs
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    _lower(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    with open(0, "rb") as requests, open(1, "wb") as answers:
        renderer: Renderer | None = None
        while (request := _read(requests)) is not None:
            _allow_cpu_time()
            if renderer is None:
                made = _attempt(lambda request=request: Renderer(**request))  # type: ignore[misc]
                if isinstance(made, Renderer):
                    renderer = made
                    made = {"takes_tools": made.takes_tools, "takes_developer": made.takes_developer}
            else:
                made = _attempt(lambda request=request, renderer=renderer: renderer.render(**request))  # type: ignore[misc]
            answer = made if isinstance(made, dict) else {"prompt": made}
            data = json.dumps(answer).encode()
            answers.write(LENGTH.pack(len(data)) + data)
            answers.flush()


def _attempt(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns, or an object that says why it refused."""
    try:
        return work()
    except _REFUSALS as error:
        return {"refused": str(error).encode("utf-8", "replace").decode()[:_MAX_MESSAGE_CHARS]}


def _read(requests: BinaryIO) -> dict[str, Any] | None:
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    data = requests.read(LENGTH.unpack(head)[0])
    value = json.loads(data)
    assert isinstance(value, dict)
    return value


def _allow_cpu_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + MAX_CPU_S
    _lower(resource.RLIMIT_CPU, until)


def _lower(limit: int, value: int) -> None:
    """Set the soft limit, which may not exceed a hard one that the worker itself lives under."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as chat templates expect it: as it is, not escaped for HTML. Source: transformers, chat templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    try:
        main()
    finally:
        # At once, also when memory ran out. Nothing is printed: a traceback's message may hold what somebody asked.
        os._exit(0)
