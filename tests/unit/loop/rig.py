"""A whole owner over fake ports and a real store, driven step by step in the test's own thread."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from garrison_agent.adapters.ballast import FreeBytes, free_bytes
from garrison_agent.adapters.database import Database
from garrison_agent.api.commands import Command
from garrison_agent.config import AgentConfig
from garrison_agent.core.slot import Slot
from garrison_agent.events import Asked, Connected, Disconnected, Message, OwnerEvent, Stop
from garrison_agent.loop import Owner
from garrison_agent.owner.shelf import Shelf
from garrison_agent.registry.bundle_source import Plugged
from garrison_agent.registry.files import BlobStore
from garrison_agent.wiring import build_parts
from garrison_protocol import topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.envelope import seal, unseal
from garrison_protocol.errors import GarrisonError, UnavailableError
from garrison_protocol.fleet import Fleet, FleetKey
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.anchor import ANCHOR_KIND, Anchor, Committed
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired, DesiredAlias
from garrison_protocol.messages.report import AliasReport, Inventory, Report, Status
from garrison_protocol.messages.streams import Batch, Receipt
from garrison_protocol.states import KeyPurpose, Stream
from tests.fakes.board_ports import FakeClock, FakeLink, FakeModels, FakeRenew, FakeRenewals, FakeWork
from tests.fakes.packages import Package, make_package

DEVICE = "edge-1"
DIRECTOR, RECEIPTS, BOARD = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
INVENTORY = Inventory(
    architecture="x86_64", cpu_count=4, memory_mb=4096, disk_free_mb=10_000, engines=("llama.cpp", "onnxruntime")
)


def fleet_json(*keys: tuple[KeyPurpose, SigningKey], floors: dict[str, str] | None = None) -> bytes:
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2040, 1, 1, tzinfo=UTC)
    listed = tuple(FleetKey(purpose=one, public=key.public_hex, not_before=start, not_after=end) for one, key in keys)
    return Fleet(name="demo", keys=listed, device_ca="", server_ca="", floors=floors or {}).model_dump_json().encode()


FLEET = fleet_json((KeyPurpose.DIRECTOR, DIRECTOR), (KeyPurpose.RECEIPT, RECEIPTS))


def package(version: str = "1.0", name: str = "chat", memory_mb: int = 200) -> Package:
    made = make_package(name, version, files={"model.gguf": f"{name} {version}".encode() * 100})
    variant = made.variant.model_copy(update={"memory_mb": memory_mb})
    return Package(made.manifest.model_copy(update={"variants": (variant,)}), made.blobs)


class Rig:
    """One board. ``restart`` gives a new process over the same disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.models = FakeModels()
        self.config = AgentConfig.model_validate(
            {
                "state_dir": folder / "state",
                "runtime_dir": folder / "run",
                "limits": {"memory_budget_mb": 1000, "disk_reserve_mb": 1},
            }
        )
        self.shelf = Shelf(folder / "state" / "models", BlobStore(folder / "state" / "blobs"))
        self.work = FakeWork(self.shelf, FLEET)
        self.renew = FakeRenew(self.clock.wall_s)
        self.pinned: list[str] = []
        """Server CAs, as they were given to the board's files."""
        self.unpinnable: GarrisonError | None = None
        self.plugged = Plugged()
        self.counter = 0
        self.director = DIRECTOR
        """Signs anchors."""
        self.controller_silent = False
        """Nobody answers a nonce."""
        self.streams: dict[str, Committed] = {}
        """What the controller has of this board's rows."""
        self.signed_counter = 0
        """The newest desired state that the controller says it signed."""
        self.answer_with: dict[str, Any] = {}
        """What the controller, or whoever answers in its place, says otherwise: arguments of ``anchor``."""
        self.replay: bytes | None = None
        """The answer to every nonce."""
        self.answers: list[bytes] = []
        self.asked = 0
        self.renewals = FakeRenewals()
        self.enrolment_anchor: tuple[str, bytes] | None = None
        self.free_bytes: FreeBytes = free_bytes
        self.start()

    def pin_server_ca(self, pem: str) -> bool:
        if self.unpinnable is not None:
            raise self.unpinnable
        if pem in ("", *self.pinned[-1:]):
            return False
        self.pinned.append(pem)
        return not set(self.pinned[-2:][0].split()) <= set(pem.split())

    def start(self) -> None:
        self.inbox: queue.SimpleQueue[OwnerEvent] = queue.SimpleQueue()
        self.jobs: list[Callable[[], None]] = []
        self.link = FakeLink()
        self.notified: list[str] = []
        self.database = Database(self.config.database_path, self.free_bytes)
        self.parts = build_parts(
            config=self.config,
            device=DEVICE,
            key=BOARD,
            broker=lambda: "broker:8883",
            renew=self.renew,
            pin_server_ca=self.pin_server_ca,
            renewals=self.renewals,
            plugged=self.plugged,
            ask_anchor=self.answer,
            enrolment_anchor=lambda: self.enrolment_anchor,
            database=self.database,
            shelf=self.shelf,
            work=self.work,
            build_worker=self.models.build,
            spawn=self.jobs.append,
            post=self.inbox.put,
            now=self.clock,
            board=INVENTORY,
        )
        self.parts.uplink.attach(self.link)
        self.owner = Owner(
            self.inbox,
            self.parts,
            link=self.link,
            services=(),
            every={},
            now=self.clock,
            notify=self.notified.append,
        )
        self.owner.start()

    def kill(self) -> None:
        """SIGKILL: the workers go with the agent, and nothing is written any more."""
        for worker in self.models.started:
            worker.alive = False
        self.database.close()

    def restart(self) -> None:
        self.kill()
        self.start()
        self.settle()

    def stop(self) -> None:
        self.owner.stop("SIGTERM")
        self.database.close()

    def step(self) -> bool:
        """Let one thing happen; tell whether there was one."""
        due = self.parts.timers.due()
        if due is not None:
            self.owner.handle(due)
        elif not self.inbox.empty():
            event = self.inbox.get()
            assert not isinstance(event, Stop)
            self.owner.handle(event)
        elif self.jobs:
            self.jobs.pop(0)()
        else:
            return False
        return True

    def settle(self) -> None:
        """Let everything happen that needs no time."""
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the owner never comes to rest")

    def forward(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        self.settle()
        end = self.clock.monotonic_s + seconds
        while (rest := self.parts.timers.next_s()) is not None and self.clock.monotonic_s + rest <= end:
            self.clock.forward(rest)
            self.settle()
        self.clock.forward(end - self.clock.monotonic_s)

    def connect(self) -> None:
        self.parts.uplink.will()
        self.link.connected = True
        self.inbox.put(Connected())
        self.settle()

    def disconnect(self) -> None:
        self.link.connected = False
        self.inbox.put(Disconnected("test"))
        self.settle()

    def receive(self, topic: str, payload: bytes) -> None:
        self.inbox.put(Message(topic, payload))

    def answer(self, nonce: str) -> bytes:
        """Answer a nonce of the board."""
        self.asked += 1
        if self.controller_silent or self.work.offline_now:
            raise UnavailableError("controller.unreachable", "no network", retryable=True)
        self.answers.append(self.replay or self.anchor(nonce, **self.answer_with))
        return self.answers[-1]

    def anchor(
        self, nonce: str, *, key: SigningKey | None = None, time_s: float | None = None, device: str = DEVICE
    ) -> bytes:
        """Return what the controller signs, by a clock that is right unless ``time_s`` says otherwise."""
        body = Anchor(
            device=device,
            nonce=nonce,
            time=int(self.clock.wall_s if time_s is None else time_s),
            desired_counter=self.signed_counter,
            streams=dict(self.streams),
        )
        return seal(ANCHOR_KIND, encode(body), key or self.director)

    def desire(self, *entries: DesiredAlias, counter: int | None = None, key: SigningKey = DIRECTOR) -> bytes:
        """Send a desired state and return its envelope."""
        self.counter = self.counter + 1 if counter is None else counter
        body = encode(Desired(device=DEVICE, counter=self.counter, aliases=entries))
        envelope = seal("desired", body, key)
        self.receive(topics.down(DEVICE, topics.Down.DESIRED), envelope)
        return envelope

    def receipt(self, batch: Batch, *, resend: bool = False) -> None:
        last = batch.rows[-1]
        up_to = batch.first + len(batch.rows) - 1
        digest = sha256_hex(b"\x00" + last.header.encode())
        body = Receipt(device=DEVICE, stream=batch.stream, epoch=batch.epoch, up_to=up_to, hash=digest, resend=resend)
        self.receive(topics.down(DEVICE, topics.Down.RECEIPT), seal("receipt", encode(body), RECEIPTS))
        self.settle()

    def ask(self, command: Command) -> Future[object]:
        answer: Future[object] = Future()
        self.inbox.put(Asked(command, answer))
        self.settle()
        return answer

    def deploy(self, made: Package, rollout: str, soak_s: float = 0) -> None:
        """Publish a package, desire it, and let the deployment end."""
        self.work.publish(made)
        self.desire(entry(made.ref, rollout, soak_s=soak_s))
        self.settle()
        self.forward(soak_s + 1)

    @property
    def state(self) -> str:
        return self.slot.state.value

    @property
    def slot(self) -> Slot:
        return self.parts.deployments.slots["chat"]

    def audit(self) -> list[str]:
        rows = self.database.connection.execute("SELECT kind FROM entry WHERE stream = 'audit' ORDER BY seq")
        return [str(kind) for (kind,) in rows]

    def headers(self, kind: str) -> list[dict[str, object]]:
        rows = self.database.connection.execute("SELECT header FROM entry WHERE kind = ? ORDER BY seq", (kind,))
        return [json.loads(header) for (header,) in rows]

    def statuses(self) -> list[Status]:
        return [Status.model_validate_json(body) for body in self._bodies(topics.Up.STATUS)]

    def reports(self) -> list[Report]:
        return [Report.model_validate_json(body) for body in self._bodies(topics.Up.REPORT)]

    def batches(self, stream: Stream) -> list[Batch]:
        kind = topics.Up.AUDIT if stream is Stream.AUDIT else topics.Up.TELEMETRY
        return [Batch.model_validate_json(body) for body in self._bodies(kind)]

    def reported(self) -> AliasReport:
        return self.reports()[-1].aliases[0]

    def _bodies(self, kind: topics.Up) -> list[bytes]:
        sent = [payload for topic, payload, _ in self.link.sent if topic == topics.up(DEVICE, kind)]
        return [unseal(payload, lambda _signer: BOARD.public_hex).body for payload in sent]


def entry(ref: PackageRef, rollout: str = "r1", *, alias: str = "chat", soak_s: float = 0) -> DesiredAlias:
    return DesiredAlias(alias=alias, package=ref, rollout=rollout, soak_s=soak_s)
