from __future__ import annotations

from datetime import datetime

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access.tables import AdminEvent
from garrison_controller.rollouts import documents, execution, queries, service
from garrison_controller.rollouts.specification import GroupSpec
from garrison_controller.rollouts.tables import DesiredState, Rollout
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError
from garrison_protocol.keys import SigningKey
from garrison_protocol.states import DeploymentState
from tests.unit.rollouts.fleet import ALICE, Fleet


def test_nothing_reaches_boards_before_approval(fleet: Fleet) -> None:
    rollout = fleet.create()
    fleet.tick()
    assert fleet.states(rollout) == {}
    assert fleet.desired("edge-1") is None
    with fleet.database.reading() as session:
        document = documents.detail(session, queries.find(session, "first"))
    assert [group["would_take"] for group in document["groups"]] == [["edge-1"], ["edge-2", "edge-3"]]


def test_groups_follow_one_another(fleet: Fleet) -> None:
    rollout = fleet.begin()
    assert fleet.states(rollout) == {"edge-1": "QUEUED", "edge-2": "SCHEDULED", "edge-3": "SCHEDULED"}
    assert fleet.serves("edge-1") == ("1.0.0", rollout)
    assert fleet.desired("edge-2") is None

    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 2)
    assert fleet.states(rollout)["edge-1"] == "IN_PROGRESS"
    fleet.report("edge-1", rollout, DeploymentState.SOAKING, 6)
    assert fleet.desired("edge-2") is None

    assert fleet.report("edge-1", rollout, DeploymentState.ACTIVE, 7).desired_changed
    assert fleet.groups(rollout) == ["FINISHED", "RUNNING"]
    assert fleet.serves("edge-2") == ("1.0.0", rollout)
    fleet.activate("edge-2", rollout)
    assert fleet.rollout(rollout).status == "RUNNING"
    fleet.activate("edge-3", rollout)
    assert fleet.rollout(rollout).status == "FINISHED"
    assert set(fleet.states(rollout).values()) == {"SUCCEEDED"}


def test_a_board_that_rolls_back_pauses_the_rollout_and_others_never_see_it(fleet: Fleet) -> None:
    good = fleet.begin("good")
    for board in fleet.boards:
        fleet.activate(board, good)
    bad = fleet.begin("bad", "2.0.0")
    fleet.report(
        "edge-1", bad, DeploymentState.ROLLED_BACK, 20, error_code="gate.accuracy", error_message="0.2 below 0.9"
    )
    row = fleet.rollout(bad)
    assert (row.status, fleet.groups(bad)) == ("PAUSED", ["ERROR", "SCHEDULED"])
    assert "1 of 1 boards failed" in row.pause_reason
    assert fleet.serves("edge-1") == ("2.0.0", bad)  # it keeps the assignment that it failed
    assert fleet.serves("edge-2") == ("1.0.0", good)
    assert fleet.target(bad, "edge-1").error_code == "gate.accuracy"
    fleet.tick()
    assert fleet.serves("edge-3") == ("1.0.0", good)

    with pytest.raises(ConflictError) as refused:
        fleet.resume(bad)
    assert refused.value.code == "rollout.group_failed"

    fleet.stop(bad)
    assert fleet.serves("edge-1") == ("1.0.0", good)
    assert fleet.states(bad) == {"edge-1": "FAILED", "edge-2": "CANCELED", "edge-3": "CANCELED"}


def test_pause_takes_the_change_back_only_from_boards_before_loading(fleet: Fleet) -> None:
    rollout = fleet.begin(groups=(GroupSpec(name="all", filter="*"),))
    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 2)
    fleet.report("edge-2", rollout, DeploymentState.LOADING, 5)
    fleet.pause(rollout)
    assert fleet.states(rollout) == {"edge-1": "SCHEDULED", "edge-2": "IN_PROGRESS", "edge-3": "SCHEDULED"}
    assert fleet.serves("edge-1") is None
    assert fleet.serves("edge-2") == ("1.0.0", rollout)
    taken_back = fleet.desired("edge-1")
    assert taken_back is not None
    assert (taken_back.counter, taken_back.aliases) == (2, ())

    fleet.activate("edge-2", rollout)  # what was under way ends normally
    assert fleet.states(rollout)["edge-2"] == "SUCCEEDED"
    fleet.tick()
    assert fleet.serves("edge-1") is None

    fleet.resume(rollout)
    assert fleet.serves("edge-1") == ("1.0.0", rollout)
    assert fleet.states(rollout)["edge-1"] == "QUEUED"
    fleet.activate("edge-1", rollout)
    fleet.activate("edge-3", rollout)
    assert fleet.rollout(rollout).status == "FINISHED"


