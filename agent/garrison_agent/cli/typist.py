"""An answer as it comes, on a terminal: words are not broken at its edge, and nothing in them steers it."""

from __future__ import annotations

import shutil
import unicodedata
from typing import TextIO

from garrison_agent.cli.output import printable


class Typist:
    """Writes pieces of text to ``out``. On a terminal a word that reaches the edge moves to the next line whole."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._column = 0
        self._word = ""
        """What was written since the last place where a line may end."""
        self._word_width = 0

    def write(self, text: str) -> None:
        """Show the next piece."""
        if not self._terminal:
            self._out.write(text)
        else:
            width = shutil.get_terminal_size().columns
            self._out.write("".join(self._place(one, width) for one in printable(text.replace("\r", ""))))
        self._out.flush()

    def end(self) -> None:
        """Finish the line."""
        self._out.write("\n")
        self._out.flush()
        self._column, self._word, self._word_width = 0, "", 0

    def _place(self, letter: str, width: int) -> str:
        if letter == "\n":
            self._column, self._word, self._word_width = 0, "", 0
            return letter
        if letter == "\t":
            letter, taken = "    ", 4
        else:
            taken = _width(letter)
        if self._column + taken <= width:
            self._column += taken
            self._keep(letter, taken)
            return letter
        if letter.isspace():  # the edge stands in its place
            self._column, self._word, self._word_width = 0, "", 0
            return "\n"
        if 0 < self._word_width < width // 2:
            word, start = self._word, self._column - self._word_width + 1
            self._column = self._word_width + taken
            self._keep(letter, taken)
            # By column number: behind the last column a cursor waits on it, so steps back would be one short.
            return f"\x1b[{start}G\x1b[K\n{word}{letter}"
        self._column = taken
        self._keep(letter, taken)
        return f"\n{letter}"

    def _keep(self, letter: str, taken: int) -> None:
        if letter.isspace() or taken == 2:  # scripts of wide letters break anywhere
            self._word, self._word_width = "", 0
        else:
            self._word += letter
            self._word_width += taken


def _width(letter: str) -> int:
    """Return how many columns a letter takes."""
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1
