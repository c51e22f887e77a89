from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest

from garrison_agent.adapters.database import Database
from garrison_agent.outbox.journal import MAX_ENTRY_BYTES, SEGMENT_KIND, Journal, ReceiptOutcome
from garrison_protocol import chain
from garrison_protocol.envelope import MAX_ENVELOPE_BYTES, seal
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.streams import Batch, Receipt
from garrison_protocol.states import Stream
from tests.unit.outbox.conftest import DEVICE

AUDIT, TELEMETRY = Stream.AUDIT, Stream.TELEMETRY


def receipt(journal: Journal, stream: Stream, up_to: int, digest: str | None, **more: object) -> Receipt:
    epoch = journal.heads()[stream.value].epoch
    return Receipt.model_validate(
        {"device": DEVICE, "stream": stream, "epoch": epoch, "up_to": up_to, "hash": digest, **more}
    )


def all_rows(journal: Journal, stream: Stream) -> list[tuple[int, str]]:
    """What a controller that takes every batch in turn would hold."""
    rows: list[tuple[int, str]] = []
    after = 0
    while (batch := journal.batch(stream, after)) is not None:
        rows += [(batch.first + index, row.header) for index, row in enumerate(batch.rows)]
        after = rows[-1][0]
    return rows


def audit_kinds(journal: Journal) -> list[str]:
    return [json.loads(header)["y"] for _, header in all_rows(journal, AUDIT)]


def test_a_new_store_opens_an_epoch_with_a_chained_entry(journal: Journal) -> None:
    head = journal.heads()["audit"]
    batch = journal.batch(AUDIT, 0)
    assert batch is not None
    assert (batch.first, batch.epoch, batch.dropped) == (1, head.epoch, 0)
    header = json.loads(batch.rows[0].header)
    assert header["y"] == "epoch.opened"
    assert header["p"] == chain.genesis(DEVICE, "audit", head.epoch)
    assert journal.heads()["telemetry"].seq == 0
    assert journal.batch(TELEMETRY, 0) is None


def test_audit_rows_are_chained_and_telemetry_rows_are_not(journal: Journal) -> None:
    for number in range(5):
        journal.append(AUDIT, "model.loaded", {"alias": "chat"}, {"number": number})
        journal.append(TELEMETRY, "sample", {"cpu_permille": number})
    head = journal.heads()["audit"]
    previous = chain.genesis(DEVICE, "audit", head.epoch)
    batch = journal.batch(AUDIT, 0)
    assert batch is not None
    for seq, row in enumerate(batch.rows, start=1):
        entry = chain.Entry(seq, chain.header_hash(row.header), row.header, row.body, row.salt)
        assert chain.check(entry, device=DEVICE, epoch=head.epoch, seq=seq, previous=previous) is None
        previous = entry.hash
    assert previous == head.hash
    telemetry = journal.batch(TELEMETRY, 0)
    assert telemetry is not None
    assert all("p" not in json.loads(row.header) for row in telemetry.rows)


def test_numbers_and_epoch_go_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    database = Database(path)
    before = Journal(database, DEVICE, now_ms=lambda: 1)
    before.append(AUDIT, "agent.started", {})
    heads = before.heads()
    database.close()
    database = Database(path)
    after = Journal(database, DEVICE, now_ms=lambda: 1)
    assert after.heads() == heads
    assert after.append(AUDIT, "agent.started", {}).seq == heads["audit"].seq + 1
    database.close()


def test_the_entry_table_can_be_read_from_outside_while_the_agent_holds_it(
    database: Database, journal: Journal
) -> None:
    appended = journal.append(TELEMETRY, "sample", {"cpu_permille": 1})
    outside = sqlite3.connect(f"file:{database.path}?mode=ro", uri=True)
    try:
        rows = outside.execute("SELECT epoch, seq, hash FROM entry WHERE stream = 'telemetry'").fetchall()
    finally:
        outside.close()
    assert rows == [(journal.heads()["telemetry"].epoch, 1, appended.hash)]


def test_a_rolled_back_append_leaves_no_trace(database: Database, journal: Journal) -> None:
    heads = journal.heads()

    def half_a_decision() -> None:
        with database.transaction():
            journal.append(AUDIT, "model.loaded", {"alias": "chat"})
            raise KeyError

    with pytest.raises(KeyError):
        half_a_decision()
    assert journal.heads() == heads
    assert journal.append(AUDIT, "model.unloaded", {}).seq == heads["audit"].seq + 1


def test_rows_leave_only_after_their_commit(database: Database, journal: Journal) -> None:
    with database.transaction():
        journal.append(AUDIT, "model.loaded", {})
        with pytest.raises(RuntimeError, match="transaction"):
            journal.batch(AUDIT, 0)
    assert journal.batch(AUDIT, 1) is not None


def test_a_group_of_appends_costs_one_commit(database: Database, journal: Journal) -> None:
    statements: list[str] = []
    database.connection.set_trace_callback(statements.append)
    with database.transaction():
        for number in range(50):
            journal.append(TELEMETRY, "sample", {"cpu_permille": number})
    database.connection.set_trace_callback(None)
    assert statements.count("COMMIT") == 1
    assert sum(statement.startswith("BEGIN") for statement in statements) == 1


