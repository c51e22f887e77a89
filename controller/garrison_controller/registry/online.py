"""The two online roles: snapshot and timestamp metadata, signed with the controller's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Timestamp

from garrison_controller.registry.store import Published
from garrison_controller.signing.metadata import to_bytes

TIMESTAMP_AGE = timedelta(days=1)
"""A timestamp older than this is signed again, though it is still valid for days."""


@dataclass(frozen=True)
class OnlineSigners:
    """The keys of both online roles, and those that stand by (``staged``) until a root names them instead."""

    snapshot: CryptoSigner
    timestamp: CryptoSigner
    staged_snapshot: CryptoSigner | None = None
    staged_timestamp: CryptoSigner | None = None

    def keyids(self, role: str) -> frozenset[str]:
        """Return the TUF ids of the active and the staged key of ``role`` (snapshot or timestamp)."""
        return frozenset(one.public_key.keyid for one in self._candidates(role))

    def named_by(self, root: Root) -> OnlineSigners:
        """Return the signers whose keys ``root`` names; where it names neither key of a role, the active one stays."""
        return OnlineSigners(self._named(root, "snapshot"), self._named(root, "timestamp"))

    def _named(self, root: Root, role: str) -> CryptoSigner:
        candidates = self._candidates(role)
        named = (one for one in candidates if one.public_key.keyid in root.roles[role].keyids)
        return next(named, candidates[0])

    def _candidates(self, role: str) -> list[CryptoSigner]:
        active, staged = (
            (self.snapshot, self.staged_snapshot) if role == "snapshot" else (self.timestamp, self.staged_timestamp)
        )
        return [active] if staged is None else [active, staged]


@dataclass(frozen=True)
class OnlineFiles:
    """What to write, ``timestamp`` last; ``snapshot`` is None where the published one stays."""

    snapshot: tuple[int, bytes] | None
    timestamp: bytes
    timestamp_version: int


def sign_all(
    signers: OnlineSigners,
    before: Published | None,
    targets: tuple[int, bytes],
    now: datetime,
    *,
    snapshot_days: int,
    timestamp_days: int,
    families: Mapping[str, tuple[int, bytes]] | None = None,
) -> OnlineFiles:
    """Return new snapshot and timestamp metadata that lead to ``targets`` and new ``families`` (version, bytes).

    What the snapshot listed before stays in it, families that were taken back as well: TUF's clients refuse a
    snapshot that forgets (specification, 5.5.5).
    """
    now = now.replace(microsecond=0)
    version = 1 if before is None else before.snapshot.signed.version + 1
    meta = {} if before is None else dict(before.snapshot.signed.meta)
    for role, (number, content) in {"targets": targets, **(families or {})}.items():
        meta[f"{role}.json"] = MetaFile.from_data(number, content, ["sha256"])
    snapshot = Metadata(Snapshot(version=version, expires=now + timedelta(days=snapshot_days), meta=meta))
    snapshot.sign(signers.snapshot)
    data = to_bytes(snapshot)
    stamp = _timestamp(signers, before, MetaFile.from_data(version, data, ["sha256"]), now, timestamp_days)
    return OnlineFiles((version, data), to_bytes(stamp), stamp.signed.version)


def sign_timestamp(signers: OnlineSigners, before: Published, now: datetime, *, timestamp_days: int) -> OnlineFiles:
    """Return a newer timestamp that leads to the same snapshot."""
    now = now.replace(microsecond=0)
    stamp = _timestamp(signers, before, before.timestamp.signed.snapshot_meta, now, timestamp_days)
    return OnlineFiles(None, to_bytes(stamp), stamp.signed.version)


def carry_timestamp(signers: OnlineSigners, root: Root, published: Published, until: datetime) -> bytes:
    """Return the timestamp in force with another expiry: ``until``, but before root, snapshot, or targets end.

    Families do not count: a board judges each by itself, and one that has expired must not spoil the bundle.
    """
    parts = (root, published.snapshot.signed, published.targets.signed)
    expires = min(until.replace(microsecond=0), *(part.expires for part in parts))
    before = published.timestamp.signed
    stamp = Metadata(Timestamp(version=before.version, expires=expires, snapshot_meta=before.snapshot_meta))
    stamp.sign(signers.timestamp)
    return to_bytes(stamp)


def snapshot_due(
    root: Root, published: Published, now: datetime, *, snapshot_days: int, until: datetime | None = None
) -> bool:
    """Tell whether the snapshot must be signed again.

    Half of its time is over, or the root has another key, or it ends before ``until``, and a new one would not.
    """
    snapshot = published.snapshot
    verified = root.get_verification_result("snapshot", snapshot.signed_bytes, snapshot.signatures)
    life = timedelta(days=snapshot_days)
    ends = snapshot.signed.expires
    early = until is not None and ends < min(until, now + life - timedelta(hours=1))
    return not verified or ends - now < life / 2 or early


def timestamp_due(root: Root, published: Published, now: datetime, *, timestamp_days: int) -> bool:
    """Tell whether the timestamp must be signed again: it is a day old, or the root has another key."""
    stamp = published.timestamp
    verified = root.get_verification_result("timestamp", stamp.signed_bytes, stamp.signatures)
    age_limit = min(TIMESTAMP_AGE, timedelta(days=timestamp_days) / 2)
    return not verified or stamp.signed.expires - now <= timedelta(days=timestamp_days) - age_limit


def _timestamp(
    signers: OnlineSigners, before: Published | None, snapshot: MetaFile, now: datetime, days: int
) -> Metadata[Timestamp]:
    version = 1 if before is None else before.timestamp.signed.version + 1
    stamp = Metadata(Timestamp(version=version, expires=now + timedelta(days=days), snapshot_meta=snapshot))
    stamp.sign(signers.timestamp)
    return stamp