def test_what_a_withdrawn_board_still_says_does_not_hand_it_out(fleet: Fleet) -> None:
    rollout = fleet.begin(groups=(GroupSpec(name="all", filter="*"),))
    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 2)
    fleet.pause(rollout)
    fleet.report("edge-1", rollout, DeploymentState.SUPERSEDED, 3)
    assert fleet.states(rollout)["edge-1"] == "SCHEDULED"
    assert fleet.target(rollout, "edge-1").deployment == "SUPERSEDED"


def test_pause_restores_what_was_there_before(fleet: Fleet) -> None:
    first = fleet.begin("one")
    for board in fleet.boards:
        fleet.activate(board, first)
    second = fleet.begin("two", "2.0.0")
    assert fleet.serves("edge-1") == ("2.0.0", second)
    fleet.pause(second)
    assert fleet.serves("edge-1") == ("1.0.0", first)
    restored = fleet.desired("edge-1")
    assert restored is not None
    assert restored.aliases[0].start_by is None


def test_stop_restores_every_board_that_did_not_succeed(fleet: Fleet) -> None:
    first = fleet.begin("one")
    for board in fleet.boards:
        fleet.activate(board, first)
    second = fleet.begin("two", "2.0.0", groups=(GroupSpec(name="all", filter="*"),))
    fleet.activate("edge-1", second, 20)
    fleet.report("edge-2", second, DeploymentState.LOADING, 20)
    fleet.stop(second)
    assert fleet.serves("edge-1") == ("2.0.0", second)
    assert fleet.serves("edge-2") == ("1.0.0", first)
    assert fleet.serves("edge-3") == ("1.0.0", first)
    fleet.activate("edge-2", second, 25)  # said before the board heard of the end
    assert fleet.states(second)["edge-2"] == "CANCELED"
    assert fleet.target(second, "edge-2").deployment == "ACTIVE"


def test_a_model_that_never_worked_is_not_what_boards_go_back_to(fleet: Fleet) -> None:
    good = fleet.begin("good")
    for board in fleet.boards:
        fleet.activate(board, good)
    everyone = (GroupSpec(name="all", filter="*"),)
    bad = fleet.begin("bad", "2.0.0", groups=everyone, error_threshold=100, success_threshold=1)
    for board in fleet.boards:
        state = DeploymentState.ACTIVE if board == "edge-3" else DeploymentState.ROLLED_BACK
        fleet.report(board, bad, state, 20)
    assert fleet.rollout(bad).status == "FINISHED"
    third = fleet.begin("third", "1.0.0", groups=everyone)
    fleet.stop(third)
    assert fleet.serves("edge-1") == ("1.0.0", good)
    assert fleet.serves("edge-3") == ("2.0.0", bad)


def test_silent_boards_time_out(fleet: Fleet) -> None:
    rollout = fleet.begin(queued_timeout_s=60)
    message = fleet.desired("edge-1")
    assert message is not None
    assert message.aliases[0].start_by == int(fleet.clock.now.timestamp()) + 60
    fleet.clock.advance(60)
    fleet.tick()
    assert fleet.states(rollout)["edge-1"] == "TIMED_OUT"
    assert fleet.target(rollout, "edge-1").error_code == "rollout.queued_timeout"
    row = fleet.rollout(rollout)
    assert row.status == "PAUSED"
    assert "1 timed out" in row.pause_reason


def test_a_late_success_counts_and_lets_a_paused_rollout_go_on(fleet: Fleet) -> None:
    rollout = fleet.begin(in_progress_timeout_s=60)
    fleet.report("edge-1", rollout, DeploymentState.LOADING, 4)
    fleet.clock.advance(61)
    fleet.tick()
    assert fleet.states(rollout)["edge-1"] == "TIMED_OUT"
    fleet.activate("edge-1", rollout)
    assert fleet.rollout(rollout).status == "PAUSED"
    fleet.resume(rollout)
    assert fleet.groups(rollout) == ["FINISHED", "RUNNING"]


