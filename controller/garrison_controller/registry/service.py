"""Use cases of the model registry: accept what signers made, and keep it fresh.

Order of a publication: files that nobody can see yet, then the database transaction, then ``timestamp.json``. A crash
in between leaves the old version published, and pushing the same metadata again completes the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.access.events import record_event
from garrison_controller.db.base import Database
from garrison_controller.registry import online, queries, rules
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.online import OnlineFiles, OnlineSigners
from garrison_controller.registry.rules import Accepted, Current, NewTarget, OwnKeys, Upload
from garrison_controller.registry.store import TIMESTAMP, Published, RegistryStore
from garrison_controller.registry.tables import Package
from garrison_controller.signing.metadata import target_digest
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, NotFoundError
from garrison_protocol.fleet import FLEET_TARGET, Fleet, parse_fleet
from garrison_protocol.manifest import Manifest
from garrison_protocol.states import KeyPurpose

CONTROLLER = "controller"
MAX_BLOBS_NAMED = 5


@dataclass(frozen=True)
class Publication:
    """What a push achieved."""

    root: int
    targets: int
    snapshot: int
    timestamp: int
    packages: tuple[str, ...]
    unchanged: bool

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "root": self.root,
            "targets": self.targets,
            "snapshot": self.snapshot,
            "timestamp": self.timestamp,
            "packages": list(self.packages),
            "unchanged": self.unchanged,
        }


class Registry:
    """The registry of one controller. Thread-safe: publications hold the store's lock, readers none.

    ``on_timestamp`` is called with the bytes of every new ``timestamp.json`` after it is durable, in the thread that
    published and under its lock, so that the last call has the newest; it must not raise.
    """

    def __init__(
        self,
        database: Database,
        store: RegistryStore,
        blobs: BlobFolder,
        signers: OnlineSigners,
        purposes: dict[KeyPurpose, str],
        *,
        timestamp_days: int = 7,
        snapshot_days: int = 30,
        on_timestamp: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        self.store = store
        self.blobs = blobs
        self.on_timestamp = on_timestamp
        self._database = database
        self._signers = signers
        self._own = OwnKeys(signers.snapshot.public_key.keyid, signers.timestamp.public_key.keyid, purposes)
        self._timestamp_days = timestamp_days
        self._snapshot_days = snapshot_days

    def accept_metadata(self, upload: Upload, principal_id: str, principal: str, now: datetime) -> Publication:
        """Publish what release signers have signed, and return the versions now in force.

        Pushing the same again changes nothing. One transaction of its own.

        Raises:
            GarrisonError: As ``rules.check_upload``; also NotFoundError ``registry.blobs_missing`` and ConflictError
                ``registry.version_reused`` (a version of a model never stands for two contents, not even over time).
        """
        with self.store.publishing():
            before = self.store.published()
            current = Current(self.store.root(), None if before is None else before.targets)
            accepted = rules.check_upload(current, upload, self._own, now)
            if accepted.unchanged and before is not None and _stamp_is_signed(accepted, before):
                return self._publication(accepted, before.timestamp.signed.version, unchanged=True)
            self._check_packages(accepted)
            signed = online.sign_all(
                self._signers,
                before,
                (accepted.targets.signed.version, _targets_bytes(accepted, before)),
                now,
                snapshot_days=self._snapshot_days,
                timestamp_days=self._timestamp_days,
            )
            self._write_invisible(accepted, signed)
            with self._database.session() as session:
                self._record(session, accepted, principal_id, principal, now)
            for version, data in accepted.roots:
                self.store.write_root(version, data)
            self.store.write_timestamp(signed.timestamp)
            self.on_timestamp(signed.timestamp)
        return self._publication(accepted, signed.timestamp_version, unchanged=False)

    def refresh_online(self, now: datetime) -> bool:
        """Sign snapshot and timestamp again where they are due; True if a new timestamp is published."""
        with self.store.publishing():
            root, published = self.store.root(), self.store.published()
            if root is None or published is None:
                return False
            if online.snapshot_due(root.signed, published, now, snapshot_days=self._snapshot_days):
                signed = online.sign_all(
                    self._signers,
                    published,
                    (published.targets.signed.version, published.targets_bytes),
                    now,
                    snapshot_days=self._snapshot_days,
                    timestamp_days=self._timestamp_days,
                )
            elif online.timestamp_due(root.signed, published, now, timestamp_days=self._timestamp_days):
                signed = online.sign_timestamp(self._signers, published, now, timestamp_days=self._timestamp_days)
            else:
                return False
            if signed.snapshot is not None:
                self.store.write_metadata("snapshot", *signed.snapshot)
            with self._database.session() as session:
                detail = {"timestamp": signed.timestamp_version}
                record_event(session, now, CONTROLLER, "registry.refresh", "timestamp", detail=detail)
            self.store.write_timestamp(signed.timestamp)
            self.on_timestamp(signed.timestamp)
        return True

    def current_timestamp(self) -> bytes | None:
        """Return ``timestamp.json`` as published, or None before the first publication."""
        return self.store.find_metadata(TIMESTAMP)

    def first_root(self) -> bytes:
        """Return ``1.root.json``, whose SHA-256 enrolment strings carry.

        Raises:
            NotFoundError: ``registry.empty``.
        """
        data = self.store.find_metadata("1.root.json")
        if data is None:
            raise _empty()
        return data

    def get_fleet(self) -> Fleet:
        """Return ``fleet.json`` as published.

        Raises:
            NotFoundError: ``registry.empty``.
        """
        published = self.store.published()
        if published is None:
            raise _empty()
        return parse_fleet(self.store.read_target(published.targets.signed.targets[FLEET_TARGET]))

    def status(self) -> dict[str, object]:
        """Return versions and expiries in force, for people and programs.

        Raises:
            NotFoundError: ``registry.empty``.
        """
        published, root = self.store.published(), self.store.root()
        if published is None or root is None:
            raise _empty()
        roles = {
            "root": root.signed,
            "targets": published.targets.signed,
            "snapshot": published.snapshot.signed,
            "timestamp": published.timestamp.signed,
        }
        fleet = self.get_fleet()
        return {
            "fleet": fleet.name,
            "first_root_sha256": sha256_hex(self.first_root()),
            "roles": {
                role: {
                    "version": signed.version,
                    "expires": signed.expires.isoformat(),
                    "keys": len(root.signed.roles[role].keyids),
                    "threshold": root.signed.roles[role].threshold,
                }
                for role, signed in roles.items()
            },
            "floors": fleet.floors,
            "targets": len(published.targets.signed.targets),
        }

    def _check_packages(self, accepted: Accepted) -> None:
        fleets = [one.document for one in accepted.new if isinstance(one.document, Fleet)]
        missing: list[str] = []
        for _, manifest in accepted.packages:
            rules.check_floor(fleets[0] if fleets else self.get_fleet(), manifest)
            missing.extend(self._missing_blobs(manifest))
        if missing:
            named = ", ".join(missing[:MAX_BLOBS_NAMED])
            raise NotFoundError(
                "registry.blobs_missing",
                f"{len(missing)} blobs of the new packages are not uploaded: {named}",
                hint="`garrison model publish` uploads them before the metadata",
                count=len(missing),
            )

    def _missing_blobs(self, manifest: Manifest) -> list[str]:
        missing = []
        for variant in manifest.variants:
            for file in variant.files:
                chunk_list = 32 * -(-file.size // file.chunk_size)
                for sha256, size in ((file.chunks_sha256, chunk_list), (file.sha256, file.size)):
                    if self.blobs.size(sha256) != size:
                        missing.append(sha256)
        return missing

    def _write_invisible(self, accepted: Accepted, signed: OnlineFiles) -> None:
        for one in accepted.new:
            self.store.write_target(one.target, one.data)
        if accepted.targets_bytes is not None:
            self.store.write_metadata("targets", accepted.targets.signed.version, accepted.targets_bytes)
        assert signed.snapshot is not None
        self.store.write_metadata("snapshot", *signed.snapshot)

    def _record(self, session: Session, accepted: Accepted, principal_id: str, principal: str, now: datetime) -> None:
        for one, manifest in accepted.packages:
            digest = target_digest(one.target)
            known = queries.find_package(session, manifest.name, manifest.version)
            if known is not None:
                if known.manifest_sha256 != digest:
                    raise ConflictError(
                        "registry.version_reused",
                        f"{manifest.id} was published before, with other content",
                        hint="pack it again under a new version",
                    )
                continue  # a push that was interrupted before its timestamp
            session.add(_package(one, manifest, accepted.targets.signed.version, (principal_id, principal), now))
            record_event(
                session,
                now,
                principal,
                "model.publish",
                manifest.id,
                detail={"manifest_sha256": digest, "license": manifest.license},
            )
        versions = {"root": accepted.root.signed.version, "targets": accepted.targets.signed.version}
        record_event(session, now, principal, "registry.publish", "metadata", detail=versions)

    def _publication(self, accepted: Accepted, timestamp: int, *, unchanged: bool) -> Publication:
        published = self.store.published()
        assert published is not None
        return Publication(
            accepted.root.signed.version,
            accepted.targets.signed.version,
            published.snapshot.signed.version,
            timestamp,
            tuple(manifest.id for _, manifest in accepted.packages),
            unchanged,
        )


def _stamp_is_signed(accepted: Accepted, published: Published) -> bool:
    """Tell whether the timestamp in force is signed by the root's key (not after a crash amid a rotation)."""
    stamp = published.timestamp
    return accepted.root.signed.get_verification_result("timestamp", stamp.signed_bytes, stamp.signatures).verified


def _targets_bytes(accepted: Accepted, published: Published | None) -> bytes:
    if accepted.targets_bytes is not None:
        return accepted.targets_bytes
    assert published is not None
    return published.targets_bytes


def _package(
    one: NewTarget, manifest: Manifest, targets_version: int, publisher: tuple[str, str], now: datetime
) -> Package:
    return Package(
        name=manifest.name,
        version=manifest.version,
        manifest_sha256=target_digest(one.target),
        alias=manifest.alias,
        manifest=one.data.decode(),
        size_bytes=sum(variant.size_bytes for variant in manifest.variants),
        published_at=now,
        published_by=publisher[0],
        published_by_name=publisher[1],
        targets_version=targets_version,
    )


def _empty() -> NotFoundError:
    return NotFoundError(
        "registry.empty",
        "nothing is published yet",
        hint="`garrison registry init`, sign, and `garrison registry push` come first",
    )
