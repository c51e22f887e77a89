"""``garrison-agent run NAME``: one answer for a program or a pipe, or a conversation on a terminal."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from garrison_agent.api.commands import ModelView
from garrison_agent.cli.client import AgentClient
from garrison_agent.cli.conversation import PARAMETERS, Answer, Conversation, ask, read_schema
from garrison_agent.cli.durations import parse_keep_alive
from garrison_agent.cli.lines import Lines, unechoed
from garrison_agent.cli.models import facts, load_and_wait
from garrison_agent.cli.output import dim, fold, pairs, print_error, print_json
from garrison_agent.cli.progress import Spinner
from garrison_agent.cli.typist import Typist
from garrison_agent.config import load_config
from garrison_protocol.errors import DeniedError, GarrisonError, InvalidError
from garrison_protocol.states import Engine

_CONTEXT_FULL = "inference.context_length_exceeded"
_HELP = """\
/clear            forget what was said
/system TEXT      tell the model what it is; alone: show it; /system - takes it back
/set NAME VALUE   temperature, top_p, seed, or max_tokens; alone: show them;
                  VALUE default leaves it to the model again
/show             what this model is
/save FILE        keep the conversation in a file
/load FILE        go on with a conversation that /save kept
/bye              leave (also Ctrl-D, or Ctrl-C twice)

\"""               begins a message of several lines, and ends it
Ctrl-C            stops an answer"""


def run_model(arguments: argparse.Namespace) -> int:
    """Talk to one model: once, if there is a prompt or a pipe; else until the person leaves."""
    conversation = Conversation(
        arguments.name,
        system=arguments.system or "",
        schema=read_schema(arguments.json_schema) if arguments.json_schema else None,
    )
    for name in PARAMETERS:
        if (text := getattr(arguments, name)) is not None:
            conversation.set(name, text)
    keep_alive_s = parse_keep_alive(arguments.keep_alive)
    prompt = _prompt(arguments)
    client = AgentClient(load_config(arguments.config).socket_path)
    view: ModelView = client.get("models", arguments.name)
    if view["engine"] == Engine.ONNXRUNTIME.value:
        raise InvalidError(
            "cli.not_text",
            f"{view['alias']} takes tensors, not words",
            hint=f"POST /v2/models/{view['alias']}/infer; to measure it: garrison-agent bench {view['alias']}",
        )
    _load(client, view, keep_alive_s)
    if prompt is not None:
        return _answer_once(client, conversation, prompt, arguments)
    return Chat(client, conversation, view, verbose=arguments.verbose).run()


def _prompt(arguments: argparse.Namespace) -> str | None:
    """Return the one prompt to answer, or None where a person at a terminal is to be asked."""
    words = " ".join(arguments.words)
    piped = "" if sys.stdin.isatty() or (words and not _is_fed()) else _read_stdin()
    prompt = "\n\n".join(part for part in (words, piped.strip("\n")) if part.strip())
    if prompt:
        return prompt
    if sys.stdin.isatty() and arguments.output != "json":
        return None
    raise InvalidError(
        "cli.prompt_missing",
        "there is nothing to answer: no prompt, and nothing was piped in",
        hint=f'garrison-agent run {arguments.name} "a question"; on a terminal, without -o json, it is a conversation',
    )


