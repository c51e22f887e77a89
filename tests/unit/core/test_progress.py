from __future__ import annotations

import pytest

from garrison_agent.core.progress import Watch, stalled, watch

BUSY = {"active": 2, "queued": 1, "steps": 10}


def test_any_change_is_progress_and_so_is_having_nothing_to_do() -> None:
    one = watch(Watch(0.0), BUSY, 30.0)
    assert one.progress_at_s == 30.0
    assert watch(one, BUSY, 60.0).progress_at_s == 30.0
    assert watch(one, {**BUSY, "steps": 11}, 60.0).progress_at_s == 60.0
    idle = {"active": 0, "queued": 0, "steps": 10}
    assert watch(watch(one, idle, 60.0), idle, 90.0).progress_at_s == 90.0


@pytest.mark.parametrize("health", [None, BUSY, {}])
def test_no_answer_or_always_the_same_is_none(health: dict[str, object] | None) -> None:
    one = watch(Watch(0.0), BUSY, 10.0)
    for at in (40.0, 70.0, 100.0):
        one = watch(one, BUSY if health == {} else health, at)
    assert one.progress_at_s == 10.0
    assert not stalled(one, 120.0, 129.0)
    assert stalled(one, 120.0, 130.0)


NOT_BELIEVED = ("x", None, -1, 10**400, float("nan"), float("inf"))


@pytest.mark.parametrize(
    ("stated", "limit_s"), [(600, 600.0), (60.0, 120.0), *((stated, 120.0) for stated in NOT_BELIEVED)]
)
def test_a_step_may_take_as_long_as_its_worker_allows_it(stated: object, limit_s: float) -> None:
    one = watch(Watch(0.0), {**BUSY, "step_timeout_s": stated}, 10.0)
    assert not stalled(one, 120.0, 10.0 + limit_s - 1)
    assert stalled(one, 120.0, 10.0 + limit_s)
