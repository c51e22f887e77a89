"""The controller's real answers to fetches over a real broker: its link, its workers, its database, nothing else."""

from __future__ import annotations

import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from garrison_controller.bus.answers import BoardAnswers
from garrison_controller.bus.service import Bus
from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import ENROLLED, Device
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.store import RegistryStore
from garrison_protocol.keys import SigningKey
from tests.fakes.memory_source import RegistryContent
from tests.fakes.pki import FleetPki, Issued

DEADLINE_S = 20.0


class FetchDesk:
    """Serves ``content`` to the boards that were ``admit``ted, at the broker on ``port`` of this machine."""

    def __init__(
        self, content: RegistryContent, folder: Path, pki: FleetPki, *, port: int, protocol: Literal["5", "3.1.1"] = "5"
    ) -> None:
        self.folder = folder
        self.config = ControllerConfig(state_dir=folder, public_url="https://127.0.0.1:1")
        self.database = Database(f"sqlite:///{folder / 'controller.db'}")
        self.director = SigningKey.generate()
        folder.mkdir(parents=True, exist_ok=True)
        self.database.create_all()
        self.put(content)
        tls = client_context(pki, pki.issue("controller-1"))
        self.bus = Bus(
            self.database,
            host="127.0.0.1",
            port=port,
            identity="controller-1",
            tls=tls,
            protocol=protocol,
            keepalive_s=30,
            director=self.director,
            receipt_key=SigningKey.generate(),
            now=now,
            answers=BoardAnswers(
                self.config,
                self.database,
                store=RegistryStore(self.config.metadata_dir),
                blobs=BlobFolder(self.config.blobs_dir),
                sessions=Sessions(time.time),
                device_ca=Authority.create("Garrison device CA", now()),
                director=self.director,
                now=now,
            ),
        )

    def put(self, content: RegistryContent) -> None:
        """Publish ``content``."""
        files = {self.config.metadata_dir / name: data for name, data in content.metadata.items()}
        for (sha256, path), data in content.targets.items():
            folder, _, name = path.rpartition("/")
            files[self.config.metadata_dir / "targets" / folder / f"{sha256}.{name}"] = data
        for sha256, data in content.blobs.items():
            files[self.config.blobs_dir / "sha256" / sha256[:2] / sha256] = data
        for file, data in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def admit(self, device: str, key: SigningKey) -> None:
        """Enrol a board with this identity key."""
        with self.database.session() as session:
            session.add(
                Device(
                    id=device,
                    name=device,
                    group="/",
                    labels={},
                    identity_public=key.public_hex,
                    state=ENROLLED,
                    enrolled_at=now(),
                    cert_serial="1",
                    cert_not_after=now() + timedelta(days=30),
                )
            )

    def start(self) -> None:
        """Connect, and return when the broker has accepted the controller and sends it what boards ask."""
        subscribed = threading.Event()
        self.bus._link._client.on_subscribe = lambda *_: subscribed.set()
        self.bus.start()
        assert subscribed.wait(DEADLINE_S), "the controller did not reach the broker"

    def stop(self) -> None:
        """Disconnect."""
        self.bus.stop()
        self.database.close()


def client_context(pki: FleetPki, issued: Issued) -> ssl.SSLContext:
    """Return the TLS settings of a client with this certificate."""
    tls = ssl.create_default_context(cafile=str(pki.server_ca.pem))
    tls.load_cert_chain(issued.cert, issued.key)
    return tls


def now() -> datetime:
    """Return this moment."""
    return datetime.now(UTC)
