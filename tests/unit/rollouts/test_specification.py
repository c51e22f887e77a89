from __future__ import annotations

import pytest
from pydantic import ValidationError

from garrison_controller.devices.filter import DeviceFacts
from garrison_controller.rollouts.specification import GroupSpec, RolloutSpec, digest, place

BOARDS = [DeviceFacts(f"edge-{number}", "/demo/", {}) for number in range(10)]


def test_boards_fall_into_the_first_group_that_takes_them() -> None:
    groups = [
        GroupSpec(name="canary", filter="name=edge-1"),
        GroupSpec(name="same", filter="name=edge-1"),
        GroupSpec(name="rest", filter="*"),
    ]
    placement = place("r-1", groups, BOARDS)
    assert [len(group) for group in placement.groups] == [1, 0, 9]
    assert placement.outside == ()


def test_percentages_refer_to_all_boards_and_round_up() -> None:
    groups = [GroupSpec(name="a", percent=11), GroupSpec(name="b", percent=30), GroupSpec(name="rest", filter="*")]
    placement = place("r-1", groups, BOARDS)
    assert [len(group) for group in placement.groups] == [2, 3, 5]
    assert sorted(board for group in placement.groups for board in group) == [board.name for board in BOARDS]


def test_placement_repeats_itself_and_differs_between_rollouts() -> None:
    groups = [GroupSpec(name="a", percent=20)]
    assert place("r-1", groups, BOARDS) == place("r-1", groups, list(reversed(BOARDS)))
    assert len({place(f"r-{number}", groups, BOARDS).groups for number in range(20)}) > 1


def test_boards_that_no_group_takes_are_named() -> None:
    placement = place("r-1", [GroupSpec(name="one", filter="name=edge-1")], BOARDS)
    assert "edge-1" not in placement.outside
    assert len(placement.outside) == 9


@pytest.mark.parametrize(
    "groups",
    [
        [{"name": "a", "filter": "*", "percent": 10}],
        [{"name": "a"}],
        [{"name": "a", "percent": 0}],
        [{"name": "a", "filter": "*"}, {"name": "a", "filter": "*"}],
        [{"name": "a", "percent": 60}, {"name": "b", "percent": 60}],
        [],
    ],
)
def test_groups_that_make_no_sense_are_refused(groups: list[dict[str, object]]) -> None:
    with pytest.raises(ValidationError):
        RolloutSpec.model_validate({"name": "x", "model": "m", "version": "1", "groups": groups})


def test_the_digest_covers_every_fact_and_the_groups_in_order() -> None:
    first, second = GroupSpec(name="a", filter="*"), GroupSpec(name="b", percent=10)
    base = digest({"soak_s": 30.0, "limits": {"max_rss_mb": 100.0}}, [first, second])
    assert base == digest({"limits": {"max_rss_mb": 100.0}, "soak_s": 30.0}, [first, second])
    assert base != digest({"soak_s": 30.5, "limits": {"max_rss_mb": 100.0}}, [first, second])
    assert base != digest({"soak_s": 30.0, "limits": {"max_rss_mb": 101.0}}, [first, second])
    assert base != digest({"soak_s": 30.0, "limits": {"max_rss_mb": 100.0}}, [second, first])
