"""What the broker brings: desired state, receipts, notices, and whatever else somebody may send."""

from __future__ import annotations

import json

from garrison_agent.events import Tick
from garrison_protocol import topics
from garrison_protocol.envelope import seal
from garrison_protocol.errors import RefusedError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired
from garrison_protocol.states import Freshness, KeyPurpose, Stream
from tests.unit.loop.rig import DEVICE, DIRECTOR, FLEET, RECEIPTS, Rig, entry, fleet_json, package

DESIRED = topics.down(DEVICE, topics.Down.DESIRED)


def test_lower_counters_are_refused_counted_and_recorded(rig: Rig) -> None:
    rig.connect()
    rig.desire(entry(package().ref), counter=5)
    rig.desire(counter=4)
    rig.forward(1)
    assert rig.parts.inbound.applied.counter == 5
    assert rig.parts.inbound.refused == {"desired.counter_not_newer": 1}
    assert rig.headers("desired.refused")[0]["code"] == "desired.counter_not_newer"
    assert rig.reports()[-1].refused == {"desired.counter_not_newer": 1}


def test_a_repeated_desired_state_changes_nothing(rig: Rig) -> None:
    rig.connect()
    envelope = rig.desire(entry(package().ref))
    rig.settle()
    before = rig.audit()
    rig.receive(DESIRED, envelope)
    rig.settle()
    assert rig.audit() == before


def test_two_desired_states_with_one_counter_are_an_alarm(rig: Rig) -> None:
    rig.connect()
    rig.desire(entry(package("1.0").ref), counter=3)
    rig.desire(entry(package("2.0").ref), counter=3)
    rig.settle()
    assert "alarm.desired_conflict" in rig.audit()
    assert rig.slot.package == package("1.0").ref


def test_another_boards_desired_state_is_refused(rig: Rig) -> None:
    rig.connect()
    other = seal("desired", encode(Desired(device="edge-2", counter=9, aliases=())), DIRECTOR)
    rig.receive(DESIRED, other)
    rig.receive(topics.down("edge-2", topics.Down.DESIRED), other)
    rig.settle()
    assert rig.parts.inbound.refused == {"message.misaddressed": 2}
    assert rig.parts.inbound.applied.counter == 0


def test_a_stranger_signs_nothing_here(rig: Rig) -> None:
    rig.connect()
    rig.desire(entry(package().ref), key=SigningKey.generate())
    rig.desire(entry(package().ref), key=RECEIPTS)
    rig.settle()
    assert rig.parts.inbound.applied.counter == 0
    assert rig.parts.inbound.refused["envelope.key_unknown"] >= 1


def test_a_director_key_newer_than_our_fleet_is_looked_up(rig: Rig) -> None:
    rig.connect()
    newer = rig.director = SigningKey.generate()
    rig.work.fleet = fleet_json((KeyPurpose.DIRECTOR, newer), (KeyPurpose.RECEIPT, RECEIPTS))
    rig.work.version += 1
    rig.desire(entry(package().ref), key=newer)
    rig.settle()
    assert rig.parts.inbound.applied.counter == 1
    assert rig.parts.inbound.refused == {}


def test_desired_state_before_the_first_metadata_waits_for_it(rig: Rig) -> None:
    rig.work.offline_now = True
    assert rig.parts.trust.fleet is not None  # the fake keeps some; pretend this board never saw any
    rig.parts.trust.fleet = None
    rig.connect()
    rig.parts.trust.fleet = None
    rig.desire(entry(package().ref))
    rig.settle()
    rig.work.offline_now = False
    rig.connect()
    assert rig.parts.inbound.applied.counter == 1


def test_rubbish_never_ends_the_agent(rig: Rig) -> None:
    rig.connect()
    payloads = [b"", b"{}", b"\xff" * 100, b"[" * 5000, b"x" * 600_000, seal("status", b"{}", DIRECTOR)]
    for topic in (DESIRED, topics.down(DEVICE, topics.Down.RECEIPT), topics.up(DEVICE, topics.Up.STATUS), "a/b", "#"):
        for payload in payloads:
            rig.receive(topic, payload)
    rig.settle()
    counts = rig.parts.inbound.refused
    assert sum(counts.values()) == 5 * len(payloads) - 1
    assert {"envelope.malformed", "envelope.too_large", "topic.unknown", "topic.unexpected"} <= set(counts)
    assert rig.audit().count("message.refused") <= len(counts)
    rig.restart()
    assert sum(rig.parts.inbound.refused.values()) > 0