def _is_fed() -> bool:
    """Tell whether standard input is a pipe or a file, and not just whatever a service or a script left there."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidError("cli.input_malformed", "what was piped in is no UTF-8 text", hint="pipe text") from error


def _load(client: AgentClient, view: ModelView, keep_alive_s: float | None) -> None:
    """Have the model in memory before the first question, so that its speed is that of the model."""
    if view["loaded"] and keep_alive_s is None:
        return
    try:
        load_and_wait(client, view["alias"], keep_alive_s)
    except DeniedError:
        if keep_alive_s is not None:
            raise
        # Whoever may ask a model may have it loaded by asking.


def _answer_once(client: AgentClient, conversation: Conversation, prompt: str, arguments: argparse.Namespace) -> int:
    answer = Answer()
    quiet = arguments.output == "json"
    typist = Typist(sys.stdout)
    with Spinner("thinking") as spinner:
        shows: list[Callable[[str], object]] = [lambda _text: spinner.stop()]
        ask(client, conversation.request(prompt), answer, shows if quiet else [*shows, typist.write])
    if quiet:
        print_json(
            {"text": answer.text, "finish_reason": answer.finish, "usage": answer.usage, "timings": answer.timings}
        )
        return 0
    typist.end()
    _say_speed(answer, verbose=arguments.verbose)
    return 0


def _say_speed(answer: Answer, *, verbose: bool) -> None:
    if answer.speed and (verbose or (sys.stdout.isatty() and sys.stderr.isatty())):
        print(dim(fold(f"({answer.speed})", " ", sys.stderr)), file=sys.stderr)


class Chat:
    """A conversation on a terminal."""

    def __init__(self, client: AgentClient, conversation: Conversation, view: ModelView, *, verbose: bool) -> None:
        self._client = client
        self._conversation = conversation
        self._view = view
        self._verbose = verbose
        self._typist = Typist(sys.stdout)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(_HELP),
            "/?": lambda _: print(_HELP),
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/show": self._show,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> int:
        """Answer until the person leaves; return the exit status."""
        lines = Lines([*self._commands, "/bye"])
        print(dim(f"{self._view['display_name']} ({self._view['id']}). /help lists commands, /bye leaves."))
        interrupted = False
        try:
            while True:
                try:
                    message = lines.read()
                except KeyboardInterrupt:
                    print()
                    if interrupted:
                        break
                    interrupted = True
                    print("Ctrl-C again, Ctrl-D, or /bye leaves.")
                    continue
                interrupted = False
                if message is None:
                    print()
                    break
                if message.strip() == "/bye":
                    break
                self._take(message)
        finally:
            lines.close()
        return 0

    def _take(self, message: str) -> None:
        word, _, rest = message.strip().partition(" ")
        try:
            if not word:
                return
            if "\n" in message or not word.startswith("/"):
                self._answer(message)
            elif word in self._commands:
                self._commands[word](rest.strip())
            else:
                print(fold(f'unknown command {word}; /help lists them; """ begins a message that starts with /', "  "))
        except GarrisonError as error:
            print_error(error, "table")

    def _answer(self, prompt: str) -> None:
        answer = Answer()
        stopped = False
        try:
            with unechoed(), Spinner("thinking") as spinner:
                ask(
                    self._client,
                    self._conversation.request(prompt),
                    answer,
                    [lambda _text: spinner.stop(), self._typist.write],
                )
        except KeyboardInterrupt:
            stopped = True
        except GarrisonError as error:
            if answer.text:
                self._typist.end()
            raise self._explained(error) from error
        self._typist.end()
        if answer.text:
            self._conversation.heard(prompt, answer.text)
        if stopped:
            print(dim("(stopped)"), file=sys.stderr)
            return
        if answer.finish == "length" and "max_tokens" not in self._conversation.parameters:
            print(dim("(it ends here: the context is full; /clear begins anew)"), file=sys.stderr)
        _say_speed(answer, verbose=self._verbose)

    def _explained(self, error: GarrisonError) -> GarrisonError:
        """Say what helps where a conversation has grown too long."""
        if error.code != _CONTEXT_FULL:
            return error
        hint = "/clear begins anew (/save FILE keeps it first)" if self._conversation.messages else "send less text"
        return InvalidError(error.code, error.message, hint=hint)

    def _clear(self, _: str) -> None:
        self._conversation.messages.clear()
        print("what was said is forgotten; system text and parameters stay")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = "" if text == "-" else text
        print(self._conversation.system or "no system text")

    def _set(self, text: str) -> None:
        if text:
            name, _, value = text.partition(" ")
            self._conversation.set(name, value.strip())
        values = self._conversation.parameters
        print(pairs([(name, f"{values[name]:g}" if name in values else "default") for name in PARAMETERS]))

    def _show(self, _: str) -> None:
        print(pairs(facts(self._view)))

    def _save(self, text: str) -> None:
        path = _path(text, "/save")
        self._conversation.save(path)
        print(f"{len(self._conversation.messages)} messages are in {path}, readable for you alone")

    def _load(self, text: str) -> None:
        path = _path(text, "/load")
        self._conversation.load(path)
        print(f"{len(self._conversation.messages)} messages from {path}")


def _path(text: str, command: str) -> Path:
    if not text:
        raise InvalidError("cli.file_unusable", f"{command} needs a file name", hint=f"{command} talk.json")
    return Path(text).expanduser()
