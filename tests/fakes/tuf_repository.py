"""A signed registry built in memory with python-tuf: root 2 of 3, targets 2 of 2, online snapshot and timestamp."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
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


class FakeFamily:
    """A delegated role. What is changed here the next ``publish()`` of its repository signs and lists."""

    def __init__(self, role: str, paths: tuple[str, ...], keys: int, threshold: int) -> None:
        self.role = role
        self.paths = paths
        self.threshold = threshold
        self.signers = [CryptoSigner.generate_ed25519() for _ in range(keys)]
        self.expires = in_days(365)
        self.version = 0
        self.data = b""
        """The metadata that is listed; whatever a test puts here is listed with ``version``."""
        self._targets: dict[str, bytes] = {}

    def add(self, package: Package) -> None:
        """Name a package in the next version, within the paths or not."""
        self._targets[package.path] = package.manifest_bytes

    def name(self, path: str, data: bytes) -> None:
        """Name any target in the next version."""
        self._targets[path] = data

    def sign(self, *, signers: int | None = None, version: int | None = None, nested: FakeFamily | None = None) -> None:
        """Sign the next version, or another one, with as many keys as told."""
        self.version = self.version + 1 if version is None else version
        targets = Targets(version=self.version, expires=self.expires)
        for path, data in self._targets.items():
            targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        if nested is not None:
            targets.delegations = delegations([nested])
        metadata = Metadata(targets)
        for signer in self.signers[: self.threshold if signers is None else signers]:
            metadata.sign(signer, append=True)
        self.data = metadata.to_bytes(_COMPACT)

    @property
    def target_bytes(self) -> dict[tuple[str, str], bytes]:
        """What a server keeps, by digest and path."""
        return {
            (TargetFile.from_data(path, data, ["sha256"]).hashes["sha256"], path): data
            for path, data in self._targets.items()
        }


def delegations(families: Iterable[FakeFamily]) -> Delegations:
    """Return what a delegating role says about ``families``: terminating, in this order."""
    found = list(families)
    keys = {signer.public_key.keyid: signer.public_key for one in found for signer in one.signers}
    return Delegations(
        dict(keys),
        {
            one.role: DelegatedRole(
                one.role,
                [signer.public_key.keyid for signer in one.signers],
                one.threshold,
                terminating=True,
                paths=list(one.paths),
            )
            for one in found
        },
    )


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
        self.families: dict[str, FakeFamily] = {}
        """By role; a family in which ``sign`` was never called is signed at the next ``publish()``."""
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

    def delegate(self, name: str, *paths: str, keys: int = 2, threshold: int = 2) -> FakeFamily:
        """Delegate ``paths`` to a role with keys of its own; ``publish()`` signs it."""
        family = FakeFamily(f"family-{name}", paths, keys, threshold)
        self.families[family.role] = family
        return family

    def publish(self, *, targets_signers: int = 2, versions: Mapping[str, int] | None = None) -> None:
        """Sign the next version of targets, snapshot, and timestamp, with as many targets keys as told."""
        for role in self.signers:
            self.versions[role] = (versions or {}).get(role, self.versions[role] + 1)
        targets = Targets(version=self.versions["targets"], expires=self.expires["targets"])
        for path, data in self.targets.items():
            file = TargetFile.from_data(path, data, ["sha256"])
            targets.targets[path] = file
            self.content.targets[(file.hashes["sha256"], path)] = data
        if self.families:
            targets.delegations = delegations(self.families.values())
        targets_bytes = self._sign(Metadata(targets), self.signers["targets"][:targets_signers])
        self.content.metadata[f"{targets.version}.targets.json"] = targets_bytes
        snapshot = Snapshot(version=self.versions["snapshot"], expires=self.expires["snapshot"])
        snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, targets_bytes, ["sha256"])
        for family in self.families.values():
            if not family.data:
                family.sign()
            self.content.targets |= family.target_bytes
            self.content.metadata[f"{family.version}.{family.role}.json"] = family.data
            snapshot.meta[f"{family.role}.json"] = MetaFile.from_data(family.version, family.data, ["sha256"])
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
