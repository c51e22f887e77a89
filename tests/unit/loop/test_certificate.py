"""Renewal as the owner drives it, over a fake controller and a real store."""

from __future__ import annotations

import pytest

from garrison_agent.core.certificate import Validity
from garrison_agent.events import Tick
from garrison_protocol.errors import RefusedError, UnavailableError
from tests.unit.loop.rig import Rig

DAY = 86400.0
HOUR = 3600.0
AWAY = UnavailableError("controller.unreachable", "away", retryable=True)
OVER = RefusedError("renewal.grace_over", "too late", hint="garrison device rotate edge-1")


def entries(rig: Rig) -> list[str]:
    return [kind for kind in rig.audit() if kind.startswith("certificate.")]


def pass_time(rig: Rig, seconds: float, *, steps: int = 1) -> None:
    """Let time pass with a look at the certificate after each step, as the heartbeat makes it."""
    for _ in range(steps):
        rig.renew.now_s = rig.clock.wall_s + seconds / steps
        rig.forward(seconds / steps)
        rig.owner.handle(Tick.HEARTBEAT)
        rig.settle()


def test_it_is_renewed_at_two_thirds_recorded_and_used(rig: Rig) -> None:
    pass_time(rig, 20 * DAY - HOUR)
    assert (rig.renew.tries, entries(rig)) == (0, [])
    pass_time(rig, 3 * HOUR, steps=30)
    assert (rig.renew.tries, rig.link.reconnects) == (1, 1)
    (facts,) = rig.headers("certificate.renewed")
    assert facts["sha256"] == f"{2:064x}"
    pass_time(rig, 19 * DAY, steps=5)
    assert rig.renew.tries == 1
    pass_time(rig, 2 * DAY, steps=20)
    assert rig.renew.tries == 2


def test_a_controller_that_is_away_is_asked_less_and_less_and_its_return_is_noticed(rig: Rig) -> None:
    rig.renew.error = AWAY
    pass_time(rig, 20 * DAY)
    pass_time(rig, DAY, steps=200)
    assert 5 < rig.renew.tries < 20
    status = rig.parts.certificate.status()
    assert (status["error_code"], status["ended"]) == ("controller.unreachable", False)
    assert rig.parts.certificate.check()["outcome"] == "warn"
    assert entries(rig) == []  # being alone is no news
    rig.renew.error = None
    pass_time(rig, 6 * HOUR, steps=100)
    assert entries(rig) == ["certificate.renewed"]
    assert rig.parts.certificate.status()["error_code"] is None
    assert rig.parts.certificate.check()["outcome"] == "ok"


def test_months_after_its_end_it_is_renewed_within_a_minute_of_the_start(rig: Rig) -> None:
    rig.clock.forward(200 * DAY)
    rig.renew.now_s = rig.clock.wall_s
    rig.restart()
    assert rig.parts.certificate.status()["ended"]
    rig.forward(60)
    assert rig.renew.tries == 1
    assert not rig.parts.certificate.status()["ended"]


def test_a_clock_at_1970_neither_hastens_nor_hinders_it(rig: Rig) -> None:
    rig.clock.wall_s = 0.0
    rig.renew.validity = Validity(1_795_000_000.0, 1_795_000_000.0 + 30 * DAY)
    rig.restart()
    rig.forward(60)
    assert rig.renew.tries == 0
    rig.renew.validity = Validity(1_700_000_000.0, 1_700_000_000.0 + 30 * DAY)  # ended, by the floor alone
    rig.renew.error = AWAY
    rig.restart()
    rig.forward(60)
    assert rig.renew.tries >= 1


def test_a_pair_that_cannot_be_used_is_replaced(rig: Rig) -> None:
    rig.renew.validity = None
    rig.restart()
    assert rig.parts.certificate.status()["not_after"] is None
    rig.forward(60)
    assert rig.parts.certificate.status()["not_after"] is not None


def test_a_refusal_is_recorded_once_and_asked_about_again(rig: Rig) -> None:
    rig.renew.error = OVER
    pass_time(rig, 31 * DAY)
    pass_time(rig, DAY, steps=100)
    assert rig.renew.tries > 3
    assert entries(rig) == ["certificate.refused"]
    (facts,) = rig.headers("certificate.refused")
    assert (facts["code"], facts["detail"]) == ("renewal.grace_over", "too late")
    finding = rig.parts.certificate.check()
    assert (finding["outcome"], finding["fix"]) == ("fail", OVER.hint)


def test_an_end_between_the_file_and_the_record_loses_no_record(rig: Rig) -> None:
    rig.renew.renew()  # the job stored the new pair, and there the process ended
    rig.restart()
    assert entries(rig) == ["certificate.renewed"]
    rig.restart()
    assert len(entries(rig)) == 1


@pytest.mark.parametrize("connected", [True, False])
def test_nothing_that_waited_is_lost_by_the_change(rig: Rig, connected: bool) -> None:
    if connected:
        rig.connect()
    pending = rig.parts.journal.pending()["audit"]
    pass_time(rig, 20 * DAY)
    pass_time(rig, 2 * HOUR, steps=20)
    assert rig.link.reconnects == 1
    if connected:
        rig.disconnect()
    rig.link.sent.clear()
    rig.connect()
    assert rig.parts.journal.pending()["audit"] > pending  # no receipt came: every row is still there ...
    sent = {topic.rpartition("/")[2] for topic, _, _ in rig.link.sent}
    assert {"status", "audit"} <= sent  # ... and is sent again


@pytest.mark.parametrize("days", [25, 35])
def test_a_clock_ahead_of_the_controllers_does_not_renew_without_end(rig: Rig, days: int) -> None:
    rig.clock.wall_s += days * DAY
    for _ in range(24 * 60):
        rig.renew.now_s = rig.clock.wall_s - days * DAY
        rig.forward(60)
        rig.owner.handle(Tick.HEARTBEAT)
        rig.settle()
    assert 1 <= rig.renew.tries <= 10
    assert rig.link.reconnects == rig.renew.tries
    finding = rig.parts.certificate.check()
    assert (finding["outcome"], "ahead" in finding["detail"]) == ("warn", True)
    rig.clock.wall_s -= days * DAY
    rig.renew.now_s = rig.clock.wall_s
    pass_time(rig, DAY, steps=100)
    assert rig.parts.certificate.check()["outcome"] == "ok"
