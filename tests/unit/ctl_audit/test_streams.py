from __future__ import annotations

import pytest
from sqlalchemy import func, select

from garrison_controller.audit.tables import StreamRow, StreamState
from garrison_protocol.messages.streams import Batch, Receipt, Row
from garrison_protocol.states import Stream
from garrison_protocol.topics import Up
from tests.unit.rollouts.fleet import FakeBoard, Fleet


@pytest.fixture
def board(fleet: Fleet) -> FakeBoard:
    board = fleet.boards["edge-1"]
    for number in range(10):
        board.record("inference.segment", {"model": "smol", "n": number}, count=number)
    return board


def send(fleet: Fleet, batch: Batch) -> Receipt:
    kind = Up.AUDIT if batch.stream is Stream.AUDIT else Up.TELEMETRY
    return fleet.receipt(fleet.send(fleet.boards[batch.device], kind, batch))


def stored(fleet: Fleet, stream: Stream = Stream.AUDIT) -> list[tuple[int, str]]:
    with fleet.database.reading() as session:
        rows = session.execute(
            select(StreamRow.seq, StreamRow.hash).where(StreamRow.stream == stream).order_by(StreamRow.seq)
        )
        return [(seq, row_hash) for seq, row_hash in rows]


def state(fleet: Fleet, stream: Stream = Stream.AUDIT) -> tuple[int, int, int, int]:
    with fleet.database.reading() as session:
        row = session.get_one(StreamState, ("edge-1", stream.value, "00000000000000aa"))
        return row.up_to, row.rows, row.dropped, row.duplicates


def test_rows_arrive_exactly_once_in_any_overlap(fleet: Fleet, board: FakeBoard) -> None:
    assert send(fleet, board.batch(1, 4)).up_to == 4
    assert send(fleet, board.batch(1, 4)).up_to == 4
    receipt = send(fleet, board.batch(3, 10))
    assert (receipt.up_to, receipt.hash, receipt.resend) == (10, board.entries[9].hash, False)
    assert stored(fleet) == [(entry.seq, entry.hash) for entry in board.entries]
    assert state(fleet) == (10, 10, 0, 6)
    assert fleet.alarms() == []


def test_a_gap_is_asked_for(fleet: Fleet, board: FakeBoard) -> None:
    receipt = send(fleet, board.batch(5, 6))
    assert (receipt.up_to, receipt.hash, receipt.resend) == (0, None, True)
    send(fleet, board.batch(1, 2))
    receipt = send(fleet, board.batch(5, 6))
    assert (receipt.up_to, receipt.hash, receipt.resend) == (2, board.entries[1].hash, True)
    assert [seq for seq, _ in stored(fleet)] == [1, 2]


def test_two_rows_under_one_number_are_an_alarm(fleet: Fleet, board: FakeBoard) -> None:
    send(fleet, board.batch(1, 6))
    other = FakeBoard("edge-1", board.key)
    for number in range(8):
        other.record("inference.segment", count=100 + number)
    receipt = send(fleet, other.batch(4, 8))
    assert (receipt.up_to, receipt.hash) == (6, board.entries[5].hash)
    assert fleet.alarms() == ["stream.fork"]
    assert stored(fleet) == [(entry.seq, entry.hash) for entry in board.entries[:6]]


def test_a_row_that_does_not_follow_is_an_alarm(fleet: Fleet, board: FakeBoard) -> None:
    send(fleet, board.batch(1, 3))
    del board.entries[3]
    rows = tuple(Row(header=one.header, body=one.body, salt=one.salt) for one in board.entries[3:6])
    receipt = send(fleet, board.batch(4, 6).model_copy(update={"rows": rows}))
    assert receipt.up_to == 3
    assert fleet.alarms() == ["stream.broken"]


@pytest.mark.parametrize("what", ["header", "body", "salt"])
def test_an_altered_row_is_an_alarm_and_nothing_of_its_batch_is_stored(
    fleet: Fleet, board: FakeBoard, what: str
) -> None:
    batch = board.batch(1, 5)
    row = batch.rows[2]
    changes = {
        "header": row.header.replace('"count":2', '"count":3'),
        "body": (row.body or "").replace("smol", "other"),
        "salt": "11" * 16,
    }
    rows = (*batch.rows[:2], row.model_copy(update={what: changes[what]}), *batch.rows[3:])
    receipt = send(fleet, batch.model_copy(update={"rows": rows}))
    assert receipt.up_to == 0
    assert fleet.alarms() == ["stream.broken"]
    assert stored(fleet) == []


def test_an_erased_body_still_fits(fleet: Fleet, board: FakeBoard) -> None:
    batch = board.batch(1, 3)
    erased = batch.rows[1].model_copy(update={"body": None, "salt": None})
    assert send(fleet, batch.model_copy(update={"rows": (batch.rows[0], erased, batch.rows[2])})).up_to == 3
    assert send(fleet, board.batch(1, 4)).up_to == 4
    assert fleet.alarms() == []


def test_rows_of_another_board_do_not_pass(fleet: Fleet, board: FakeBoard) -> None:
    stranger = FakeBoard("edge-1", board.key)
    stranger.device = "edge-2"
    stranger.record()
    rows = tuple(Row(header=one.header) for one in stranger.entries)
    batch = Batch(device="edge-1", stream=Stream.AUDIT, epoch=board.epoch, first=1, rows=rows)
    assert send(fleet, batch).up_to == 0
    assert fleet.alarms() == ["stream.broken"]


def test_telemetry_gaps_count_only_as_far_as_the_board_dropped_rows(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    for number in range(10):
        board.measure(requests=number)
    send(fleet, board.batch(1, 2, stream=Stream.TELEMETRY))
    assert send(fleet, board.batch(6, 7, stream=Stream.TELEMETRY, dropped=2)).resend
    assert send(fleet, board.batch(6, 7, stream=Stream.TELEMETRY, dropped=3)).up_to == 7
    assert send(fleet, board.batch(6, 10, stream=Stream.TELEMETRY, dropped=3)).up_to == 10
    assert state(fleet, Stream.TELEMETRY) == (10, 7, 3, 2)
    assert fleet.alarms() == []


def test_audit_rows_are_never_dropped(fleet: Fleet, board: FakeBoard) -> None:
    send(fleet, board.batch(1, 2))
    assert send(fleet, board.batch(5, 6, dropped=2)).resend


def test_a_new_epoch_begins_at_one_and_is_an_alarm(fleet: Fleet, board: FakeBoard) -> None:
    send(fleet, board.batch(1, 5))
    board.epoch = "00000000000000bb"
    board.entries.clear()
    board.record("epoch.opened")
    assert send(fleet, board.batch()).up_to == 1
    assert fleet.alarms() == ["audit.store_lost"]
    with fleet.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(StreamState)) == 2


def test_numbers_beyond_reason_are_refused(fleet: Fleet, board: FakeBoard) -> None:
    batch = board.batch(1, 1).model_copy(update={"first": 2**60})
    assert fleet.send(board, Up.AUDIT, batch).messages == ()
    assert fleet.refusals() == {("edge-1", "stream.out_of_range"): 1}
