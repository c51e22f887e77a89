"""A controller's database with principals, a package, and boards that speak the real protocol."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import select

from garrison_controller.access.service import Identified
from garrison_controller.access.tables import Principal
from garrison_controller.audit.tables import Alarm, Refusal
from garrison_controller.bus.ingest import Ingest, Outgoing
from garrison_controller.db.base import Database
from garrison_controller.devices.tables import Device
from garrison_controller.registry.tables import Package
from garrison_controller.rollouts import queries, service
from garrison_controller.rollouts.specification import GroupSpec, RolloutSpec
from garrison_controller.rollouts.tables import DesiredState, Rollout, Target
from garrison_protocol import chain, envelope, topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.base import Message, encode, parse_message
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.report import AliasReport, Head, Report, Status
from garrison_protocol.messages.streams import Batch, Receipt, Row
from garrison_protocol.states import DeploymentState, Stream
from garrison_protocol.topics import Up

START = datetime(2026, 11, 24, 12, tzinfo=UTC)
ALIAS = "smol"
MODEL = "smollm2"


def actor(name: str) -> Identified:
    return Identified(f"id-{name}", name, ())


ALICE, BOB, PUBLISHER = actor("alice"), actor("bob"), actor("publisher")


@dataclass
class Clock:
    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class FakeBoard:
    """What a board sends, signed with its own key; it keeps its chain as the agent does."""

    device: str
    key: SigningKey = field(default_factory=SigningKey.generate)
    epoch: str = "00000000000000aa"
    connection: int = 1
    revision: int = 0
    entries: list[chain.Entry] = field(default_factory=list)
    samples: list[chain.Entry] = field(default_factory=list)

    def seal(self, kind: str, message: Message) -> bytes:
        return envelope.seal(kind, encode(message), self.key)

    def record(self, kind: str = "test", body: object | None = None, **facts: str | int | bool | None) -> chain.Entry:
        previous = self.entries[-1].hash if self.entries else chain.genesis(self.device, "audit", self.epoch)
        entry = chain.build(
            device=self.device,
            epoch=self.epoch,
            seq=len(self.entries) + 1,
            time_ms=int(START.timestamp() * 1000) + len(self.entries),
            kind=kind,
            previous=previous,
            facts=facts,
            body=body,
            salt=None if body is None else bytes(16),
        )
        self.entries.append(entry)
        return entry

    def measure(self, **facts: str | int | bool | None) -> chain.Entry:
        entry = chain.build(
            device=self.device,
            epoch=self.epoch,
            seq=len(self.samples) + 1,
            time_ms=int(START.timestamp() * 1000) + 60_000 * len(self.samples),
            kind="sample",
            previous=None,
            facts=facts,
        )
        self.samples.append(entry)
        return entry

    def batch(
        self, first: int = 1, last: int | None = None, *, stream: Stream = Stream.AUDIT, dropped: int = 0
    ) -> Batch:
        entries = self.entries if stream is Stream.AUDIT else self.samples
        rows = tuple(Row(header=one.header, body=one.body, salt=one.salt) for one in entries[first - 1 : last])
        return Batch(device=self.device, stream=stream, epoch=self.epoch, first=first, dropped=dropped, rows=rows)

    def status(self, *, online: bool = True, counter: int = 0, sha256: str | None = None) -> Status:
        heads = {}
        if self.entries:
            heads["audit"] = Head(epoch=self.epoch, seq=len(self.entries), hash=self.entries[-1].hash)
        return Status(
            device=self.device,
            connection=self.connection,
            online=online,
            agent_version="0.1.0",
            desired_counter=counter,
            desired_sha256=sha256,
            heads=heads,
        )


class Fleet:
    """Everything behind the bus, without a broker."""

    def __init__(self, path: Path, boards: Iterable[str] = ("edge-1", "edge-2", "edge-3")) -> None:
        self.clock = Clock()
        self.director, self.receipt_key = SigningKey.generate(), SigningKey.generate()
        self.database = Database(f"sqlite:///{path / 'controller.db'}")
        self.database.create_all()
        self.ingest = Ingest(self.database, director=self.director, receipt_key=self.receipt_key, now=self.clock)
        self.boards = {name: FakeBoard(name) for name in boards}
        with self.database.session() as session:
            for person in (ALICE, BOB, PUBLISHER):
                session.add(Principal(id=person.principal_id, name=person.name, kind="person", created_at=START))
            for version in ("1.0.0", "2.0.0"):
                session.add(
                    Package(
                        name=MODEL,
                        version=version,
                        manifest_sha256=manifest_sha256(version),
                        alias=ALIAS,
                        manifest="{}",
                        size_bytes=1,
                        published_at=START,
                        published_by=PUBLISHER.principal_id,
                        published_by_name=PUBLISHER.name,
                        targets_version=1,
                    )
                )
            for board in self.boards.values():
                session.add(
                    Device(
                        id=board.device,
                        name=board.device,
                        group="/demo/",
                        labels={},
                        identity_public=board.key.public_hex,
                        state="enrolled",
                        enrolled_at=START,
                        cert_serial="1",
                        cert_not_after=START + timedelta(days=30),
                        online=True,
                    )
                )

    def close(self) -> None:
        self.database.close()

    # What people do.

    def create(self, name: str = "first", version: str = "1.0.0", **changes: object) -> str:
        fields: dict[str, object] = {
            "name": name,
            "model": MODEL,
            "version": version,
            "soak_s": 0,
            "groups": (GroupSpec(name="canary", filter="name=edge-1"), GroupSpec(name="rest", filter="*")),
        }
        with self.database.session() as session:
            spec = RolloutSpec.model_validate(fields | changes)
            return service.create(session, ALICE, spec, self.clock()).id

    def approve(self, rollout: str, by: Identified = BOB, digest: str | None = None) -> None:
        with self.database.session() as session:
            row = queries.find(session, rollout, lock=True)
            service.approve(
                session,
                by,
                row,
                seen_digest=digest or row.digest,
                comment="",
                director=self.director,
                now=self.clock(),
            )

    def begin(self, name: str = "first", version: str = "1.0.0", **changes: object) -> str:
        rollout = self.create(name, version, **changes)
        self.approve(rollout)
        return rollout

    def pause(self, rollout: str) -> None:
        with self.database.session() as session:
            row = queries.find(session, rollout, lock=True)
            service.pause(session, ALICE, row, self.director, self.clock())

    def resume(self, rollout: str) -> None:
        with self.database.session() as session:
            row = queries.find(session, rollout, lock=True)
            service.resume(session, ALICE, row, self.director, self.clock())

    def stop(self, rollout: str) -> None:
        with self.database.session() as session:
            row = queries.find(session, rollout, lock=True)
            service.stop(session, ALICE, row, self.director, self.clock())

    def tick(self) -> bool:
        return service.tick(self.database, self.director, self.clock())

    # What boards do.

    def send(self, board: FakeBoard, kind: Up, message: Message) -> Outgoing:
        return self.ingest.handle(topics.up(board.device, kind), board.seal(kind.value, message))

    def report(self, device: str, rollout: str, state: DeploymentState, step: int, **changes: object) -> Outgoing:
        """Send a report of one alias. A new revision each time, unless ``revision`` is given."""
        board = self.boards[device]
        board.revision += 1
        revision = changes.pop("revision", board.revision)
        row = self.rollout(rollout)
        alias = AliasReport.model_validate(
            {
                "alias": row.alias,
                "package": PackageRef(
                    name=row.package_name, version=row.package_version, manifest_sha256=row.manifest_sha256
                ),
                "rollout": rollout,
                "state": state,
                "step": step,
            }
            | changes
        )
        message = Report.model_validate({"device": device, "revision": revision, "aliases": (alias,)})
        return self.send(board, Up.REPORT, message)

    def activate(self, device: str, rollout: str, step: int = 8) -> None:
        self.report(device, rollout, DeploymentState.ACTIVE, step)

    # What the database says.

    def rollout(self, reference: str) -> Rollout:
        with self.database.reading() as session:
            row = queries.find(session, reference)
            session.expunge(row)
            return row

    def states(self, rollout: str) -> dict[str, str]:
        with self.database.reading() as session:
            return {target.device_id: target.state for target in queries.targets_of(session, rollout)}

    def groups(self, rollout: str) -> list[str]:
        with self.database.reading() as session:
            return [group.status for group in queries.groups_of(session, rollout)]

    def target(self, rollout: str, device: str) -> Target:
        with self.database.reading() as session:
            row = session.get_one(Target, (rollout, device))
            session.expunge(row)
            return row

    def desired(self, device: str) -> Desired | None:
        """Return what the board would find on its topic, its signature checked."""
        with self.database.reading() as session:
            row = session.get(DesiredState, device)
            if row is None or row.counter == 0:
                return None
            opened = envelope.unseal(
                row.envelope, lambda signer: self.director.public_hex if signer == self.director.key_id else None
            )
            assert row.sha256 == sha256_hex(opened.body)
            message = parse_message(Desired, opened.body, device=device)
            assert message.counter == row.counter
            return message

    def serves(self, device: str) -> tuple[str, str] | None:
        """Return (version, rollout) that the board should serve."""
        message = self.desired(device)
        if message is None or not message.aliases:
            return None
        return message.aliases[0].package.version, message.aliases[0].rollout

    def alarms(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(Alarm.code).order_by(Alarm.id)))

    def refusals(self) -> dict[tuple[str, str], int]:
        with self.database.reading() as session:
            return {(row.sender, row.code): row.count for row in session.scalars(select(Refusal))}

    def receipt(self, outgoing: Outgoing) -> Receipt:
        ((topic, payload),) = outgoing.messages
        opened = envelope.unseal(
            payload, lambda signer: self.receipt_key.public_hex if signer == self.receipt_key.key_id else None
        )
        assert opened.kind == "receipt"
        device = json.loads(opened.body)["device"]
        assert topic == topics.down(device, topics.Down.RECEIPT)
        return parse_message(Receipt, opened.body, device=device)


def manifest_sha256(version: str) -> str:
    return sha256_hex(f"{MODEL} {version}".encode())
