"""A signed registry built in memory with python-tuf: root 2 of 3, targets 2 of 2, online snapshot and timestamp."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from garrison_protocol.fleet import FLEET_TARGET, Fleet, FleetKey
from garrison_protocol.keys import SigningKey
from garrison_protocol.states import KeyPurpose
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import Package

_COMPACT = JSONSerializer(compact=True)
T = TypeVar("T", Root, Timestamp, Snapshot, Targets)


def in_days(days: float) -> datetime:
    """Return the moment ``days`` from now, in whole seconds, as TUF has it."""
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)


class FakeRepository:
    """Publishes version 1 of everything, with ``fleet.json``, when it is made.

    Change ``expires`` (by role), then ``publish()``. ``content`` is what a controller would serve; ``bootstrap`` the
    root that boards pin.
    """

    def __init__(self, *, fleet_name: str = "demo", floors: Mapping[str, str] | None = None) -> None:
        self.content = RegistryContent()
        self.director = SigningKey.generate()
        self.receipt = SigningKey.generate()
        self.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
        self.signers = {
            "targets": [CryptoSigner.generate_ed25519() for _ in range(2)],
            "snapshot": [CryptoSigner.generate_ed25519()],
            "timestamp": [CryptoSigner.generate_ed25519()],
        }
        self.expires = {
            "root": in_days(365),
            "targets": in_days(365),
            "snapshot": in_days(30),
            "timestamp": in_days(7),
        }
        self.targets: dict[str, bytes] = {}
        self.versions = {"root": 0, "targets": 0, "snapshot": 0, "timestamp": 0}
        self._root = Root(consistent_snapshot=True)
        for signer in self.root_signers:
            self._root.add_key(signer.public_key, "root")
        self._root.roles["root"].threshold = 2
        for role, signers in self.signers.items():
            for signer in signers:
                self._root.add_key(signer.public_key, role)
        self._root.roles["targets"].threshold = 2
        self.publish_root()
        self.bootstrap = self.content.metadata["1.root.json"]
        self.set_fleet(fleet_name, floors or {})
        self.publish()

    def set_fleet(self, name: str = "demo", floors: Mapping[str, str] | None = None) -> None:
        """Put ``fleet.json`` among the targets; the next ``publish()`` signs it."""
        keys = tuple(
            FleetKey(purpose=purpose, public=key.public_hex, not_before=in_days(-1), not_after=in_days(365))
            for purpose, key in ((KeyPurpose.DIRECTOR, self.director), (KeyPurpose.RECEIPT, self.receipt))
        )
        fleet = Fleet(name=name, keys=keys, device_ca="", server_ca="", floors=dict(floors or {}))
        self.targets[FLEET_TARGET] = fleet.model_dump_json().encode()

    def add(self, package: Package) -> None:
        """Put a package's manifest among the targets and its blobs on the server; ``publish()`` signs it."""
        self.targets[package.path] = package.manifest_bytes
        self.content.blobs |= package.blobs

    def publish(self, *, targets_signers: int = 2, versions: Mapping[str, int] | None = None) -> None:
        """Sign the next version of targets, snapshot, and timestamp, with as many targets keys as told."""
        for role in self.signers:
            self.versions[role] = (versions or {}).get(role, self.versions[role] + 1)
        targets = Targets(version=self.versions["targets"], expires=self.expires["targets"])
        for path, data in self.targets.items():
            file = TargetFile.from_data(path, data, ["sha256"])
            targets.targets[path] = file
            self.content.targets[(file.hashes["sha256"], path)] = data
        targets_bytes = self._sign(Metadata(targets), self.signers["targets"][:targets_signers])
        self.content.metadata[f"{targets.version}.targets.json"] = targets_bytes
        snapshot = Snapshot(version=self.versions["snapshot"], expires=self.expires["snapshot"])
        snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, targets_bytes, ["sha256"])
        self.snapshot(snapshot)

    def snapshot(self, snapshot: Snapshot) -> None:
        """Sign ``snapshot``, and the timestamp that names it."""
        data = self._sign(Metadata(snapshot), self.signers["snapshot"])
        self.content.metadata[f"{snapshot.version}.snapshot.json"] = data
        timestamp = Timestamp(version=self.versions["timestamp"], expires=self.expires["timestamp"])
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
        self.content.metadata["timestamp.json"] = self._sign(Metadata(timestamp), self.signers["timestamp"])

    def refresh_timestamp(self) -> None:
        """Sign a new timestamp over the same snapshot, as a controller does daily."""
        self.versions["timestamp"] += 1
        snapshot = (
            Metadata[Snapshot].from_bytes(self.content.metadata[f"{self.versions['snapshot']}.snapshot.json"]).signed
        )
        self.snapshot(snapshot)

    def rotate(self, role: str, *, signers: int | None = None) -> None:
        """Replace the oldest key of ``role`` in a new root. Online roles sign with the new key from the next publish.

        ``signers`` limits how many keys sign the new root; None: as many as the rules ask.
        """
        new = CryptoSigner.generate_ed25519()
        current = self.root_signers if role == "root" else self.signers[role]
        old = current.pop(0)
        self._root.revoke_key(old.public_key.keyid, role)
        self._root.add_key(new.public_key, role)
        current.append(new)
        signing = [*self.root_signers, old] if role == "root" else self.root_signers
        self.publish_root(signing[:signers])

    def publish_root(self, signing: list[CryptoSigner] | None = None) -> None:
        """Sign the next root; two of its keys suffice."""
        self.versions["root"] += 1
        self._root.version = self.versions["root"]
        self._root.expires = self.expires["root"]
        self.content.metadata[f"{self._root.version}.root.json"] = self._sign(
            Metadata(self._root), self.root_signers[:2] if signing is None else signing
        )

    @staticmethod
    def _sign(metadata: Metadata[T], signers: list[CryptoSigner]) -> bytes:
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes(_COMPACT)
