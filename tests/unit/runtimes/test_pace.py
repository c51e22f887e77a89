from __future__ import annotations

import pytest

from garrison_agent.runtimes.llama.pace import ALONE_ROWS, ALONE_S, ENOUGH_ROWS, MAX_S, SHARED_ROWS, SHARED_S, Pace


@pytest.mark.parametrize("row_s", [0.001, 0.003, 0.005])
def test_a_part_takes_as_long_as_answers_may_be_held_up(row_s: float) -> None:
    pace = Pace()
    pace.learn(100, 100 * row_s)
    assert pace.rows(1) * row_s == pytest.approx(SHARED_S, abs=row_s)
    assert pace.rows(0) * row_s == pytest.approx(ALONE_S, abs=row_s)


@pytest.mark.parametrize(("row_s", "shared", "alone"), [(0.03, SHARED_ROWS[0], ALONE_ROWS[0]), (1e-5, 128, 100_000)])
def test_parts_stay_within_bounds(row_s: float, shared: int, alone: int) -> None:
    pace = Pace()
    pace.learn(100, 100 * row_s)
    assert pace.rows(1) == shared
    assert pace.rows(0) == pytest.approx(alone, abs=1)


@pytest.mark.parametrize("row_s", [0.1, 0.4, 2.5, 14.0])
@pytest.mark.parametrize("beside", [0, 3, 40])
def test_no_part_looks_like_a_stall_however_slow_the_board(row_s: float, beside: int) -> None:
    pace = Pace()
    assert pace.rows(0) == ENOUGH_ROWS
    pace.learn(ENOUGH_ROWS, ENOUGH_ROWS * row_s)
    rows = pace.rows(beside) + beside
    assert rows <= max(MAX_S / row_s, ENOUGH_ROWS, beside + 1)
    assert rows >= ENOUGH_ROWS  # else it would never learn that the board has become faster


def test_a_first_part_that_waited_for_the_disk_is_forgotten_in_time() -> None:
    pace = Pace()
    pace.learn(ENOUGH_ROWS, 300.0)
    for _ in range(40):
        rows = pace.rows(0)
        pace.learn(rows, rows * 0.002)
    assert pace.rows(0) == pytest.approx(ALONE_S / 0.002, rel=0.05)


def test_it_follows_what_it_sees_but_not_every_outlier() -> None:
    pace = Pace()
    pace.learn(100, 0.2)
    pace.learn(100, 0.4)
    once = pace.rows(1)
    for _ in range(30):
        pace.learn(100, 0.4)
    assert SHARED_S / 0.004 < once < SHARED_S / 0.002
    assert pace.rows(1) == pytest.approx(SHARED_S / 0.004, abs=1)


def test_a_few_rows_tell_nothing() -> None:
    pace = Pace()
    before = pace.rows(1)
    pace.learn(2, 5.0)
    assert pace.rows(1) == before
