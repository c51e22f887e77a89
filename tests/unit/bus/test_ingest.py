from __future__ import annotations

import json

import pytest

from garrison_controller.bus.ingest import Ingest
from garrison_controller.devices.tables import Device
from garrison_protocol import envelope, topics
from garrison_protocol.errors import GarrisonError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.report import Report
from garrison_protocol.states import Stream
from garrison_protocol.topics import Up
from tests.unit.rollouts.fleet import FakeBoard, Fleet


def test_unknown_and_revoked_boards_are_refused_and_counted(fleet: Fleet) -> None:
    stranger = FakeBoard("edge-9")
    assert not fleet.send(stranger, Up.STATUS, stranger.status()).messages
    with fleet.database.session() as session:
        session.get_one(Device, "edge-1").state = "revoked"
    fleet.send(fleet.boards["edge-1"], Up.STATUS, fleet.boards["edge-1"].status())
    assert fleet.refusals() == {("", "device.unknown"): 1, ("edge-1", "device.revoked"): 1}


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "envelope.malformed"),
        (b"\xff\xfe", "envelope.malformed"),
        (b"[" * 100_000, "envelope.malformed"),
        (b'{"payloadType":1}', "envelope.malformed"),
        (b"x" * (envelope.MAX_ENVELOPE_BYTES + 1), "envelope.too_large"),
    ],
)
def test_malformed_messages_are_refused_with_a_stable_code(fleet: Fleet, payload: bytes, code: str) -> None:
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), payload)
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), payload)
    assert fleet.refusals() == {("edge-1", code): 2}


def test_another_boards_signature_or_message_is_refused(fleet: Fleet) -> None:
    first, second = fleet.boards["edge-1"], fleet.boards["edge-2"]
    forged = second.seal("status", first.status())
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), forged)
    replayed = first.seal("status", second.status())
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), replayed)
    assert fleet.refusals() == {("edge-1", "envelope.key_unknown"): 1, ("edge-1", "message.misaddressed"): 1}


def test_a_message_of_another_kind_is_refused(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    board.record()
    fleet.ingest.handle(topics.up("edge-1", Up.TELEMETRY), board.seal("audit", board.batch()))
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", board.batch(stream=Stream.AUDIT)))
    board.measure(requests=1)
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", board.batch(stream=Stream.TELEMETRY)))
    assert fleet.refusals() == {("edge-1", "message.misplaced"): 2}


@pytest.mark.parametrize("topic", ["", "garrison/v1/up/edge-1/other", "garrison/v1/down/edge-1/desired", "a/b"])
def test_topics_that_no_board_uses_are_refused(fleet: Fleet, topic: str) -> None:
    fleet.ingest.handle(topic, b"{}")
    assert fleet.refusals() == {("", "topic.unknown"): 1}


def test_numbers_that_no_database_takes_are_refused(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    for body in (
        {"v": "1.0", "device": "edge-1", "connection": 2**70, "online": True},
        {"v": "1.0", "device": "edge-1", "connection": 1, "online": True, "desired_counter": 10**30},
    ):
        sealed = envelope.seal("status", json.dumps(body).encode(), board.key)
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), sealed)
    report = {"v": "1.0", "device": "edge-1", "revision": 2**80}
    fleet.ingest.handle(topics.up("edge-1", Up.REPORT), envelope.seal("report", json.dumps(report).encode(), board.key))
    assert fleet.refusals() == {("edge-1", "message.out_of_range"): 3}


def test_unknown_fields_and_newer_minor_versions_are_tolerated(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    body = {"v": "1.9", "device": "edge-1", "connection": 3, "online": True, "mood": "good"}
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), envelope.seal("status", json.dumps(body).encode(), board.key))
    assert fleet.refusals() == {}
    with fleet.database.reading() as session:
        assert session.get_one(Device, "edge-1").connection == 3


