"""What fits into memory together, who leaves for whom, and when a model's time is over."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_agent.core.residency import (
    MIN_TURN_S,
    Placement,
    Resident,
    Room,
    Shortage,
    expires_in_s,
    make_room,
    make_way,
    place_evicting,
)

BUDGET = 1000
RESIDENTS = st.lists(
    st.builds(
        Resident,
        alias=st.just("x"),
        memory_mb=st.integers(0, 600),
        busy=st.booleans(),
        pinned=st.booleans(),
        fleeting=st.booleans(),
        idle_s=st.floats(0, 10_000),
        load_s=st.floats(0.01, 600),
    ),
    max_size=7,
).map(
    lambda found: [
        Resident(f"m{n}", one.memory_mb, one.busy, one.pinned, one.fleeting, one.idle_s, one.load_s)
        for n, one in enumerate(found)
    ]
)


def idle(alias: str, memory_mb: int, *, idle_s: float = 100.0, load_s: float = 1.0, fleeting: bool = False) -> Resident:
    return Resident(alias, memory_mb, busy=False, fleeting=fleeting, idle_s=idle_s, load_s=load_s)


@given(RESIDENTS, st.integers(0, 1200))
def test_the_budget_holds_and_nothing_leaves_that_must_stay(loaded: list[Resident], needed: int) -> None:
    decision = make_room(needed, BUDGET, loaded)
    used = sum(one.memory_mb for one in loaded)
    stuck = sum(one.memory_mb for one in loaded if one.busy or one.pinned)
    possible = needed + stuck <= BUDGET or needed + used <= BUDGET
    assert isinstance(decision, Room) is possible
    if isinstance(decision, Shortage):
        assert decision.missing_mb == needed + stuck - BUDGET > 0
        assert str(decision.missing_mb) in decision.message or decision.hopeless
        return
    left = [one for one in loaded if one.alias in decision.leaving]
    assert len(left) == len(decision.leaving)
    assert not any(one.busy or one.pinned for one in left)
    assert used - sum(one.memory_mb for one in left) + needed <= BUDGET or not left
    for kept in range(len(left)):  # nobody leaves for nothing
        fewer = [one for place, one in enumerate(left) if place != kept]
        assert used - sum(one.memory_mb for one in fewer) + needed > BUDGET


@given(RESIDENTS, st.integers(0, 1200), st.sampled_from(["m0", "m1", "other"]))
def test_a_deployment_sends_away_only_others_that_would_leave_anyway(
    loaded: list[Resident], needed: int, alias: str
) -> None:
    placement, leaving = place_evicting(alias, needed, BUDGET, loaded)
    by_alias = {one.alias: one for one in loaded}
    assert alias not in leaving
    assert all(by_alias[one].may_leave and by_alias[one].fleeting for one in leaving)
    stays = sum(one.memory_mb for one in loaded if one.alias not in leaving)
    own = by_alias[alias].memory_mb if alias in by_alias else 0
    if placement is Placement.BESIDE:
        assert stays + needed <= BUDGET
    elif placement is Placement.INSTEAD:
        assert stays - own + needed <= BUDGET < stays + needed
    else:
        assert leaving == ()


def test_the_least_recently_used_leaves_first() -> None:
    loaded = [idle("old", 300, idle_s=5000), idle("new", 300, idle_s=5), idle("middle", 300, idle_s=50)]
    assert make_room(400, BUDGET, loaded) == Room(("old",))


def test_what_is_slow_to_load_stays_longer() -> None:
    loaded = [
        idle("slow", 300, idle_s=200, load_s=60),
        idle("quick", 300, idle_s=100, load_s=1),
        idle("z", 300, idle_s=1),
    ]
    assert make_room(400, BUDGET, loaded) == Room(("quick",))


def test_nobody_leaves_whose_room_turns_out_not_to_be_needed() -> None:
    loaded = [idle("small", 100, idle_s=9000), idle("large", 800, idle_s=10)]
    assert make_room(800, BUDGET, loaded) == Room(("large",))


def test_a_refusal_says_by_how_much_and_what_would_have_to_go() -> None:
    loaded = [Resident("chat", 500), Resident("vision", 300, busy=False, pinned=True), idle("spare", 100)]
    decision = make_room(400, BUDGET, loaded)
    assert isinstance(decision, Shortage)
    assert decision.missing_mb == 200
    assert not decision.hopeless
    assert decision.message == (
        "needs 400 MiB of memory, the budget is 1000 MiB, 800 MiB of it are held: 200 MiB are missing; "
        "would have to go: chat (in use), vision (pinned)"
    )
    assert decision.passing
    stays = make_room(800, BUDGET, loaded)
    assert isinstance(stays, Shortage)
    assert not stays.passing  # what is pinned alone is too much
    alone = make_room(1100, BUDGET, [])
    assert isinstance(alone, Shortage)
    assert alone.hopeless
    assert not alone.passing
    assert "100 MiB too much" in alone.message


def in_use(alias: str, memory_mb: int, *, served_s: float = 100.0, load_s: float = 1.0) -> Resident:
    return Resident(alias, memory_mb, served_s=served_s, load_s=load_s, in_use=True)


def test_who_takes_no_new_requests_while_somebody_waits() -> None:
    assert make_way(400, BUDGET, [in_use("chat", 700)]) == ("chat",)
    assert make_way(400, BUDGET, [in_use("chat", 700), idle("spare", 200)]) == ("chat",)  # the idle one stays
    assert make_way(400, BUDGET, [in_use("chat", 300), idle("spare", 500)]) == ()  # nobody: what is idle goes at once


def test_nobody_is_held_up_in_vain() -> None:
    deploying = Resident("new", 500)
    assert make_way(450, BUDGET, [in_use("chat", 400), deploying]) == ("chat",)
    assert make_way(600, BUDGET, [in_use("chat", 300), Resident("new", 600)]) == ()
    assert make_way(400, BUDGET, [Resident("chat", 700, pinned=True, served_s=100, in_use=True)]) == ()
    assert make_way(1100, BUDGET, [in_use("chat", 700)]) == ()


def test_a_model_serves_as_long_as_its_load_took_before_it_makes_way() -> None:
    assert make_way(400, BUDGET, [in_use("chat", 700, served_s=MIN_TURN_S - 0.1)]) == ()
    assert make_way(400, BUDGET, [in_use("chat", 700, served_s=MIN_TURN_S)]) == ("chat",)
    assert make_way(400, BUDGET, [in_use("chat", 700, served_s=59, load_s=60)]) == ()
    assert make_way(400, BUDGET, [in_use("chat", 700, served_s=61, load_s=60)]) == ("chat",)


def test_a_candidate_keeps_the_serving_model_if_others_can_leave_instead() -> None:
    loaded = [Resident("chat", 400), idle("spare", 500, fleeting=True)]
    assert place_evicting("chat", 500, BUDGET, loaded) == (Placement.INSTEAD, ())
    assert place_evicting("chat", 600, BUDGET, loaded) == (Placement.BESIDE, ("spare",))
    assert place_evicting("other", 600, BUDGET, loaded) == (Placement.BESIDE, ("spare",))
    assert place_evicting("other", 600, BUDGET, [Resident("chat", 400), idle("spare", 500)]) == (Placement.BUSY, ())
    assert place_evicting("chat", 700, BUDGET, loaded) == (Placement.INSTEAD, ("spare",))


@pytest.mark.parametrize(
    ("keep_alive_s", "active", "idle_s", "rest"),
    [
        (-1, 0, 1e9, None),
        (300, 0, 100, 200),
        (300, 0, 400, 0),
        (300, 1, 400, None),
        (0, 0, 0, 0),
        (0, 2, 50, None),
    ],
)
def test_keep_alive(keep_alive_s: float, active: int, idle_s: float, rest: float | None) -> None:
    assert expires_in_s(keep_alive_s, active=active, idle_s=idle_s) == rest


def test_eviction_is_as_cheap_as_the_order_allows() -> None:
    loaded = [idle(f"m{n}", 200, idle_s=10 * (n + 1)) for n in range(5)]
    decision = make_room(400, BUDGET, loaded)
    assert isinstance(decision, Room)
    worth = {one.alias: one.worth for one in loaded}
    cheapest = min(combinations(worth, 2), key=lambda pair: sum(worth[one] for one in pair))
    assert sorted(decision.leaving) == sorted(cheapest)
