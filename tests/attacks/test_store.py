"""Attacks on what a board remembers: its cache of metadata, and its store, lost, zeroed, or put back from a copy.

The controller is real up to its database: what the board sends is ingested, and its receipts and anchors come back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from garrison_agent.events import Tick
from garrison_controller.audit.tables import Alarm, StreamRow, StreamState
from garrison_controller.audit.verify import verify
from garrison_controller.bus.ingest import Ingest
from garrison_controller.devices import anchors
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts.tables import DesiredState
from garrison_protocol import topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.envelope import unseal
from garrison_protocol.errors import UnavailableError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.desired import DesiredAlias
from garrison_protocol.messages.report import Status
from garrison_protocol.states import Stream
from tests.attacks import standing
from tests.attacks.target import Target
from tests.unit.loop.rig import BOARD, DEVICE, DIRECTOR, RECEIPTS, entry, package
from tests.unit.rollouts.fleet import Fleet


class Controlled(Target):
    """A board whose broker leads to a controller's database."""

    def __init__(self, folder: Path, controller: Fleet) -> None:
        self.controller = controller
        self.ingest = Ingest(controller.database, director=DIRECTOR, receipt_key=RECEIPTS, now=controller.clock)
        self.passed = 0
        with controller.database.session() as session:
            device = session.get_one(Device, DEVICE)
            device.identity_public = BOARD.public_hex
        super().__init__(folder)

    def start(self) -> None:
        self.passed = 0
        super().start()

    def answer(self, nonce: str) -> bytes:
        if self.controller_silent:
            raise UnavailableError("controller.unreachable", "no network", retryable=True)
        self.controller.clock.advance(1)
        with self.controller.database.reading() as session:
            self.answers.append(anchors.anchor(session, DEVICE, nonce, DIRECTOR, self.controller.clock()))
        return self.answers[-1]

    def desire(self, *entries: DesiredAlias, counter: int | None = None, key: SigningKey = DIRECTOR) -> bytes:
        sealed = super().desire(*entries, counter=counter, key=key)
        body = unseal(sealed, lambda _: DIRECTOR.public_hex).body
        row = DesiredState(
            device_id=DEVICE,
            counter=self.counter,
            counter_floor=0,
            body=body,
            envelope=sealed,
            sha256=sha256_hex(body),
        )
        with self.controller.database.session() as session:
            session.merge(row)
        return sealed

    def exchange(self) -> None:
        """Let everything that is under way arrive, both ways, until nothing is."""
        for _ in range(50):
            self.forward(1)
            sent, self.passed = self.link.sent[self.passed :], len(self.link.sent)
            for topic, payload, _ in sent:
                self.controller.clock.advance(0.001)
                for place, answer in self.ingest.handle(topic, payload).messages:
                    self.receive(place, answer)
            self.settle()
            if not sent:
                return
        raise AssertionError("board and controller never come to rest")

    def copy_store(self) -> Path:
        """Take a copy of the whole store, as a backup does."""
        copy = self.folder / "copy.db"
        self.database.connection.execute(f"VACUUM INTO '{copy}'")
        return copy

    def put_back(self, copy: Path | None) -> None:
        """Start with that store, or with none."""
        self.kill()
        for path in self.config.database_path.parent.glob("agent.db*"):
            path.unlink()
        if copy is not None:
            shutil.copy(copy, self.config.database_path)
        self.start()
        self.settle()

    def alarms(self) -> list[str]:
        return self.controller.alarms()

    def rows(self) -> list[StreamRow]:
        """Return the audit rows that the controller has, in the order of their arrival."""
        with self.controller.database.reading() as session:
            rows = session.scalars(
                select(StreamRow).where(StreamRow.device_id == DEVICE, StreamRow.stream == Stream.AUDIT)
            ).all()
            session.expunge_all()
        return sorted(rows, key=lambda row: (row.received_at, row.seq))


@pytest.fixture
def home(tmp_path: Path, fleet: Fleet) -> Iterator[Controlled]:
    """A board that serves ``chat:1.0``, and of which the controller knows everything."""
    fleet.clock.now = fleet.clock.now.replace(year=2026)
    target = Controlled(tmp_path / "board", fleet)
    fleet.clock.now += timedelta(seconds=target.clock.wall_s - fleet.clock.now.timestamp())
    target.settle()
    target.connect()
    target.deploy(package("1.0"), "r1")
    target.exchange()
    assert target.parts.journal.pending()["audit"] == 0
    yield target
    target.database.close()


def registry_files(board: Target) -> list[Path]:
    return [path for path in (board.folder / "state" / "registry").rglob("*") if path.is_file()]


def damage(board: Target, how: str) -> None:
    """What a power cut or a bad sector leaves of the cache of metadata."""
    for path in registry_files(board):
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(bytes(path.stat().st_size) if how == "zeroed" else b"")


