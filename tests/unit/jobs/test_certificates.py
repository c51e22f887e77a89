from __future__ import annotations

from datetime import UTC, datetime, timedelta

from garrison_controller.devices.tables import Device
from garrison_controller.jobs.certificates import board_notices

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
GRACE = timedelta(days=365)


def board(name: str, *, ends_in: int, seen: int | None) -> Device:
    """``ends_in`` and ``seen`` are days from now, and ago."""
    last = None if seen is None else NOW - timedelta(days=seen, hours=1)
    return Device(id=name, cert_not_after=NOW + timedelta(days=ends_in), last_seen_at=last)


def test_a_board_that_is_there_and_does_not_renew_is_named() -> None:
    (notice,) = board_notices([board("edge-1", ends_in=6, seen=0)], GRACE, NOW)
    assert notice.startswith("board edge-1 is there and has not renewed its certificate, which ends 2026-11-30")


def test_boards_that_are_away_are_counted_and_no_more() -> None:
    away = [board(f"edge-{n}", ends_in=-40, seen=60) for n in range(3)]
    soon = board("edge-9", ends_in=5, seen=10)
    assert board_notices([*away, soon], GRACE, NOW) == [
        "3 boards are away and their certificates have ended; they renew them when they come back"
    ]


def test_boards_near_and_past_the_end_of_grace_are_named() -> None:
    notices = board_notices(
        [board("edge-1", ends_in=-350, seen=400), board("edge-2", ends_in=-365, seen=None)], GRACE, NOW
    )
    assert notices[0] == "board edge-1 can renew its certificate until 2026-12-09; after that it must be replaced"
    assert "garrison device rotate edge-2" in notices[1]
