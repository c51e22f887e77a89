from __future__ import annotations

import pytest

from garrison_agent.runtimes.llama.generation import TokenLogprob
from garrison_agent.runtimes.llama.logprob_stream import LogprobStream
from garrison_agent.runtimes.llama.text_stream import TextStream


def told(pieces: list[bytes], *stop: str) -> tuple[str, list[list[bytes]]]:
    """Return the text, and the tokens that came with each piece of it."""
    text, stream, logprobs = "", TextStream(stop), LogprobStream()
    parts = []
    for piece in pieces:
        more = stream.push(piece)
        text += more
        new = logprobs.push(TokenLogprob(piece, -1.0, ()), more, stream.held_characters, stopped=stream.stopped)
        parts.append([one.piece for one in new])
        if stream.stopped:
            return text, parts
    rest = stream.finish()
    parts.append([one.piece for one in logprobs.finish(rest, stopped=stream.stopped)])
    return text + rest, parts


def test_tokens_come_at_once_where_nothing_is_held_back() -> None:
    assert told([b"a", b"bc"]) == ("abc", [[b"a"], [b"bc"], []])


def test_tokens_come_with_their_text() -> None:
    assert told([b"a", b"E", b"N", b"x"], "END") == ("aENx", [[b"a"], [], [], [b"E", b"N", b"x"], []])
    assert told([b"a", b"E"], "END") == ("aE", [[b"a"], [], [b"E"]])


def test_those_of_a_stop_string_never_come() -> None:
    assert told([b"a", b"E", b"N", b"D"], "END") == ("a", [[b"a"], [], [], []])


def test_a_token_that_is_text_and_stop_comes() -> None:
    assert told([b"a", b"bEN", b"D"], "END") == ("ab", [[b"a"], [], [b"bEN"]])


@pytest.mark.parametrize("stop", [(), ("END",)])
def test_halves_of_a_character_all_come(stop: tuple[str, ...]) -> None:
    text, parts = told([b"\xc3", b"\xa9", b"b"], *stop)
    assert text == "éb"
    assert [piece for part in parts for piece in part] == [b"\xc3", b"\xa9", b"b"]
