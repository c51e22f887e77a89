from __future__ import annotations

import io
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_agent.cli.typist import Typist

WIDTH = 20
MOVE = re.compile(r"\x1b\[(\d+)G\x1b\[K|(.|\n)", re.DOTALL)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines as somebody would see them on a terminal that obeys what was written."""
        lines, column = [""], 0
        for to, letter in MOVE.findall(self.getvalue()):
            if to:
                column = int(to) - 1
                lines[-1] = lines[-1][:column]
            elif letter == "\n":
                lines.append("")
                column = 0
            else:
                assert column < WIDTH, "the terminal itself would have broken the line"
                lines[-1] = lines[-1][:column].ljust(column) + letter
                column += 1
        return lines


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((WIDTH, 24)))


def show(*pieces: str) -> list[str]:
    terminal = Terminal()
    typist = Typist(terminal)
    for piece in pieces:
        typist.write(piece)
    return terminal.screen()


def test_a_word_at_the_edge_moves_whole_even_if_half_of_it_was_there() -> None:
    assert show("The oceans are vas", "t and deep") == ["The oceans are vast ", "and deep"]
    assert show("The oceans are deep", "er than we think") == ["The oceans are ", "deeper than we think"]


def test_a_word_wider_than_half_the_line_is_broken_where_the_line_ends() -> None:
    assert show("see " + "x" * 30) == ["see " + "x" * 16, "x" * 14]


def test_wide_letters_break_anywhere() -> None:
    assert len(show("\u6f22" * 15)[0]) == 10


@given(st.lists(st.text(alphabet="ab \n", max_size=12), max_size=20))
def test_no_letter_is_lost_and_no_line_too_long(pieces: list[str]) -> None:
    lines = show(*pieces)
    assert max(len(line) for line in lines) <= WIDTH
    assert "".join("".join(lines).split()) == "".join("".join(pieces).split())


def test_nothing_in_an_answer_steers_the_terminal() -> None:
    for text in ("\x1b]0;evil\x07", "\x9b2J ok", "a\x08b", "\u202eabc"):
        lines = show(text)
        assert all(line.isprintable() for line in lines)
    assert show("one\r\ntwo") == ["one", "two"]


def test_where_nobody_looks_the_text_is_the_very_text() -> None:
    out = io.StringIO()
    Typist(out).write("a\tb \x1b[0m" + "x" * 50)
    assert out.getvalue() == "a\tb \x1b[0m" + "x" * 50
