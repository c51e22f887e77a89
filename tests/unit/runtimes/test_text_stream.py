from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_agent.runtimes.llama.text_stream import TextStream


def test_half_a_character_is_held_back() -> None:
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.push("é".encode()[1:]) == "é"


def test_a_character_that_never_ends_becomes_a_replacement() -> None:
    stream = TextStream()
    assert stream.push(b"a\xc3") == "a"
    assert stream.finish() == "\ufffd"


def test_a_possible_stop_is_held_back_until_it_is_none() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"the E") == "the "
    assert stream.push(b"N") == ""
    assert stream.push(b"T") == "ENT"
    assert not stream.stopped


def test_what_was_held_back_comes_at_the_end() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"EN") == ""
    assert stream.finish() == "EN"


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"oneENDtwo") == "one"
    assert stream.stopped
    assert stream.finish() == ""


def test_the_stop_that_is_complete_first_counts() -> None:
    stream = TextStream(("three", "two"))
    assert stream.push(b"one two three") == "one "


@given(text=st.text("ab\u00e9", max_size=40), stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
@pytest.mark.parametrize("size", [1, 3])
def test_any_cut_into_pieces_gives_the_text_before_the_stop(text: str, stops: list[str], size: int) -> None:
    stream = TextStream(tuple(stops))
    data = text.encode()
    shown = ""
    for at in range(0, len(data), size):
        shown += stream.push(data[at : at + size])
        if stream.stopped:
            break
    shown += stream.finish()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(found)[1]] if found else text)