def test_what_has_no_bytes_or_is_beyond_all_numbers_never_ends_the_agent(rig: Rig) -> None:
    rig.connect()
    outer = {"payloadType": "\ud800", "payload": "", "signatures": [{"keyid": DIRECTOR.key_id, "sig": ""}]}
    rig.receive(DESIRED, json.dumps(outer).encode())
    digest = "0" * 64
    alias = {"alias": "chat", "package": {"name": "chat", "version": "1", "manifest_sha256": digest}, "rollout": "r"}
    for body in (
        {"device": DEVICE, "counter": 2**60, "aliases": []},
        {"device": DEVICE, "counter": 1, "aliases": [{**alias, "soak_s": float("inf")}]},
        {"device": DEVICE, "counter": 1, "aliases": [{**alias, "limits": {"max_rss_mb": float("inf")}}]},
    ):
        rig.receive(DESIRED, seal("desired", json.dumps(body).encode(), DIRECTOR))
    epoch = rig.parts.journal.heads()["audit"].epoch
    receipt = {"device": DEVICE, "stream": "audit", "epoch": epoch, "up_to": 2**60, "hash": digest}
    rig.receive(topics.down(DEVICE, topics.Down.RECEIPT), seal("receipt", json.dumps(receipt).encode(), RECEIPTS))
    rig.settle()
    assert rig.parts.inbound.refused == {"envelope.malformed": 1, "message.malformed": 4}
    rig.restart()
    assert rig.parts.inbound.applied.counter == 0


def test_a_flood_on_a_full_disk_never_ends_the_agent(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package(), "r1")
    for batch in rig.batches(Stream.AUDIT):
        rig.receipt(batch)
    (pages,) = rig.database.connection.execute("PRAGMA page_count").fetchone()
    rig.database.connection.execute(f"PRAGMA max_page_count = {pages}")
    desired = rig.parts.inbound.applied
    for number in range(100):
        rig.clock.forward(61)  # each would be recorded
        rig.receive(DESIRED, b"{}")
        rig.desire(entry(package().ref, "r1"), counter=100 + number)
        rig.inbox.put(Tick.HEARTBEAT)
        rig.settle()
    assert rig.parts.inbound.refused["envelope.malformed"] == 100
    assert rig.parts.inbound.applied != desired  # as long as there was room
    assert rig.parts.inbound.applied.counter < 199
    rig.database.connection.execute("PRAGMA max_page_count = 100000")
    rig.desire(entry(package().ref, "r1"), counter=200)
    rig.settle()
    assert rig.parts.inbound.applied.counter == 200