def test_max_unavailable_hands_out_one_after_another(fleet: Fleet) -> None:
    rollout = fleet.begin(groups=(GroupSpec(name="all", filter="*"),), max_unavailable=1)
    assert list(fleet.states(rollout).values()).count("QUEUED") == 1
    fleet.activate("edge-1", rollout)
    assert fleet.states(rollout) == {"edge-1": "SUCCEEDED", "edge-2": "QUEUED", "edge-3": "SCHEDULED"}


def test_reports_count_in_order_of_revision_and_step(fleet: Fleet) -> None:
    rollout = fleet.begin()
    fleet.report("edge-1", rollout, DeploymentState.LOADING, 5)
    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 6, revision=1)  # an old report, redelivered
    assert fleet.target(rollout, "edge-1").deployment == "LOADING"
    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 4)  # an older step
    assert fleet.target(rollout, "edge-1").deployment == "LOADING"
    fleet.report("edge-1", rollout, DeploymentState.LOADING, 5, progress_bytes=10, total_bytes=20)
    assert fleet.target(rollout, "edge-1").progress_bytes == 10


def test_a_newer_rollout_does_not_change_an_older_verdict(fleet: Fleet) -> None:
    first = fleet.begin("one", groups=(GroupSpec(name="all", filter="*"),))
    for board in fleet.boards:
        fleet.activate(board, first)
    second = fleet.begin("two", "2.0.0")
    fleet.report("edge-1", second, DeploymentState.ROLLED_BACK, 20)
    assert fleet.states(first)["edge-1"] == "SUCCEEDED"
    fleet.report("edge-1", first, DeploymentState.DOWN, 30)  # the first one has ended: a word, no verdict
    assert fleet.states(first)["edge-1"] == "SUCCEEDED"
    assert fleet.target(first, "edge-1").deployment == "DOWN"


def test_two_rollouts_never_share_a_board_and_an_alias(fleet: Fleet) -> None:
    fleet.begin("one")
    second = fleet.create("two", "2.0.0")
    with pytest.raises(ConflictError) as refused:
        fleet.approve(second)
    assert refused.value.code == "rollout.overlap"
    assert fleet.rollout(second).status == "WAITING_FOR_APPROVAL"  # the approval went back with the start
    fleet.stop("one")
    fleet.approve(second)
    assert fleet.serves("edge-1") == ("2.0.0", second)


def test_another_alias_is_no_conflict_and_both_are_desired(fleet: Fleet) -> None:
    fleet.begin("one")
    fleet.begin("two", "2.0.0", alias="other")
    message = fleet.desired("edge-1")
    assert message is not None
    assert [(alias.alias, alias.package.version) for alias in message.aliases] == [
        ("other", "2.0.0"),
        ("smol", "1.0.0"),
    ]
    assert message.counter == 2


def test_the_next_group_can_be_triggered_by_hand(fleet: Fleet) -> None:
    rollout = fleet.begin()
    with fleet.database.session() as session:
        row = queries.find(session, rollout, lock=True)
        assert service.trigger_next_group(session, ALICE, row, fleet.director, fleet.clock()) == "rest"
    assert set(fleet.states(rollout).values()) == {"QUEUED"}
    with pytest.raises(ConflictError) as refused, fleet.database.session() as session:
        service.trigger_next_group(session, ALICE, queries.find(session, rollout), fleet.director, fleet.clock())
    assert refused.value.code == "rollout.no_next_group"


def test_scope_and_filter_bound_the_boards(fleet: Fleet) -> None:
    nowhere = fleet.create("nowhere", scope="/elsewhere/")
    with pytest.raises(ConflictError) as refused:
        fleet.approve(nowhere)
    assert refused.value.code == "rollout.no_targets"
    rollout = fleet.begin("some", target_filter="name!=edge-2")
    assert set(fleet.states(rollout)) == {"edge-1", "edge-3"}


def test_wrong_specifications_are_refused(fleet: Fleet) -> None:
    with pytest.raises(NotFoundError):
        fleet.create(version="9.9.9")
    with pytest.raises(InvalidError):
        fleet.create(target_filter="colour=blue")
    with pytest.raises(InvalidError):
        fleet.create(scope="demo")
    fleet.create()
    with pytest.raises(ConflictError) as refused:
        fleet.create()
    assert refused.value.code == "rollout.exists"


