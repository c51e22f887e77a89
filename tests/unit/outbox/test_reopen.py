"""A new epoch in a store whose numbers are taken: nothing is lost, no number is used twice, the chain holds."""

from __future__ import annotations

import json

import pytest

from garrison_agent.adapters.database import Database
from garrison_agent.outbox.journal import MAX_ENTRY_BYTES, REPEATED_AT_ONCE, SEGMENT_KIND, Journal
from garrison_protocol import chain
from garrison_protocol.chain import Entry
from garrison_protocol.errors import InsufficientError
from garrison_protocol.messages.anchor import Committed
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.states import Stream
from tests.unit.outbox.conftest import DEVICE

AUDIT, TELEMETRY = Stream.AUDIT, Stream.TELEMETRY
THEIRS = {"audit": Committed(epoch="f" * 16, seq=40, hash="4" * 64)}


def chained(journal: Journal) -> list[dict[str, object]]:
    """Return the headers of the present audit epoch, each checked as the controller does."""
    epoch = journal.heads()["audit"].epoch
    previous, headers, after = chain.genesis(DEVICE, "audit", epoch), [], 0
    while (batch := journal.batch(AUDIT, after)) is not None:
        for row in batch.rows:
            after += 1
            entry = Entry(after, chain.header_hash(row.header), row.header, row.body, row.salt)
            assert chain.check(entry, device=DEVICE, epoch=epoch, seq=after, previous=previous) is None
            previous = entry.hash
            headers.append(json.loads(row.header))
    return headers


def repeat_all(journal: Journal) -> None:
    while journal.repeat():
        pass
    assert not journal.repeating


def test_what_no_receipt_covers_goes_again_under_new_numbers(journal: Journal) -> None:
    entries = [journal.append(AUDIT, "model.loaded", {"alias": "chat"}, {"number": at}) for at in range(5)]
    sample = journal.append(TELEMETRY, "sample", {"cpu_permille": 7})
    before = journal.heads()["audit"]
    acked = entries[1]
    receipt = Receipt(device=DEVICE, stream=AUDIT, epoch=before.epoch, up_to=acked.seq, hash=acked.hash)
    journal.acknowledge(receipt)
    assert journal.reopen("older_store", THEIRS) == 4
    repeat_all(journal)
    opened, *again = chained(journal)
    assert (opened["y"], opened["reason"]) == ("epoch.opened", "older_store")
    assert (opened["audit_before"], opened["audit_last"], opened["audit_hash"]) == (before.epoch, 6, entries[4].hash)
    assert opened["controller_audit"] == f"{'f' * 16}/40/{'4' * 64}"
    assert [(one["again"], one["was"]) for one in again] == [
        (f"{before.epoch}/{entry.seq}", entry.hash) for entry in entries[2:]
    ]
    batch = journal.batch(TELEMETRY, 0)
    assert batch is not None
    assert [json.loads(row.header)["again"] for row in batch.rows] == [f"{before.epoch}/{sample.seq}"]
    assert journal.earlier == (before.epoch, "f" * 16)


def test_the_old_audit_rows_stay_and_the_store_opens_again(database: Database, journal: Journal) -> None:
    old = journal.heads()["audit"]
    journal.reopen("older_store", THEIRS)
    (kept,) = database.connection.execute("SELECT count(*) FROM entry WHERE epoch = ?", (old.epoch,)).fetchone()
    assert kept == old.seq
    again = Journal(database, DEVICE, now_ms=lambda: 0)
    again.append(AUDIT, "agent.started", {})
    assert chained(again)[-1]["y"] == "agent.started"


def test_many_rows_and_the_largest_one(journal: Journal) -> None:
    journal.append(AUDIT, "large", {}, "x" * (MAX_ENTRY_BYTES - 400))
    for number in range(REPEATED_AT_ONCE * 2):
        journal.append(AUDIT, "many", {"number": number})
    rows = journal.heads()["audit"].seq
    assert journal.reopen("older_store", THEIRS) == rows
    repeat_all(journal)
    assert [one["number"] for one in chained(journal) if one["y"] == "many"] == list(range(REPEATED_AT_ONCE * 2))


def test_half_a_new_epoch_is_never_kept(database: Database, journal: Journal) -> None:
    before = journal.heads()

    def cut_off() -> None:
        with database.transaction():
            journal.reopen("older_store", THEIRS)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cut_off()
    assert journal.heads() == before
    journal.append(AUDIT, "agent.started", {})
    assert chained(journal)[-1]["y"] == "agent.started"


def test_thinning_tells_epochs_apart(journal: Journal) -> None:
    for number in range(20):
        journal.append(AUDIT, SEGMENT_KIND, {"number": number}, [number])
    old = journal.heads()["audit"].epoch
    journal.reopen("older_store", {})
    repeat_all(journal)
    assert journal.thin(telemetry_rows=1000, segment_bodies=10) == 31
    thinned = [one for one in chained(journal) if one["y"] == "audit.thinned"]
    assert [(one.get("epoch"), one["bodies"]) for one in thinned] == [(old, 20), (None, 11)]


def test_rows_go_on_to_be_repeated_where_a_process_before_stopped(database: Database, journal: Journal) -> None:
    for number in range(REPEATED_AT_ONCE * 2):
        journal.append(AUDIT, "many", {"number": number})
    sample = journal.append(TELEMETRY, "sample", {"cpu_permille": 7})
    first = journal.heads()["audit"]
    journal.reopen("older_store", THEIRS)
    assert journal.repeat()
    second = journal.heads()["audit"].epoch
    after = Journal(database, DEVICE, now_ms=lambda: 0)
    after.append(AUDIT, "meanwhile", {})
    after.reopen("older_store", THEIRS)  # what is not repeated yet is not forgotten over it
    repeat_all(after)
    again = {str(one["again"]) for one in chained(after) if one["y"] == "many"}
    rest = range(REPEATED_AT_ONCE + 1, first.seq + 1)
    assert {f"{first.epoch}/{number}" for number in rest} <= again
    assert len(again) == REPEATED_AT_ONCE * 2
    assert all(place.startswith((first.epoch, second)) for place in again)
    batch = after.batch(TELEMETRY, 0)
    assert batch is not None
    assert [json.loads(row.header)["was"] for row in batch.rows] == [sample.hash]


def test_what_goes_again_leaves_room_to_decisions(database: Database, journal: Journal) -> None:
    journal.reopen("older_store", THEIRS)
    before = journal.heads()
    database.ballast.held, database.ballast._free = True, lambda _: 0
    with pytest.raises(InsufficientError, match=r"disk\.full"):
        journal.repeat()
    assert (journal.heads(), journal.repeating) == (before, True)
