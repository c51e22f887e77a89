from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from garrison_agent.api.carrier import Carrier, parse_failure
from garrison_protocol.errors import GarrisonError, NotFoundError, UnavailableError

GONE = UnavailableError("agent.stopping", "stopping")


def test_a_piece_that_is_wanted_comes_from_whoever_reads() -> None:
    carrier, woken = Carrier(), threading.Event()
    carrier.listen(woken.set)
    with ThreadPoolExecutor(1) as jobs:
        read = jobs.submit(carrier.read_piece, "bundle.json", 5, 10)
        assert woken.wait(10)
        wanted = carrier.take()
        assert wanted is not None
        assert (wanted.path, wanted.offset, wanted.length) == ("bundle.json", 5, 10)
        assert carrier.take() is None
        carrier.answer(wanted.number, b"piece")
        carrier.answer(wanted.number, b"again")  # dropped
        assert read.result(10) == b"piece"


def test_what_was_wanted_before_anybody_listened_is_told_at_once() -> None:
    carrier, asked = Carrier(), threading.Event()
    with ThreadPoolExecutor(1) as jobs:
        read = jobs.submit(carrier.read_piece, "bundle.json", 0, 10)
        while (wanted := carrier.take()) is None:
            carrier.listen(asked.set)
            assert asked.wait(10)
        carrier.answer(wanted.number, NotFoundError("bundle.file_missing", "missing"))
        with pytest.raises(NotFoundError):
            read.result(10)


def test_a_reader_that_has_gone_holds_nobody_for_ever() -> None:
    carrier = Carrier(answer_s=0.01)
    with pytest.raises(UnavailableError) as gone:
        carrier.read_piece("bundle.json", 0, 10)
    assert gone.value.code == "bundle.reader_gone"


def test_more_than_was_asked_for_is_no_answer() -> None:
    carrier, woken = Carrier(), threading.Event()
    carrier.listen(woken.set)
    with ThreadPoolExecutor(1) as jobs:
        read = jobs.submit(carrier.read_piece, "bundle.json", 0, 2)
        assert woken.wait(10)
        wanted = carrier.take()
        assert wanted is not None
        carrier.answer(wanted.number, b"too much")
        with pytest.raises(UnavailableError):
            read.result(10)


def test_the_end_sends_everybody_away_and_the_first_word_counts() -> None:
    carrier, woken = Carrier(), threading.Event()
    carrier.listen(woken.set)
    with ThreadPoolExecutor(1) as jobs:
        read = jobs.submit(carrier.read_piece, "bundle.json", 0, 2)
        assert woken.wait(10)
        carrier.end(GONE)
        with pytest.raises(UnavailableError):
            read.result(10)
    carrier.end(UnavailableError("test.second", "second"))
    assert carrier.result is GONE
    with pytest.raises(UnavailableError):
        carrier.read_piece("bundle.json", 0, 2)


def test_an_import_is_idle_while_nobody_listens() -> None:
    now = 100.0
    carrier = Carrier(lambda: now)
    now += 7
    assert carrier.idle_s == 7
    carrier.listen(lambda: None)
    now += 7
    assert carrier.idle_s == 0
    carrier.listen(None)
    assert carrier.idle_s == 0


def test_only_a_missing_file_is_told_apart() -> None:
    def code(body: bytes) -> tuple[type[GarrisonError], str]:
        error = parse_failure(body)
        return type(error), error.code

    assert code(b'{"code": "bundle.file_missing", "message": "m"}') == (NotFoundError, "bundle.file_missing")
    assert code(b'{"code": "desired.conflict", "message": "m"}') == (UnavailableError, "bundle.unreadable")
    assert code(b"\xff") == (UnavailableError, "bundle.unreadable")
