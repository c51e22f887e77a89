from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_controller.devices.sessions import NONCE_LIFETIME_S, SESSION_LIFETIME_S, Sessions
from garrison_protocol.errors import UnauthenticatedError

IDENTITY = "0123456789abcdef" * 2 + "fedcba9876543210" * 2


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(clock)


def test_a_nonce_can_be_spent_once(sessions: Sessions) -> None:
    nonce = sessions.nonce()
    assert nonce != sessions.nonce()
    sessions.spend_nonce(nonce)
    with pytest.raises(UnauthenticatedError, match=r"session\.nonce_invalid"):
        sessions.spend_nonce(nonce)


def test_a_nonce_ends_after_five_minutes(sessions: Sessions, clock: Clock) -> None:
    nonce = sessions.nonce()
    clock.now_s += NONCE_LIFETIME_S
    with pytest.raises(UnauthenticatedError, match=r"session\.nonce_invalid"):
        sessions.spend_nonce(nonce)


def test_spent_nonces_are_forgotten_only_when_they_have_ended(sessions: Sessions, clock: Clock) -> None:
    early = sessions.nonce()
    sessions.spend_nonce(early)
    clock.now_s += NONCE_LIFETIME_S - 1
    sessions.spend_nonce(sessions.nonce())
    with pytest.raises(UnauthenticatedError):
        sessions.spend_nonce(early)
    clock.now_s += 2
    sessions.spend_nonce(sessions.nonce())
    assert len(sessions._answered) == 2


def test_a_session_names_its_board_for_an_hour(sessions: Sessions, clock: Clock) -> None:
    bearer = sessions.open("edge-1", IDENTITY)
    assert sessions.holder(bearer) == ("edge-1", IDENTITY[:32])
    clock.now_s += SESSION_LIFETIME_S - 1
    assert sessions.holder(bearer) == ("edge-1", IDENTITY[:32])
    clock.now_s += 1
    with pytest.raises(UnauthenticatedError, match=r"session\.expired"):
        sessions.holder(bearer)


def test_bearers_cannot_be_made_or_changed(sessions: Sessions, clock: Clock) -> None:
    bearer = sessions.open("edge-1", IDENTITY)
    forged = [
        bearer.replace("edge-1", "edge-2", 1),
        bearer.replace(IDENTITY[:32], IDENTITY[32:], 1),
        bearer[:-1],
        Sessions(clock).open("edge-1", IDENTITY),
        sessions.nonce(),
        "",
        "....",
        "é" * 50,
    ]
    for text in forged:
        with pytest.raises(UnauthenticatedError):
            sessions.holder(text)
    with pytest.raises(UnauthenticatedError):
        sessions.spend_nonce(bearer)


@given(st.text(max_size=300))
def test_any_text_is_refused(text: str) -> None:
    sessions = Sessions(Clock())
    with pytest.raises(UnauthenticatedError):
        sessions.holder(text)
    with pytest.raises(UnauthenticatedError):
        sessions.spend_nonce(text)
