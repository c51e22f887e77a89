"""Asking for anchors, holding what waits for one, and keeping the time that they tell."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from garrison_agent.api.commands import Doctor, GetStatus, LoadModel
from garrison_agent.cli.stored_trust import read_trust
from garrison_agent.core.time_floor import BUILD_S
from garrison_agent.events import Tick
from garrison_agent.outbox.journal import REPEATED_AT_ONCE, Journal
from garrison_agent.owner.anchor import RETRY_S
from garrison_agent.owner.repeats import EVERY_S
from garrison_agent.owner.timekeeper import STORE_EVERY_S
from garrison_protocol.envelope import unseal
from garrison_protocol.errors import InsufficientError, RefusedError, UnavailableError
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import Lease
from garrison_protocol.messages.anchor import Committed
from garrison_protocol.messages.report import Status
from garrison_protocol.states import Freshness, KeyPurpose, Stream
from tests.fakes.packages import Package
from tests.unit.loop.rig import BOARD, DIRECTOR, RECEIPTS, Rig, entry, fleet_json, package

DAY_S = 86_400.0


def stored(rig: Rig) -> dict[str, float]:
    text = rig.database.get("time.floor")
    return {} if text is None else dict(json.loads(text))


def leased(days: float, on_expiry: str) -> Package:
    made = package("1.0")
    lease = Lease.model_validate({"days": days, "on_expiry": on_expiry})
    return Package(made.manifest.model_copy(update={"lease": lease}), made.blobs)


def test_it_asks_at_every_connect_with_a_new_nonce(rig: Rig) -> None:
    rig.connect()
    rig.disconnect()
    rig.connect()
    nonces = {json.loads(unseal(one, lambda _: DIRECTOR.public_hex).body)["nonce"] for one in rig.answers}
    assert len(nonces) == 2
    assert rig.parts.inbound.refused == {}


def test_it_asks_again_slower_and_slower(rig: Rig) -> None:
    rig.controller_silent = True
    rig.connect()
    asked = rig.asked
    rig.forward(RETRY_S)
    assert rig.asked == asked + 1
    rig.forward(RETRY_S)
    assert rig.asked == asked + 1
    rig.forward(RETRY_S)
    assert rig.asked == asked + 2
    rig.controller_silent = False
    rig.forward(4 * RETRY_S)
    assert rig.parts.timekeeper.anchored_at is not None


def test_the_newest_of_what_waits_is_taken(rig: Rig) -> None:
    rig.controller_silent = True
    rig.connect()
    rig.signed_counter = 2
    rig.desire(entry(package("1.0").ref, "r1"), counter=2)
    rig.desire(entry(package("2.0").ref, "r2"), counter=3)
    rig.desire(entry(package("1.0").ref, "r1"), counter=1)
    rig.settle()
    assert (rig.parts.inbound.applied.counter, rig.parts.inbound.held) == (0, 3)
    rig.controller_silent = False
    rig.forward(RETRY_S)
    assert (rig.parts.inbound.applied.counter, rig.parts.inbound.held) == (3, None)


def test_rows_wait_for_the_anchor_but_not_for_ever(rig: Rig) -> None:
    rig.controller_silent = True
    rig.connect()
    assert rig.batches(Stream.AUDIT) == []
    assert {head.seq for status in rig.statuses() for head in status.heads.values()} == {0}
    rig.forward(31)
    assert rig.batches(Stream.AUDIT) != []
    assert rig.statuses()[-1].heads["audit"].seq > 0


def test_a_death_names_the_store_that_dies(rig: Rig) -> None:
    rig.connect()
    death = Status.model_validate_json(unseal(rig.parts.uplink.will(), lambda _: BOARD.public_hex).body)
    assert death.heads["audit"].epoch == rig.parts.journal.heads()["audit"].epoch


def test_an_anchor_by_a_key_of_newer_metadata_is_taken_once_that_came(rig: Rig) -> None:
    newer = rig.director = SigningKey.generate()
    rig.work.fleet = fleet_json((KeyPurpose.DIRECTOR, newer), (KeyPurpose.RECEIPT, RECEIPTS))
    rig.work.version += 1
    rig.connect()
    assert rig.parts.anchors.last_signer == newer.key_id
    assert rig.parts.inbound.refused == {}


def test_the_floor_is_stored_seldom_and_at_the_end(rig: Rig) -> None:
    rig.connect()
    first = stored(rig)[DIRECTOR.key_id]
    assert first == rig.clock.wall_s
    for _ in range(10):
        rig.clock.forward(STORE_EVERY_S / 20)
        rig.disconnect()
        rig.connect()
        rig.owner.handle(Tick.THIN)
    assert stored(rig)[DIRECTOR.key_id] == first
    rig.clock.forward(STORE_EVERY_S)
    rig.owner.handle(Tick.THIN)
    assert stored(rig)[DIRECTOR.key_id] == first + 1.5 * STORE_EVERY_S
    rig.clock.forward(60)
    rig.owner.stop("SIGTERM")
    assert stored(rig)[DIRECTOR.key_id] == first + 1.5 * STORE_EVERY_S + 60


def test_a_board_that_never_heard_of_the_time_knows_when_it_was_built(rig: Rig) -> None:
    rig.clock.wall_s = 0.0
    assert rig.parts.trust.judge_at().timestamp() >= BUILD_S


def test_a_carried_answer_is_good_once_and_across_restarts(rig: Rig) -> None:
    rig.controller_silent = True
    nonce = rig.parts.anchors.carried_nonce()
    rig.restart()
    answer = rig.anchor(nonce)
    assert rig.parts.anchors.take(answer).nonce == nonce
    with pytest.raises(RefusedError, match=r"anchor\.nonce_unknown"):
        rig.parts.anchors.take(answer)


def test_a_newer_anchor_voids_a_carried_one(rig: Rig) -> None:
    answer = rig.anchor(rig.parts.anchors.carried_nonce())
    rig.connect()
    with pytest.raises(RefusedError, match=r"anchor\.nonce_unknown"):
        rig.parts.anchors.take(answer)


def test_the_anchor_of_an_offline_enrolment_is_the_first(rig: Rig) -> None:
    rig.controller_silent = True
    rig.signed_counter = 4
    rig.enrolment_anchor = ("ab" * 16, rig.anchor("ab" * 16))
    rig.parts.trust.refresh()
    rig.settle()
    assert rig.parts.anchors.lowest_counter == 4
    assert rig.parts.inbound.refused == {}


def test_a_lease_that_stops(rig: Rig) -> None:
    rig.connect()
    rig.deploy(leased(2, "stop"), "r1")
    rig.work.offline_now = True
    rig.clock.forward(3 * DAY_S)
    rig.owner.handle(Tick.HEARTBEAT)
    rig.settle()
    assert rig.models.running == []
    with pytest.raises(UnavailableError) as caught:
        rig.ask(LoadModel("chat")).result(0)
    assert (caught.value.code, caught.value.http_status) == ("model.lease_expired", 503)
    route = rig.parts.routes.table.find("chat")
    assert route is not None
    assert route.barred
    rig.restart()
    assert rig.models.running == []
    rig.connect()
    assert rig.reported().lease_expired
    assert rig.statuses()[-1].registry.freshness is Freshness.LEASE_EXPIRED
    rig.work.offline_now = False
    rig.work.refreshed_at = round(rig.clock.wall_s)
    rig.parts.trust.refresh()
    rig.forward(1)
    assert rig.models.running == ["chat:1.0"]
    assert not rig.reported().lease_expired
    assert [kind for kind in rig.audit() if kind.startswith("lease.")] == ["lease.ended", "lease.renewed"]


def test_doctor_and_status_say_what_is_trusted_and_refused(rig: Rig) -> None:
    rig.controller_silent = True
    rig.connect()
    rig.desire(entry(package("1.0").ref, "r1"))
    rig.settle()
    trust = rig.ask(GetStatus()).result(0)["trust"]  # type: ignore[index]
    assert trust["floor_source"] == "when this version was built, and time in operation since"
    assert [key["purpose"] for key in trust["keys"]] == ["director", "receipt"]
    assert trust["refuses"] == [
        "Desired state: this board's store is new, and the controller has not told yet how far the board had been. "
        "Number 1 waits."
    ]
    checks = rig.ask(Doctor()).result(0)
    assert [one["outcome"] for one in checks if one["name"] == "refuses"] == ["warn"]  # type: ignore[attr-defined]
    rig.controller_silent = False
    rig.forward(RETRY_S)
    trust = rig.ask(GetStatus()).result(0)["trust"]  # type: ignore[index]
    assert trust["floor_source"].startswith("an anchor signed by director key ")
    assert trust["refuses"] == []


def test_doctor_reads_the_store_while_the_agent_is_down(rig: Rig) -> None:
    rig.connect()
    rig.stop()
    view = read_trust(rig.config.database_path, 0.0)
    assert view is not None
    assert view["judged_at"] == int(rig.clock.wall_s)
    assert [key["purpose"] for key in view["keys"]] == ["director", "receipt"]
    assert any(sentence.startswith("New models: the clock says 1970-01-01") for sentence in view["refuses"])
    assert read_trust(rig.folder / "nothing.db", 0.0) is None
    rig.config.database_path.write_bytes(b"no database")
    assert read_trust(rig.config.database_path, 0.0) is None


def test_a_new_epoch_that_found_no_room_is_opened_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    head = rig.parts.journal.heads()["audit"]
    rig.streams = {"audit": Committed(epoch=head.epoch, seq=head.seq + 50, hash="4" * 64)}
    real = Journal.reopen

    def full(journal: Journal, reason: str, theirs: Mapping[str, Committed]) -> int:
        real(journal, reason, theirs)
        raise InsufficientError("disk.full", "no room", retryable=True)

    monkeypatch.setattr(Journal, "reopen", full)
    rig.connect()
    assert rig.parts.journal.heads()["audit"].epoch == head.epoch
    monkeypatch.undo()
    rig.forward(RETRY_S)
    assert rig.parts.journal.heads()["audit"].epoch != head.epoch
    assert rig.batches(Stream.AUDIT)[0].epoch != head.epoch


def test_an_anchor_that_found_no_room_changes_nothing_and_is_stored_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = rig.parts.journal.heads()["audit"]
    rig.streams = {"audit": Committed(epoch=head.epoch, seq=head.seq + 50, hash="4" * 64)}
    rig.signed_counter = 7
    before = rig.parts.anchors.lowest_counter, rig.parts.timekeeper.anchored_at, rig.database.get("desired.anchor")

    def full(journal: Journal, reason: str, theirs: Mapping[str, Committed]) -> int:
        raise InsufficientError("disk.full", "no room", retryable=True)

    monkeypatch.setattr(Journal, "reopen", full)
    rig.connect()
    now = rig.parts.anchors.lowest_counter, rig.parts.timekeeper.anchored_at, rig.database.get("desired.anchor")
    assert now == before
    monkeypatch.undo()
    rig.forward(RETRY_S)
    assert rig.parts.anchors.lowest_counter == 7
    rig.restart()
    assert rig.parts.anchors.lowest_counter == 7


def test_rows_of_the_old_epoch_go_again_a_few_at_a_time_and_across_restarts(rig: Rig) -> None:
    for number in range(3 * REPEATED_AT_ONCE):
        rig.parts.journal.append(Stream.AUDIT, "many", {"number": number})
    head = rig.parts.journal.heads()["audit"]
    rig.streams = {"audit": Committed(epoch=head.epoch, seq=head.seq + 50, hash="4" * 64)}
    rig.connect()
    rig.forward(EVERY_S)
    assert 0 < len(rig.headers("many")) - 3 * REPEATED_AT_ONCE <= REPEATED_AT_ONCE
    rig.streams = {}
    rig.restart()
    rig.forward(2.0)
    assert [one["number"] for one in rig.headers("many") if "again" in one] == list(range(3 * REPEATED_AT_ONCE))
    assert not rig.parts.journal.repeating
