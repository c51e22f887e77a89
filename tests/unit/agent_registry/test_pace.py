from __future__ import annotations

from garrison_agent.pace import MIN_BYTES_PER_S, PATIENCE_S, Pace


def test_a_slow_link_keeps_the_pace_for_hours() -> None:
    pace = Pace()
    assert all(pace.add(0.2, 1000) for _ in range(100_000))


def test_one_byte_before_each_time_out_does_not() -> None:
    pace = Pace()
    assert [pace.add(29, 1) for _ in range(3)] == [True, True, False]


def test_nothing_at_all_is_given_up_in_time() -> None:
    pace = Pace(120)
    assert [pace.add(30, 0) for _ in range(4)] == [True, True, True, False]
    assert pace.complaint == "fewer than 30720 bytes came in 120 s"


def test_a_pause_is_made_up_for_only_by_what_comes_in_time() -> None:
    pace = Pace()
    assert pace.add(PATIENCE_S - 1, 0)
    assert pace.add(1, pace.min_bytes)
    assert pace.add(PATIENCE_S - 1, 0)
    assert not pace.add(2, pace.min_bytes)


def test_what_came_fast_gives_no_credit() -> None:
    pace = Pace()
    assert pace.add(1, 1000 * round(MIN_BYTES_PER_S * PATIENCE_S))
    assert not pace.add(PATIENCE_S, 1)
