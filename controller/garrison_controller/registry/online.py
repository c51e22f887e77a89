"""The two online roles: snapshot and timestamp metadata, signed with the controller's keys."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Timestamp

from garrison_controller.registry.store import Published
from garrison_controller.signing.metadata import to_bytes
from garrison_protocol.errors import RefusedError
from garrison_protocol.keys import refuse_if_readable_by_others

TIMESTAMP_AGE = timedelta(days=1)
"""A timestamp older than this is signed again, though it is still valid for days."""


@dataclass(frozen=True)
class OnlineSigners:
    """The keys of both online roles."""

    snapshot: CryptoSigner
    timestamp: CryptoSigner

    @classmethod
    def load(cls, keys_dir: Path) -> OnlineSigners:
        """Return the signers with the keys ``snapshot.key`` and ``timestamp.key`` (PKCS#8, mode 0600).

        Raises:
            RefusedError: ``key.readable_by_others``, ``key.wrong_type``.
        """
        return cls(_load(keys_dir / "snapshot.key"), _load(keys_dir / "timestamp.key"))


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
) -> OnlineFiles:
    """Return new snapshot and timestamp metadata that lead to ``targets`` (version, bytes)."""
    now = now.replace(microsecond=0)
    version = 1 if before is None else before.snapshot.signed.version + 1
    meta = {"targets.json": MetaFile.from_data(targets[0], targets[1], ["sha256"])}
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


def snapshot_due(root: Root, published: Published, now: datetime, *, snapshot_days: int) -> bool:
    """Tell whether the snapshot must be signed again: half of its time is over, or the root has another key."""
    snapshot = published.snapshot
    verified = root.get_verification_result("snapshot", snapshot.signed_bytes, snapshot.signatures)
    return not verified or snapshot.signed.expires - now < timedelta(days=snapshot_days) / 2


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


def _load(path: Path) -> CryptoSigner:
    refuse_if_readable_by_others(path)
    private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(private, Ed25519PrivateKey):
        raise RefusedError("key.wrong_type", f"{path} holds no Ed25519 key", hint="`garrison serve init` makes it")
    return CryptoSigner(private)
