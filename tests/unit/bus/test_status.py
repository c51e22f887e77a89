from __future__ import annotations

from datetime import datetime

from garrison_controller.audit.tables import ReportState
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts.tables import DesiredState
from garrison_protocol.states import DeploymentState
from garrison_protocol.topics import Up
from tests.unit.rollouts.fleet import Fleet


def status(fleet: Fleet, connection: int, *, online: bool = True, counter: int = 0, sha256: str | None = None) -> bool:
    board = fleet.boards["edge-1"]
    board.connection = connection
    return fleet.send(board, Up.STATUS, board.status(online=online, counter=counter, sha256=sha256)).desired_changed


def online(fleet: Fleet) -> bool:
    with fleet.database.reading() as session:
        return session.get_one(Device, "edge-1").online


def published(fleet: Fleet, at: datetime | None) -> str:
    """Mark the board's desired state as published and return its digest."""
    with fleet.database.session() as session:
        row = session.get_one(DesiredState, "edge-1")
        row.published_at = at
        return row.sha256


def test_a_death_counts_only_for_the_current_connection(fleet: Fleet) -> None:
    status(fleet, 5)
    status(fleet, 4, online=False)
    assert online(fleet)
    status(fleet, 5, online=False)
    assert not online(fleet)
    status(fleet, 6)
    assert online(fleet)
    status(fleet, 5)  # a late heartbeat of the connection before
    with fleet.database.reading() as session:
        assert session.get_one(Device, "edge-1").connection == 6


def test_a_board_that_lacks_the_newest_desired_state_gets_it_again(fleet: Fleet) -> None:
    fleet.begin()
    digest = published(fleet, fleet.clock())
    assert status(fleet, 1, counter=0)
    with fleet.database.reading() as session:
        assert session.get_one(DesiredState, "edge-1").published_at is None
    published(fleet, fleet.clock())
    assert not status(fleet, 1, counter=1, sha256=digest)
    assert fleet.alarms() == []


def test_an_equal_counter_with_another_digest_is_an_alarm(fleet: Fleet) -> None:
    fleet.begin()
    published(fleet, fleet.clock())
    assert not status(fleet, 1, counter=1, sha256="0" * 64)
    assert not status(fleet, 1, counter=1, sha256="0" * 64)
    assert fleet.alarms() == ["desired.fork"]


def test_a_board_ahead_of_the_controller_is_an_alarm_and_never_rolled_back_in_silence(fleet: Fleet) -> None:
    rollout = fleet.begin()
    published(fleet, fleet.clock())
    assert not status(fleet, 1, counter=41, sha256="0" * 64)
    assert not status(fleet, 1, counter=41, sha256="0" * 64)
    assert fleet.alarms() == ["desired.ahead"]
    message = fleet.desired("edge-1")
    assert message is not None
    assert message.counter == 1  # nothing new was signed
    fleet.pause(rollout)
    after = fleet.desired("edge-1")
    assert after is not None
    assert after.counter == 42


def test_a_board_ahead_without_any_desired_state_here(fleet: Fleet) -> None:
    assert not status(fleet, 1, counter=7, sha256="0" * 64)
    assert fleet.alarms() == ["desired.ahead"]
    assert fleet.desired("edge-1") is None
    fleet.begin()
    message = fleet.desired("edge-1")
    assert message is not None
    assert message.counter == 8


def test_a_signed_head_that_contradicts_a_stored_row_is_an_alarm(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    board.record(note="true")
    fleet.send(board, Up.AUDIT, board.batch())
    status(fleet, 1)
    assert fleet.alarms() == []
    board.entries.clear()
    board.record(note="another history")
    status(fleet, 1)
    assert fleet.alarms() == ["stream.fork"]


def test_a_board_whose_store_was_lost_counts_anew(fleet: Fleet) -> None:
    rollout = fleet.begin()
    board = fleet.boards["edge-1"]
    board.record()
    fleet.send(board, Up.AUDIT, board.batch())
    status(fleet, 9)
    for _ in range(5):
        fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 50)

    board.epoch, board.revision = "00000000000000bb", 0
    board.entries.clear()
    board.record()
    status(fleet, 1)
    assert fleet.alarms() == ["audit.store_lost"]
    with fleet.database.reading() as session:
        assert session.get_one(Device, "edge-1").connection == 1
        assert session.get_one(ReportState, "edge-1").revision == 0
    fleet.report("edge-1", rollout, DeploymentState.ACTIVE, 3)
    assert fleet.states(rollout)["edge-1"] == "SUCCEEDED"

    board.epoch = "00000000000000aa"  # the old epoch, replayed: no new store
    board.entries.clear()
    board.connection = 0
    status(fleet, 0)
    with fleet.database.reading() as session:
        assert session.get_one(Device, "edge-1").connection == 1