def test_a_fleet_file_of_a_newer_garrison_ends_nothing(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.work.fleet = FLEET.replace(b'"schema_version":"1.0"', b'"schema_version":"2.0"')
    rig.parts.trust.refresh()
    rig.settle()
    assert rig.headers("metadata.refused")[-1]["code"] == "fleet.malformed"
    rig.deploy(package("2.0"), "r2")
    assert (rig.state, rig.slot.error_code) == ("FAILED", "fleet.malformed")
    rig.restart()
    assert rig.models.running == ["chat:1.0"]
    assert rig.parts.trust.fleet is not None


def test_a_controller_that_answers_nothing_for_hours_leaves_a_handful_of_timers(rig: Rig) -> None:
    rig.connect()
    rig.forward(1)
    for batch in rig.batches(Stream.AUDIT):
        rig.receipt(batch)
    for stream in (Stream.TELEMETRY, Stream.AUDIT):  # so that the second stream in line times out first
        rig.parts.journal.append(stream, "sample", {"cpu_permille": 1})
        rig.inbox.put(Tick.PUMP)
        rig.forward(3)
    sent = len(rig.link.sent)
    for _ in range(60):
        rig.forward(60)
    assert len(rig.link.sent) > sent + 10
    count = 0
    while (rest := rig.parts.timers.next_s()) is not None:
        rig.clock.forward(rest)
        rig.parts.timers.due()
        count += 1
    assert count < 6


def test_rows_are_kept_until_a_signed_receipt_covers_them(rig: Rig) -> None:
    rig.connect()
    batch = rig.batches(Stream.AUDIT)[-1]
    pending = rig.parts.journal.pending()["audit"]
    forged = batch.model_copy()
    rig.receive(topics.down(DEVICE, topics.Down.RECEIPT), seal("receipt", b"{}", BOARD_STRANGER))
    rig.settle()
    assert rig.parts.journal.pending()["audit"] >= pending
    rig.receipt(forged)
    assert rig.parts.journal.heads()["audit"].acked == batch.first + len(batch.rows) - 1


BOARD_STRANGER = SigningKey.generate()


def test_nothing_is_lost_or_sent_out_of_order_over_a_reconnect(rig: Rig) -> None:
    rig.connect()
    first = rig.batches(Stream.AUDIT)[-1]
    rig.receipt(first)
    rig.disconnect()
    rig.deploy(package("1.0"), "r1")
    rig.link.sent.clear()
    rig.connect()
    batches = rig.batches(Stream.AUDIT)
    numbers = [batch.first + index for batch in batches for index in range(len(batch.rows))]
    assert numbers == list(range(first.first + len(first.rows), numbers[-1] + 1))


def test_a_link_that_takes_nothing_now_gets_it_later(rig: Rig) -> None:
    rig.connect()
    rig.link.room = 0
    rig.deploy(package("1.0"), "r1")
    sent = len(rig.link.sent)
    rig.link.room = 1000
    rig.forward(1)
    assert len(rig.link.sent) > sent
    assert rig.reported().state.value == "ACTIVE"


def test_at_most_two_reports_a_second(rig: Rig) -> None:
    rig.connect()
    rig.forward(1)
    before = len(rig.reports())
    rig.deploy(package("1.0"), "r1", soak_s=5)
    assert len(rig.reports()) - before <= 14
    revisions = [report.revision for report in rig.reports()]
    assert revisions == sorted(revisions)


def test_connection_numbers_and_revisions_grow_over_a_kill(rig: Rig) -> None:
    rig.connect()
    connection, revision = rig.statuses()[-1].connection, rig.reports()[-1].revision
    rig.restart()
    rig.connect()
    assert rig.statuses()[-1].connection > connection
    rig.deploy(package("1.0"), "r1")
    assert rig.reports()[-1].revision > revision


def test_status_tells_what_is_applied_and_trusted(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.forward(1)
    status = rig.statuses()[-1]
    assert status.online
    assert status.desired_counter == 1
    assert status.desired_sha256 == rig.parts.inbound.applied.sha256
    assert status.registry.freshness is Freshness.FRESH
    assert status.heads["audit"].seq > 0


def test_refused_metadata_is_recorded_and_stale_metadata_stops_installs_only(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.work.refusal = RefusedError("registry.expired", "timestamp has expired")
    rig.deploy(package("2.0"), "r2")
    assert rig.headers("metadata.refused")[0]["code"] == "registry.expired"
    assert rig.slot.state.value == "WAITING"
    assert rig.slot.wait is not None
    assert rig.slot.wait.value == "metadata_stale"
    assert rig.models.running == ["chat:1.0"]
    rig.work.refusal = None
    rig.forward(30)
    assert rig.models.running == ["chat:2.0"]


def test_an_orderly_end_says_goodbye(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.owner.stop("SIGTERM")
    assert rig.audit()[-1] == "agent.stopped"
    last = rig.statuses()[-1]
    assert (last.online, last.connection) == (False, rig.parts.numbers.current)
    assert rig.models.running == []
    assert rig.link.stopped
    assert "STOPPING=1" in rig.notified


def test_a_check_that_had_begun_before_the_rotation_does_not_settle_what_came_after_it(rig: Rig) -> None:
    new = SigningKey.generate()
    rig.work.publish(package())
    rig.connect()
    rig.parts.trust.refresh()
    begun = rig.jobs.pop()
    rig.desire(entry(package().ref), key=new)
    while not rig.inbox.empty():
        rig.owner.handle(rig.inbox.get())
    begun()  # with the fleet.json of before
    rig.director = new
    rig.work.fleet = fleet_json((KeyPurpose.DIRECTOR, new), (KeyPurpose.RECEIPT, RECEIPTS))
    rig.settle()
    assert (rig.parts.inbound.applied.counter, rig.parts.inbound.refused) == (1, {})
