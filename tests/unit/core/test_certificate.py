from __future__ import annotations

import pytest

from garrison_agent.core.certificate import Tries, Validity, is_due, wait_s

DAY = 86400.0
LIFE = Validity(0, 30 * DAY)


@pytest.mark.parametrize(
    ("at_s", "due"), [(0, False), (20 * DAY - 1, False), (20 * DAY, True), (30 * DAY, True), (300 * DAY, True)]
)
def test_it_is_due_at_two_thirds_and_for_ever_after(at_s: float, due: bool) -> None:
    assert is_due(LIFE, at_s) is due


def test_a_certificate_that_cannot_be_used_is_due_at_once() -> None:
    assert is_due(None, 0)
    assert wait_s(None, Tries(), 0, 0.5) == 5


def test_it_has_ended_after_its_last_second() -> None:
    assert not LIFE.ended(30 * DAY)
    assert LIFE.ended(30 * DAY + 1)


def test_boards_of_one_minute_do_not_renew_in_one_minute() -> None:
    waits = {wait_s(LIFE, Tries(), 20 * DAY, chance / 10) for chance in range(10)}
    assert len(waits) == 10
    assert 0 <= min(waits) < max(waits) < 3600
    short = Validity(0, 600)
    assert wait_s(short, Tries(), 400, 0.999) < 10


def test_a_board_that_is_cut_off_is_in_a_hurry() -> None:
    assert wait_s(LIFE, Tries(), 31 * DAY, 0.999) < 10
    early = [wait_s(LIFE, Tries(failed), 21 * DAY, 0) for failed in range(1, 20)]
    late = [wait_s(LIFE, Tries(failed), 31 * DAY, 0) for failed in range(1, 20)]
    assert all(soon < later for soon, later in zip(late, early, strict=True))
    assert early == sorted(early)
    assert max(early) == 3 * 3600  # half of six hours: the lower end of the jitter
    assert max(late) == 300


def test_a_refusal_waits_for_somebody_to_do_something() -> None:
    assert wait_s(LIFE, Tries(1, refused=True), 31 * DAY, 0) == 900
    assert wait_s(LIFE, Tries(99, refused=True), 31 * DAY, 0.999) < 6 * 3600