# --- the cache of metadata -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zeroed", "empty", "deleted"])
def test_a_cache_that_a_power_cut_destroyed(board: Target, how: str) -> None:
    """Lost cache: every file of metadata is zeroed, empty, or gone, the agent starts again, and there is no network."""
    yesterday = dict(board.content)
    board.repository.rotate("timestamp")
    board.repository.publish()
    board.look()
    today = dict(board.content)
    marks = standing.board_tables(board.database.connection)["high_water"]
    damage(board, how)
    board.controller_silent = True
    board.content.clear()
    board.restart()
    assert board.models.running == ["chat:1.0"]
    assert [model for _, model, socket in board.served if socket is not None] == ["chat:1.0"]
    assert board.parts.trust.view.freshness == "STALE"
    board.content.update(yesterday)
    board.look()
    assert board.headers("metadata.refused")[-1]["code"] == "registry.rollback"
    assert standing.board_tables(board.database.connection)["high_water"] == marks
    board.content.update(today)
    board.look()
    assert board.parts.trust.view.freshness == "FRESH"
    board.controller_silent = False
    board.connect()
    board.deploy(package("2.0"), "r2")
    assert board.models.running == ["chat:2.0"]


@pytest.mark.parametrize("name", ["trusted.json", "roots/1.root.json", "roots/2.root.json", "targets"])
def test_one_file_of_the_cache_that_rotted(board: Target, name: str) -> None:
    """Rotten cache: one file of the metadata is overwritten with noise; the next refresh puts it right."""
    board.repository.rotate("timestamp")
    board.repository.publish()
    board.look()
    place = board.folder / "state" / "registry" / name
    for path in place.iterdir() if place.is_dir() else [place]:
        path.write_bytes(b"\xff\x00 noise" * 20)
    board.restart()
    assert board.models.running == ["chat:1.0"]
    board.look()
    assert board.parts.trust.view.freshness == "FRESH"
    board.restart()
    assert board.parts.trust.last_error is None


# --- the store -------------------------------------------------------------------------------------------------------


def test_an_old_desired_state_for_a_board_that_lost_its_store(home: Controlled) -> None:
    """Lost store: a genuine desired state of before is shown to a board that no longer knows any."""
    older = home.desire(entry(package("1.0").ref, "r1"))
    home.settle()
    home.deploy(package("2.0"), "r2")
    home.exchange()
    home.put_back(None)
    home.receive(topics.down(DEVICE, topics.Down.DESIRED), older)
    home.settle()
    assert home.refused == {"desired.below_anchor": 1}
    home.connect()
    home.receive(topics.down(DEVICE, topics.Down.DESIRED), older)
    home.settle()
    assert home.parts.inbound.applied.counter == 0
    assert home.headers("desired.refused")[-1]["code"] == "desired.below_anchor"
    home.restart()
    home.receive(topics.down(DEVICE, topics.Down.DESIRED), older)
    home.settle()
    assert home.parts.inbound.applied.counter == 0, "a restart forgets nothing"


def test_a_desired_state_waits_while_the_anchor_is_withheld(home: Controlled) -> None:
    """Lost store, and whoever stands in between withholds the anchor: nothing is followed until it comes."""
    home.put_back(None)
    home.controller_silent = True
    home.connect()
    home.desire(entry(package("1.0").ref, "r1"), counter=home.counter)
    home.settle()
    assert (home.parts.inbound.applied.counter, home.parts.inbound.held) == (0, home.counter)
    home.controller_silent = False
    home.forward(60)
    assert home.parts.inbound.applied.counter == home.counter


def test_a_store_that_was_lost_begins_a_new_epoch_and_names_the_old(home: Controlled) -> None:
    """Lost store: its record must neither go on under numbers that are taken, nor begin as if there had been none."""
    last = home.parts.journal.heads()["audit"]
    home.put_back(None)
    home.connect()
    home.exchange()
    recovery = home.headers("epoch.recovery")[-1]
    assert recovery["controller_audit"] == f"{last.epoch}/{last.seq}/{last.hash}"
    assert home.parts.journal.heads()["audit"].epoch != last.epoch
    assert home.parts.journal.pending()["audit"] == 0
    assert home.alarms() == ["audit.store_lost"]
    assert verified(home)


