"""Lines from a person at a terminal: editing and history by readline, several lines between triple quotes."""

from __future__ import annotations

import contextlib
import os
import readline
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

from garrison_protocol.errors import InvalidError

HISTORY_VARIABLE = "GARRISON_HISTORY_FILE"
MAX_HISTORY = 1000
_QUOTES = '"""'


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen; it stands in the next line that is read."""
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class Lines:
    """Reads messages. What was typed is remembered in memory, and in a file only if the environment names one."""

    def __init__(self, commands: Sequence[str]) -> None:
        """``commands`` complete with the tabulator key.

        Raises:
            InvalidError: ``cli.file_unusable``; the file of the history.
        """
        self._commands = sorted(commands)
        path = os.environ.get(HISTORY_VARIABLE)
        self._history = Path(path).expanduser() if path else None
        readline.clear_history()
        readline.set_history_length(MAX_HISTORY)
        readline.set_completer_delims(" ")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        if self._history is not None:
            with self._usable(self._history), contextlib.suppress(FileNotFoundError):
                readline.read_history_file(self._history)

    def read(self) -> str | None:
        """Return the next message, or None at its end (Ctrl-D).

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        try:
            line = input(">>> ")
            if not line.lstrip().startswith(_QUOTES):
                return line
            parts = [line.lstrip().removeprefix(_QUOTES)]
            while not parts[-1].rstrip().endswith(_QUOTES):
                parts.append(input("... "))
        except EOFError:
            return None
        parts[-1] = parts[-1].rstrip().removesuffix(_QUOTES)
        return "\n".join(parts).strip("\n")

    def close(self) -> None:
        """Write the history down, if that was asked for.

        Raises:
            InvalidError: ``cli.file_unusable``.
        """
        if self._history is not None:
            with self._usable(self._history):
                # Made before it holds words, so that nobody else ever reads them.
                os.close(os.open(self._history, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
                readline.write_history_file(self._history)

    def _complete(self, text: str, state: int) -> str | None:
        found = [word for word in self._commands if text.startswith("/") and word.startswith(text)]
        return found[state] if state < len(found) else None

    @contextlib.contextmanager
    def _usable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InvalidError(
                "cli.file_unusable",
                f"{path} cannot keep the history: {error.strerror}",
                hint=f"set {HISTORY_VARIABLE} to another file, or unset it",
            ) from error