def test_text_and_numbers_that_databases_refuse_are_cleaned(fleet: Fleet) -> None:
    rollout = fleet.begin()
    alias = {
        "alias": "smol",
        "package": {"name": "smollm2", "version": "1.0.0", "manifest_sha256": "0" * 64},
        "rollout": rollout,
        "state": "ROLLED_BACK",
        "step": 3,
        "error_message": "a\x00b" + "x" * 5000,
        "evaluation": {"cases_sha256": "0" * 64, "cases": 1, "passed": 0, "accuracy": float("nan")},
    }
    body = json.dumps({"device": "edge-1", "revision": 1, "aliases": [alias]}).encode()
    assert b"NaN" in body
    sealed = envelope.seal("report", body, fleet.boards["edge-1"].key)
    fleet.ingest.handle(topics.up("edge-1", Up.REPORT), sealed)
    target = fleet.target(rollout, "edge-1")
    assert target.message is not None
    assert "\x00" not in target.message
    assert len(target.message) <= 2000
    assert target.evaluation["accuracy"] is None


def test_a_failing_handler_is_counted_and_does_not_stop_others(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr("garrison_controller.bus.status.record", broken)
    board = fleet.boards["edge-1"]
    fleet.send(board, Up.STATUS, board.status())
    assert fleet.refusals() == {("edge-1", "message.handler_failed"): 1}
    assert "ZeroDivisionError" in caplog.text


def test_a_busy_database_is_no_refusal(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> bool:
        raise GarrisonError("database.busy", "busy", retryable=True)

    monkeypatch.setattr("garrison_controller.bus.status.record", busy)
    board = fleet.boards["edge-1"]
    with pytest.raises(GarrisonError):
        fleet.send(board, Up.STATUS, board.status())
    assert fleet.refusals() == {}


def test_a_crash_between_commit_and_receipt_is_harmless(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    for _ in range(3):
        board.record()
    message = board.seal("audit", board.batch())
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), message)  # the receipt dies with the process
    restarted = Ingest(fleet.database, director=fleet.director, receipt_key=fleet.receipt_key, now=fleet.clock)
    receipt = fleet.receipt(restarted.handle(topics.up("edge-1", Up.AUDIT), message))
    assert (receipt.up_to, receipt.hash, receipt.resend) == (3, board.entries[-1].hash, False)


def test_reports_keep_the_inventory(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    body = {"v": "1.0", "device": "edge-1", "revision": 1, "inventory": {"architecture": "aarch64", "memory_mb": 4096}}
    sealed = envelope.seal("report", json.dumps(body).encode(), board.key)
    fleet.ingest.handle(topics.up("edge-1", Up.REPORT), sealed)
    with fleet.database.reading() as session:
        device = session.get_one(Device, "edge-1")
        assert device.inventory["architecture"] == "aarch64"
        assert device.last_seen_at == fleet.clock.now


def test_a_report_about_an_unknown_rollout_changes_nothing(fleet: Fleet) -> None:
    rollout = fleet.begin()
    board = fleet.boards["edge-2"]
    report = Report.model_validate(
        {
            "device": "edge-2",
            "revision": 1,
            "aliases": [
                {
                    "alias": "smol",
                    "package": {"name": "x", "version": "1", "manifest_sha256": "0" * 64},
                    "rollout": name,
                    "state": "ACTIVE",
                    "step": 1,
                }
                for name in ("r-unknown", rollout)
            ],
        }
    )
    fleet.ingest.handle(topics.up("edge-2", Up.REPORT), envelope.seal("report", encode(report), board.key))
    assert fleet.refusals() == {}
    assert fleet.states(rollout)["edge-2"] == "SCHEDULED"


def test_nobody_but_the_board_can_sign(fleet: Fleet) -> None:
    board = fleet.boards["edge-1"]
    for key in (SigningKey.generate(), fleet.director, fleet.receipt_key):
        sealed = envelope.seal("status", encode(board.status()), key)
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), sealed)
    assert fleet.refusals() == {("edge-1", "envelope.key_unknown"): 3}