def test_a_store_that_was_put_back_from_a_copy(home: Controlled) -> None:
    """Older store: agent.db is replaced by a copy of last week; its next rows would take numbers that are taken."""
    copy = home.copy_store()
    home.deploy(package("2.0"), "r2")
    home.exchange()
    there = home.parts.journal.heads()["audit"]
    before = {(row.epoch, row.seq): row.hash for row in home.rows()}
    home.disconnect()
    home.put_back(copy)
    home.parts.telemetry.sample(online=False, loaded=[])
    made = home.audit()
    home.connect()
    home.exchange()
    opened = home.headers("epoch.opened")[-1]
    assert opened["reason"] == "older_store"
    assert opened["controller_audit"] == f"{there.epoch}/{there.seq}/{there.hash}"
    assert opened["audit_before"] == there.epoch
    after = {(row.epoch, row.seq): row.hash for row in home.rows()}
    assert {place: after[place] for place in before} == before
    again = [row.kind for row in home.rows() if '"again"' in row.header]
    assert again, "what was recorded since the copy goes again"
    assert set(again) <= set(made)
    assert home.parts.journal.pending() == {"audit": 0, "telemetry": 0}
    assert home.alarms() == ["audit.store_lost"]
    assert verified(home)


def test_a_store_that_was_put_back_and_ran_on_without_a_network(home: Controlled) -> None:
    """Older store: it goes on offline until it has as many rows as the controller knows, but other ones."""
    copy = home.copy_store()
    home.deploy(package("2.0"), "r2")
    home.exchange()
    there = home.parts.journal.heads()["audit"]
    home.put_back(copy)
    while home.parts.journal.heads()["audit"].seq <= there.seq:
        home.parts.journal.append(Stream.AUDIT, "written.offline", {"number": home.parts.journal.heads()["audit"].seq})
    written = home.headers("written.offline")
    home.connect()
    home.exchange()
    arrived = [row for row in home.rows() if row.kind == "written.offline"]
    assert len(arrived) == len(written)
    assert all(row.epoch != there.epoch for row in arrived)
    assert home.alarms() == ["audit.store_lost"]
    assert verified(home)


def test_no_anchor_no_new_epoch(home: Controlled) -> None:
    """Withheld anchor: a board with its true store is made to believe nothing; its rows go after a short wait."""
    epoch = home.parts.journal.heads()["audit"].epoch
    home.controller_silent = True
    home.restart()
    home.connect()
    assert home.batches(Stream.AUDIT) == []
    home.forward(40)
    home.exchange()
    assert home.parts.journal.heads()["audit"].epoch == epoch
    assert home.parts.journal.pending()["audit"] == 0
    assert home.alarms() == []


def test_a_controller_that_was_put_back_does_not_make_boards_begin_anew(home: Controlled) -> None:
    """Older controller: a backup of the controller knows only the epoch before this store; the board keeps its own."""
    home.put_back(None)
    home.connect()
    home.exchange()
    epoch = home.parts.journal.heads()["audit"].epoch
    with home.controller.database.session() as session:
        for table in (StreamRow, StreamState):
            for row in session.scalars(select(table).where(table.device_id == DEVICE, table.epoch == epoch)).all():
                session.delete(row)
    home.restart()
    home.connect()
    home.exchange()
    assert home.parts.journal.heads()["audit"].epoch == epoch
    assert verified(home)
    assert {row.seq for row in home.rows() if row.epoch == epoch} == set(
        range(1, home.parts.journal.heads()["audit"].seq + 1)
    )


def test_receipts_of_an_earlier_epoch(home: Controlled) -> None:
    """Replay across epochs: genuine receipts of the lost store are shown to the new one, to forget its rows."""
    receipts = [
        payload
        for topic, payload, _ in home.link.sent
        for place, payload in home.ingest.handle(topic, payload).messages
    ]
    assert receipts
    home.put_back(None)
    before = home.parts.journal.heads()
    for receipt in receipts:
        home.receive(topics.down(DEVICE, topics.Down.RECEIPT), receipt)
    home.settle()
    assert home.parts.journal.heads() == before


def test_statuses_and_reports_of_an_earlier_epoch(home: Controlled) -> None:
    """Replay across epochs: genuine statuses, deaths, and reports of the lost store, with their higher numbers."""
    for _ in range(5):
        home.disconnect()
        home.connect()
        home.exchange()
    old = list(home.link.sent)
    assert old
    death = home.parts.uplink.will()
    home.put_back(None)
    home.connect()
    home.exchange()
    before = standing.controller_tables(home.folder.parent / "controller.db", "stream_state")
    for topic, payload, _ in [*old, (topics.up(DEVICE, topics.Up.STATUS), death, True)]:
        home.ingest.handle(topic, payload)
    assert standing.controller_tables(home.folder.parent / "controller.db", "stream_state") == before
    home.owner.handle(Tick.HEARTBEAT)
    home.exchange()
    with home.controller.database.reading() as session:
        device = session.get_one(Device, DEVICE)
        assert device.online
        status = Status.model_validate(device.status)
        assert status.heads["audit"].epoch == home.parts.journal.heads()["audit"].epoch


def verified(home: Controlled) -> bool:
    """Tell whether every chain that the controller has of the board holds."""
    with home.controller.database.reading() as session:
        assert session.scalars(select(Alarm).where(Alarm.code.startswith("stream."))).all() == []
        return all(found.ok for found in verify(session))