def test_another_boards_store_is_refused(database: Database, journal: Journal) -> None:
    with pytest.raises(ConflictError, match=r"journal\.other_device"):
        Journal(database, "edge-2", now_ms=lambda: 1)


def test_a_store_whose_newest_entry_was_removed_is_refused(database: Database, journal: Journal) -> None:
    journal.append(AUDIT, "model.loaded", {})
    database.connection.execute("DELETE FROM entry WHERE stream = 'audit' AND seq = 2")
    with pytest.raises(GarrisonError, match=r"journal\.damaged"):
        Journal(database, DEVICE, now_ms=lambda: 1)


def test_too_large_an_entry_is_refused_and_changes_nothing(journal: Journal) -> None:
    heads = journal.heads()
    with pytest.raises(InvalidError, match=r"journal\.entry_too_large"):
        journal.append(AUDIT, "model.loaded", {}, "x" * MAX_ENTRY_BYTES)
    assert journal.heads() == heads


@pytest.mark.parametrize("character", ["\\", '"', "\n", "\x01", "é", "\U0001f600"])
def test_sealed_batches_stay_below_the_envelope_limit_whatever_they_hold(journal: Journal, character: str) -> None:
    size = len(json.dumps(character, ensure_ascii=False).encode()) - 2
    longest = character * ((MAX_ENTRY_BYTES - 1000) // size)
    for length in (len(longest), len(longest) // 2, len(longest) // 7, 3, len(longest)):
        journal.append(AUDIT, SEGMENT_KIND, {}, longest[:length])
    _seal_all(journal, AUDIT)


def test_sealed_batches_stay_below_the_envelope_limit_when_nothing_compresses(journal: Journal) -> None:
    for _ in range(12):
        # Every byte of it random, so that deflate gains as little as text allows.
        noise = os.urandom(150_000).translate(bytes(33 + value % 94 for value in range(256))).decode()
        journal.append(AUDIT, SEGMENT_KIND, {}, noise[: (MAX_ENTRY_BYTES - 6000) * 9 // 10])
    batches = _seal_all(journal, AUDIT)
    assert len(batches) > 1


def _seal_all(journal: Journal, stream: Stream) -> list[Batch]:
    key = SigningKey.generate()
    batches = []
    after = 0
    while (batch := journal.batch(stream, after)) is not None:
        assert batch.first == after + 1
        assert len(seal("audit", encode(batch), key)) <= MAX_ENVELOPE_BYTES
        after = batch.first + len(batch.rows) - 1
        batches.append(batch)
    assert after == journal.heads()[stream.value].seq
    return batches


def test_a_batch_keeps_its_bounds_but_always_makes_progress(journal: Journal) -> None:
    for number in range(20):
        journal.append(TELEMETRY, "sample", {"cpu_permille": number})
    by_rows = journal.batch(TELEMETRY, 0, max_bytes=10**6, max_rows=7)
    assert by_rows is not None
    assert len(by_rows.rows) == 7
    by_bytes = journal.batch(TELEMETRY, 7, max_bytes=700, max_rows=100)
    assert by_bytes is not None
    assert by_bytes.first == 8
    assert 1 < len(by_bytes.rows) < 6
    assert len(encode(by_bytes)) < 900
    least = journal.batch(TELEMETRY, 7, max_bytes=1, max_rows=100)
    assert least is not None
    assert len(least.rows) == 1


def test_receipts_advance_repeat_and_keep_acknowledged_audit_rows(journal: Journal) -> None:
    entries = [journal.append(AUDIT, "model.loaded", {"nr": number}) for number in range(3)]
    assert journal.pending() == {"audit": 4, "telemetry": 0}
    covering = receipt(journal, AUDIT, 3, entries[1].hash)
    assert journal.acknowledge(covering) is ReceiptOutcome.ADVANCED
    assert journal.acknowledge(covering) is ReceiptOutcome.REPEATED
    assert journal.acknowledge(receipt(journal, AUDIT, 2, entries[0].hash)) is ReceiptOutcome.REPEATED
    assert journal.pending()["audit"] == 1
    assert journal.heads()["audit"].acked == 3
    assert len(all_rows(journal, AUDIT)) == 4


def test_a_request_to_resend_is_told_and_never_takes_an_acknowledgement_back(journal: Journal) -> None:
    entries = [journal.append(AUDIT, "model.loaded", {}) for _ in range(3)]
    journal.acknowledge(receipt(journal, AUDIT, 4, entries[2].hash))
    assert journal.acknowledge(receipt(journal, AUDIT, 0, None, resend=True)) is ReceiptOutcome.RESEND
    assert journal.acknowledge(receipt(journal, AUDIT, 2, entries[0].hash, resend=True)) is ReceiptOutcome.RESEND
    assert journal.heads()["audit"].acked == 4


def test_a_receipt_of_another_epoch_is_ignored(journal: Journal) -> None:
    other = receipt(journal, AUDIT, 1, "0" * 64, epoch="0" * 16)
    assert journal.acknowledge(other) is ReceiptOutcome.WRONG_EPOCH
    assert audit_kinds(journal) == ["epoch.opened"]


@pytest.mark.parametrize(("up_to", "digest"), [(99, "a" * 64), (2, "a" * 64), (2, None), (1, "a" * 64)])
def test_a_false_receipt_is_an_alarm_recorded_once(journal: Journal, up_to: int, digest: str | None) -> None:
    journal.append(AUDIT, "model.loaded", {})
    false = receipt(journal, AUDIT, up_to, digest)
    for _ in range(3):  # the alarm itself is sent, and draws the same receipt again
        assert journal.acknowledge(false) is ReceiptOutcome.ALARM
    assert audit_kinds(journal) == ["epoch.opened", "model.loaded", "alarm.receipt"]
    assert journal.heads()["audit"].acked == 0
    another = receipt(journal, AUDIT, 500, "b" * 64)
    assert journal.acknowledge(another) is ReceiptOutcome.ALARM
    assert audit_kinds(journal).count("alarm.receipt") == 2


def test_an_alarm_survives_acknowledged_rows_too(journal: Journal) -> None:
    entry = journal.append(AUDIT, "model.loaded", {})
    journal.acknowledge(receipt(journal, AUDIT, 2, entry.hash))
    assert journal.acknowledge(receipt(journal, AUDIT, 2, "c" * 64)) is ReceiptOutcome.ALARM


def test_thinning_drops_the_oldest_telemetry_and_signs_how_much(journal: Journal) -> None:
    rows = [journal.append(TELEMETRY, "sample", {"cpu_permille": number}) for number in range(100)]
    journal.acknowledge(receipt(journal, TELEMETRY, 30, rows[29].hash))
    assert journal.thin(telemetry_rows=100) == 0
    assert journal.thin(telemetry_rows=50) == 55
    assert [seq for seq, _ in all_rows(journal, TELEMETRY)] == list(range(56, 101))
    thinned = json.loads(all_rows(journal, AUDIT)[-1][1])
    assert {key: thinned[key] for key in ("y", "rows", "unsent", "first", "last")} == {
        "y": "telemetry.thinned",
        "rows": 55,
        "unsent": 25,
        "first": 1,
        "last": 55,
    }
    assert journal.pending()["telemetry"] == 45
    batch = journal.batch(TELEMETRY, 30)
    assert batch is not None
    assert (batch.first, batch.dropped) == (56, 25)
    assert journal.append(TELEMETRY, "sample", {"cpu_permille": 1}).seq == 101


def test_a_receipt_for_rows_thinned_on_the_way_is_no_alarm(journal: Journal) -> None:
    rows = [journal.append(TELEMETRY, "sample", {"cpu_permille": number}) for number in range(10)]
    journal.thin(telemetry_rows=2)
    assert journal.acknowledge(receipt(journal, TELEMETRY, 5, rows[4].hash)) is ReceiptOutcome.ADVANCED


def test_everything_thinned_still_leaves_the_numbers_growing(journal: Journal) -> None:
    for number in range(10):
        journal.append(TELEMETRY, "sample", {"cpu_permille": number})
    assert journal.thin(telemetry_rows=0) == 10
    assert journal.batch(TELEMETRY, 0) is None
    assert journal.append(TELEMETRY, "sample", {"cpu_permille": 0}).seq == 11


def test_a_batch_ends_where_rows_are_missing(database: Database, journal: Journal) -> None:
    for number in range(6):
        journal.append(TELEMETRY, "sample", {"cpu_permille": number})
    database.connection.execute("DELETE FROM entry WHERE stream = 'telemetry' AND seq IN (3, 4)")
    batches = [journal.batch(TELEMETRY, after) for after in (0, 2)]
    assert [(batch.first, len(batch.rows), batch.dropped) for batch in batches if batch] == [(1, 2, 0), (5, 2, 2)]


def test_bodies_of_inference_segments_go_and_the_chain_still_verifies(journal: Journal) -> None:
    journal.append(AUDIT, "model.loaded", {}, {"kept": True})
    for number in range(10):
        journal.append(AUDIT, SEGMENT_KIND, {"count": 1}, {"number": number})
    assert journal.thin(telemetry_rows=10, segment_bodies=10) == 0
    assert journal.thin(telemetry_rows=10, segment_bodies=5) == 6
    batch = journal.batch(AUDIT, 0)
    assert batch is not None
    previous = chain.genesis(DEVICE, "audit", batch.epoch)
    for seq, row in enumerate(batch.rows, start=1):
        entry = chain.Entry(seq, chain.header_hash(row.header), row.header, row.body, row.salt)
        assert chain.check(entry, device=DEVICE, epoch=batch.epoch, seq=seq, previous=previous) is None
        previous = entry.hash
    assert sum(row.body is not None for row in batch.rows) == 1 + 4
    assert batch.rows[1].body is not None
    assert json.loads(batch.rows[-1].header)["bodies"] == 6
