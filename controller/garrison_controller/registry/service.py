"""Use cases of the model registry: accept what signers made, and keep it fresh.

Order of a publication: files that nobody can see yet, then the database transaction, then ``timestamp.json``. A crash
in between leaves the old version published, and pushing the same metadata again completes the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Root

from garrison_controller.access.events import record_event
from garrison_controller.db.base import Database
from garrison_controller.registry import online, queries, rules
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.online import OnlineFiles, OnlineSigners
from garrison_controller.registry.rules import Accepted, Current, NewTarget, OwnKeys, Upload
from garrison_controller.registry.store import TIMESTAMP, Published, RegistryStore
from garrison_controller.registry.tables import Package
from garrison_controller.signing.families import families
from garrison_controller.signing.metadata import target_digest
from garrison_controller.signing.provenance import check_signature
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
    families: Mapping[str, int] = field(default_factory=dict)
    """New versions of families' metadata, by role."""

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "root": self.root,
            "targets": self.targets,
            "snapshot": self.snapshot,
            "timestamp": self.timestamp,
            "families": dict(self.families),
            "packages": list(self.packages),
            "unchanged": self.unchanged,
        }


class Registry:
    """The registry of one controller. Thread-safe: publications hold the store's lock, readers none.

    ``on_timestamp`` is called with the bytes of every new ``timestamp.json`` after it is durable, in the thread that
    published and under its lock, so that the last call has the newest; it must not raise. ``on_published`` is called
    after that with the root and fleet.json that a push has put in force, by the same rules.

    ``signers`` and ``purposes`` (raw public keys in hex, active and staged) are asked anew each time: keys may be
    rotated while the controller runs. ``check_fleet`` raises if a fleet.json would cut boards off from it.
    """

    def __init__(
        self,
        database: Database,
        store: RegistryStore,
        blobs: BlobFolder,
        signers: Callable[[], OnlineSigners],
        purposes: Callable[[], Mapping[KeyPurpose, Collection[str]]],
        *,
        timestamp_days: int = 7,
        snapshot_days: int = 30,
        on_timestamp: Callable[[bytes], None] = lambda _: None,
        on_published: Callable[[Root, Fleet], None] = lambda _root, _fleet: None,
        check_fleet: Callable[[Fleet], None] = lambda _: None,
    ) -> None:
        self.store = store
        self.blobs = blobs
        self.on_timestamp = on_timestamp
        self.on_published = on_published
        self._check_fleet = check_fleet
        self._database = database
        self._signers = signers
        self._purposes = purposes
        self._timestamp_days = timestamp_days
        self._snapshot_days = snapshot_days

    def accept_metadata(self, upload: Upload, principal_id: str, principal: str, now: datetime) -> Publication:
        """Publish what release signers have signed, and return the versions now in force.

        Pushing the same again changes nothing. One transaction of its own.

        Raises:
            GarrisonError: As ``rules.check_upload`` and ``check_fleet``; also NotFoundError ``registry.blobs_missing``
                and ConflictError ``registry.version_reused`` (a version of a model never stands for two contents, not
                even over time).
        """
        with self.store.publishing():
            before = self.store.published()
            current = _current(self.store.root(), before, None if before is None else self.get_fleet())
            signers = self._signers()
            own = OwnKeys(signers.keyids("snapshot"), signers.keyids("timestamp"), self._purposes())
            accepted = rules.check_upload(current, upload, own, now)
            if accepted.unchanged and before is not None and _stamp_is_signed(accepted, before):
                return self._publication(accepted, before.timestamp.signed.version, unchanged=True)
            self._check_packages(accepted)
            signed = online.sign_all(
                signers.named_by(accepted.root.signed),
                before,
                (accepted.targets.signed.version, _targets_bytes(accepted, before)),
                now,
                snapshot_days=self._snapshot_days,
                timestamp_days=self._timestamp_days,
                families=accepted.families,
            )
            self._write_invisible(accepted, signed)
            with self._database.session() as session:
                self._record(session, accepted, principal_id, principal, now)
            for version, data in accepted.roots:
                self.store.write_root(version, data)
            self.store.write_timestamp(signed.timestamp)
            self.on_timestamp(signed.timestamp)
            self.on_published(accepted.root.signed, self.get_fleet())
        return self._publication(accepted, signed.timestamp_version, unchanged=False)

    def carry_timestamp(self, now: datetime, days: int) -> bytes:
        """Return the timestamp in force signed again for ``days``, for a bundle; nothing of it is published.

        It has the same version, and ends before anything that it leads to; a snapshot that would end within ``days``
        is signed and published again first.

        Raises:
            NotFoundError: ``registry.empty``.
        """
        until = now + timedelta(days=days)
        self.refresh_online(now, until=until)
        with self.store.publishing():
            root, published = self.store.root(), self.store.published()
            if root is None or published is None:
                raise _empty()
            return online.carry_timestamp(self._signers().named_by(root.signed), root.signed, published, until)

    def refresh_online(self, now: datetime, *, until: datetime | None = None) -> bool:
        """Sign snapshot and timestamp again where they are due; True if a new timestamp is published.

        With ``until`` the snapshot is due already if it ends before that and a new one would end later.
        """
        with self.store.publishing():
            root, published = self.store.root(), self.store.published()
            if root is None or published is None:
                return False
            signers = self._signers().named_by(root.signed)
            if online.snapshot_due(root.signed, published, now, snapshot_days=self._snapshot_days, until=until):
                signed = online.sign_all(
                    signers,
                    published,
                    (published.targets.signed.version, published.targets_bytes),
                    now,
                    snapshot_days=self._snapshot_days,
                    timestamp_days=self._timestamp_days,
                )
            elif online.timestamp_due(root.signed, published, now, timestamp_days=self._timestamp_days):
                signed = online.sign_timestamp(signers, published, now, timestamp_days=self._timestamp_days)
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
            "families": {
                role: {
                    "version": published.families[role].signed.version,
                    "expires": published.families[role].signed.expires.isoformat(),
                    "keys": len(delegated.keyids),
                    "threshold": delegated.threshold,
                    "paths": delegated.paths,
                    "targets": len(published.families[role].signed.targets),
                }
                for role, delegated in families(published.targets.signed).items()
            },
            "floors": fleet.floors,
            "targets": len(published.every_target),
        }

    def _check_packages(self, accepted: Accepted) -> None:
        fleets = [one.document for one in accepted.new if isinstance(one.document, Fleet)]
        for fleet in fleets:
            self._check_fleet(fleet)
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
        for _, manifest in accepted.packages:
            signature = manifest.provenance.signature
            if signature is not None:
                check_signature(manifest, self.blobs.path(signature.bundle_sha256).read_bytes())

    def _missing_blobs(self, manifest: Manifest) -> list[str]:
        missing = []
        for variant in manifest.variants:
            for file in variant.files:
                chunk_list = 32 * -(-file.size // file.chunk_size)
                for sha256, size in ((file.chunks_sha256, chunk_list), (file.sha256, file.size)):
                    if self.blobs.size(sha256) != size:
                        missing.append(sha256)
        signature = manifest.provenance.signature
        if signature is not None and self.blobs.size(signature.bundle_sha256) != signature.bundle_size:
            missing.append(signature.bundle_sha256)
        return missing

    def _write_invisible(self, accepted: Accepted, signed: OnlineFiles) -> None:
        for one in accepted.new:
            self.store.write_target(one.target, one.data)
        if accepted.targets_bytes is not None:
            self.store.write_metadata("targets", accepted.targets.signed.version, accepted.targets_bytes)
        for role, (version, data) in accepted.families.items():
            self.store.write_metadata(role, version, data)
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
            version, _ = accepted.families.get(one.role, (accepted.targets.signed.version, b""))
            session.add(_package(one, manifest, version, (principal_id, principal), now))
            record_event(
                session,
                now,
                principal,
                "model.publish",
                manifest.id,
                detail={"manifest_sha256": digest, "license": manifest.license, "role": one.role},
            )
        versions = {"root": accepted.root.signed.version, "targets": accepted.targets.signed.version}
        versions |= {role: version for role, (version, _) in accepted.families.items()}
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
            {role: version for role, (version, _) in accepted.families.items()},
        )


def _current(root: Metadata[Root] | None, published: Published | None, fleet: Fleet | None) -> Current:
    if published is None:
        return Current(root, None)
    return Current(root, published.targets, published.families, published.listed, fleet)


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
