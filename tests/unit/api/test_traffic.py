from __future__ import annotations

from pathlib import Path

from garrison_agent.api.traffic import Traffic

ONE, TWO = Path("/run/1.sock"), Path("/run/2.sock")


class Clock:
    now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_in_flight_keep_a_worker_and_the_last_one_frees_it() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    assert traffic.enter(ONE)
    assert traffic.enter(ONE)
    clock.now_s = 20.0
    traffic.leave(ONE)
    assert traffic.look(ONE).active == 1
    assert not traffic.retire(ONE)
    clock.now_s = 30.0
    traffic.leave(ONE)
    assert (traffic.look(ONE).active, traffic.look(ONE).changed_at_s) == (0, 30.0)
    assert traffic.retire(ONE)
    assert not traffic.enter(ONE)
    assert traffic.look(ONE).active == 0
    assert traffic.enter(TWO)


def test_who_waits_for_idleness_hears_of_it_once() -> None:
    heard: list[str] = []
    traffic = Traffic(Clock(), on_idle=lambda: heard.append("idle"))
    traffic.enter(ONE)
    traffic.await_idle(ONE)
    traffic.enter(ONE)
    traffic.leave(ONE)
    assert heard == []
    traffic.leave(ONE)
    assert heard == ["idle"]
    traffic.enter(ONE)
    traffic.leave(ONE)
    assert heard == ["idle"]
    traffic.await_idle(ONE)
    assert heard == ["idle", "idle"]


def test_only_the_first_request_after_a_rest_wakes_anybody() -> None:
    heard: list[str] = []
    traffic = Traffic(Clock(), on_busy=lambda: heard.append("busy"))
    traffic.enter(ONE)
    traffic.enter(TWO)
    assert not traffic.rest()
    traffic.leave(ONE)
    traffic.leave(TWO)
    traffic.enter(ONE)
    traffic.leave(ONE)
    assert heard == ["busy"]
    assert traffic.rest()
    traffic.enter(TWO)
    assert heard == ["busy", "busy"]


def test_a_hold_ends_by_itself_and_with_the_worker() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    assert traffic.held_s(ONE) == 0
    traffic.hold(ONE, 3)
    clock.now_s += 2
    assert (traffic.held_s(ONE), traffic.held_s(TWO)) == (1, 0)
    clock.now_s += 1
    assert traffic.held_s(ONE) == 0
    traffic.hold(ONE, 3)
    assert traffic.retire(ONE)
    assert traffic.held_s(ONE) == 0  # whoever waited looks for its successor now
    traffic.readmit(ONE)
    assert traffic.held_s(ONE) == 3
    traffic.forget(ONE)
    assert traffic.held_s(ONE) == 0


def test_a_late_end_of_a_request_of_a_worker_that_is_gone_counts_nowhere() -> None:
    traffic = Traffic(Clock())
    traffic.enter(ONE)
    traffic.forget(ONE)
    traffic.leave(ONE)
    assert traffic.look(ONE).active == 0
    assert traffic.rest()