def test_start_by_goes_once_the_board_has_succeeded(fleet: Fleet) -> None:
    rollout = fleet.begin()
    fleet.activate("edge-1", rollout)
    other = fleet.begin("other", "2.0.0", alias="other", groups=(GroupSpec(name="all", filter="name=edge-1"),))
    message = fleet.desired("edge-1")
    assert message is not None
    deadlines = {alias.rollout: alias.start_by for alias in message.aliases}
    assert deadlines[rollout] is None
    assert deadlines[other] is not None


def test_every_step_of_people_and_controller_is_recorded(fleet: Fleet) -> None:
    rollout = fleet.begin()
    fleet.report("edge-1", rollout, DeploymentState.FAILED, 3)
    with fleet.database.reading() as session:
        rows = session.execute(select(AdminEvent.principal, AdminEvent.action).order_by(AdminEvent.id))
        events = [tuple(row) for row in rows]
    assert events == [
        ("alice", "rollout.create"),
        ("bob", "rollout.approve"),
        ("bob", "rollout.start"),
        ("controller", "rollout.pause"),
    ]


def test_new_desired_state_counts_as_unpublished(fleet: Fleet) -> None:
    rollout = fleet.begin()
    with fleet.database.session() as session:
        session.get_one(DesiredState, "edge-1").published_at = fleet.clock()
    fleet.pause(rollout)
    with fleet.database.reading() as session:
        assert session.get_one(DesiredState, "edge-1").published_at is None


def test_a_board_that_was_withdrawn_once_can_be_withdrawn_again(fleet: Fleet) -> None:
    good = fleet.begin("good")
    for board in fleet.boards:
        fleet.activate(board, good)
    new = fleet.begin("new", "2.0.0")
    fleet.report("edge-1", new, DeploymentState.DOWNLOADING, 20)
    fleet.pause(new)
    fleet.report("edge-1", new, DeploymentState.SUPERSEDED, 21)
    fleet.resume(new)
    assert fleet.serves("edge-1") == ("2.0.0", new)
    fleet.pause(new)
    assert fleet.serves("edge-1") == ("1.0.0", good)


def test_a_board_that_went_silent_in_a_download_does_not_come_back_to_a_bad_model(fleet: Fleet) -> None:
    good = fleet.begin("good")
    for board in fleet.boards:
        fleet.activate(board, good)
    everyone = (GroupSpec(name="all", filter="*"),)
    bad = fleet.begin("bad", "2.0.0", groups=everyone, in_progress_timeout_s=600)
    fleet.report("edge-1", bad, DeploymentState.DOWNLOADING, 20)
    fleet.clock.advance(601)
    fleet.tick()
    fleet.report("edge-2", bad, DeploymentState.ROLLED_BACK, 20)
    assert fleet.rollout(bad).status == "PAUSED"
    assert fleet.states(bad)["edge-1"] == "TIMED_OUT"
    assert fleet.serves("edge-1") == ("1.0.0", good)

    fleet.activate("edge-1", bad, 27)  # said before it saw the withdrawal: it is on its way back
    assert fleet.states(bad)["edge-1"] == "TIMED_OUT"


def test_a_rollout_that_cannot_be_advanced_stops_no_other(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = (GroupSpec(name="all", filter="*"),)
    poisoned = fleet.begin("poisoned", groups=everyone, queued_timeout_s=60)
    fleet.clock.advance(1)
    other = fleet.begin("other", alias="other", groups=everyone, queued_timeout_s=60)
    advance = execution.advance

    def faulty(session: Session, rollout: Rollout, director: SigningKey, now: datetime) -> bool:
        if rollout.id == poisoned:
            raise ValueError("a bug")
        return advance(session, rollout, director, now)

    monkeypatch.setattr(execution, "advance", faulty)
    fleet.clock.advance(60)
    fleet.tick()
    assert set(fleet.states(poisoned).values()) == {"QUEUED"}
    assert set(fleet.states(other).values()) == {"TIMED_OUT"}


def test_a_board_without_room_for_another_alias_is_refused_at_the_start(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_ALIASES", 2)
    only = (GroupSpec(name="all", filter="name=edge-2"),)
    for alias in ("one", "two"):
        fleet.activate("edge-2", fleet.begin(alias, alias=alias, groups=only))
    with pytest.raises(ConflictError) as refused:
        fleet.begin("three", alias="three")
    assert refused.value.code == "rollout.too_many_aliases"
    fleet.begin("again", "2.0.0", alias="two", groups=only)
