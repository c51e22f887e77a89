"""The time floor: what raises it, what it rests on, and how it falls with a key."""

from __future__ import annotations

from garrison_agent.core.time_floor import BUILD_S, BUILT, TimeFloor

LATER_S = BUILD_S + 1_000_000


def test_a_new_board_knows_when_its_software_was_built() -> None:
    floor = TimeFloor.start({}, monotonic_s=50)
    assert (floor.at_s(50), floor.source) == (BUILD_S, BUILT)


def test_time_in_operation_raises_it() -> None:
    assert TimeFloor.start({}, monotonic_s=50).at_s(3650) == BUILD_S + 3600


def test_a_signed_time_raises_it_and_an_earlier_one_does_not_lower_it() -> None:
    floor = TimeFloor.start({}, 0).raised("a", LATER_S, 10)
    assert (floor.at_s(10), floor.at_s(70), floor.source) == (LATER_S, LATER_S + 60, "a")
    assert floor.raised("a", BUILD_S + 1, 20).at_s(20) == LATER_S + 10
    assert floor.raised("b", BUILD_S + 1, 20).source == "a"


def test_it_falls_back_to_what_it_was_without_a_key() -> None:
    floor = TimeFloor.start({}, 0).raised("honest", LATER_S, 10).raised("thief", LATER_S * 2, 20)
    assert floor.source == "thief"
    assert floor.without("thief").at_s(20) == LATER_S + 10
    assert floor.only({"honest"}) == floor.without("thief")
    assert floor.only(()).at_s(20) == BUILD_S + 20


def test_it_goes_on_from_what_was_stored() -> None:
    floor = TimeFloor.start({}, 1000).raised("a", LATER_S, 1000)
    again = TimeFloor.start(floor.to_store(1600), monotonic_s=5)
    assert (again.at_s(5), again.source) == (LATER_S + 600, "a")


def test_what_no_board_can_have_stored_is_not_believed() -> None:
    floor = TimeFloor.start({"a": 2.0**41, "b": -1, BUILT: 0}, 0)
    assert (floor.at_s(0), floor.source) == (BUILD_S, BUILT)


def test_a_monotonic_clock_that_seems_to_go_back_lowers_nothing() -> None:
    floor = TimeFloor.start({}, 1000).raised("a", LATER_S, 1000)
    assert floor.at_s(10) == LATER_S
