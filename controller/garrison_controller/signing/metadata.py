"""TUF metadata as Garrison reads, checks, and writes it, on python-tuf's public Metadata API.

Shared by the signers' workspace and by the controller, so that both judge by the same rules. No clock is read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import Key
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp, VerificationResult
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from garrison_controller.signing.keys import is_rightly_named
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET, MAX_FLEET_BYTES, Fleet, parse_fleet
from garrison_protocol.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, target_path

MAX_ROOT_BYTES = 512_000
UNFINISHED = ".new"
"""What ends the name of a file that is being written."""
MAX_TARGETS_BYTES = 5_000_000
"""What python-tuf's client accepts by default."""

_COMPACT = JSONSerializer(compact=True)
_MODEL_PATH = re.compile(r"models/([^/]+)/([^/]+)/manifest\.json")


def to_bytes(metadata: Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]) -> bytes:
    """Return the compact JSON of ``metadata``."""
    return metadata.to_bytes(_COMPACT)


def file_name(role: str, version: int) -> str:
    """Return the name of a metadata file in a repository with consistent snapshots."""
    return f"{version}.{role}.json"


def parse_root(data: bytes) -> Metadata[Root]:
    """Return the root metadata in ``data``, unverified.

    Raises:
        InvalidError: ``registry.metadata_malformed``, ``registry.metadata_too_large``, ``registry.key_misnamed``.
    """
    _bound(data, MAX_ROOT_BYTES, "root")
    try:
        metadata = Metadata[Root].from_bytes(data)
    except (DeserializationError, RecursionError) as error:
        raise _malformed("root") from error
    if metadata.signed.type != "root":
        raise _malformed("root")
    _refuse_misnamed(metadata.signed.keys, "root")
    return metadata


def parse_targets(data: bytes, role: str = "targets") -> Metadata[Targets]:
    """Return the targets metadata of ``role`` (the top one, or one that it delegates to) in ``data``, unverified.

    Raises:
        InvalidError: ``registry.metadata_malformed``, ``registry.metadata_too_large``, ``registry.key_misnamed``,
            ``registry.delegation_nested``: only the top role delegates.
    """
    _bound(data, MAX_TARGETS_BYTES, role)
    try:
        metadata = Metadata[Targets].from_bytes(data)
    except (DeserializationError, RecursionError) as error:
        raise _malformed(role) from error
    if metadata.signed.type != "targets":
        raise _malformed(role)
    if role != "targets" and metadata.signed.delegations is not None:
        raise InvalidError(
            "registry.delegation_nested",
            f"{role} delegates further, which boards refuse",
            hint="only the targets role delegates: `garrison registry delegate add`",
        )
    if metadata.signed.delegations is not None:
        _refuse_misnamed(metadata.signed.delegations.keys, role)
    return metadata


def root_progress(previous: Metadata[Root] | None, root: Metadata[Root]) -> list[VerificationResult]:
    """Return who has signed ``root``: by the rules of ``previous`` (if any), then by its own.

    Raises:
        ConflictError: ``registry.version_not_next``.
    """
    require_next_version("root", None if previous is None else previous.signed.version, root.signed.version)
    own = root.signed.get_verification_result("root", root.signed_bytes, root.signatures)
    if previous is None:
        return [own]
    return [previous.signed.get_verification_result("root", root.signed_bytes, root.signatures), own]


def targets_progress(root: Root, previous: Metadata[Targets] | None, targets: Metadata[Targets]) -> VerificationResult:
    """Return who has signed ``targets`` by the rules of ``root``.

    Raises:
        ConflictError: ``registry.version_not_next``.
    """
    require_next_version("targets", None if previous is None else previous.signed.version, targets.signed.version)
    return root.get_verification_result("targets", targets.signed_bytes, targets.signatures)


def refuse_unsigned(role: str, version: int, result: VerificationResult) -> None:
    """Refuse metadata that too few of its keys have signed.

    Raises:
        RefusedError: ``registry.threshold_unmet``.
    """
    if not result.verified:
        raise RefusedError(
            "registry.threshold_unmet",
            f"{role} version {version} has {len(result.signed)} valid of {result.threshold} needed signatures",
            hint="another signer runs `garrison registry sign`, then push again",
            role=role,
            version=version,
            signed=len(result.signed),
            threshold=result.threshold,
        )


def refuse_expired(role: str, expires: datetime, now: datetime) -> None:
    """Refuse to sign or publish what no board would accept any more.

    Raises:
        RefusedError: ``registry.metadata_expired``.
    """
    if expires <= now:
        raise RefusedError(
            "registry.metadata_expired",
            f"{role} metadata expired on {expires:%Y-%m-%d}",
            hint="make a new version and have it signed",
            role=role,
        )


@dataclass(frozen=True)
class TargetChange:
    """One difference between two versions of targets metadata; ``target`` is None where it was removed."""

    kind: str
    path: str
    target: TargetFile | None
    before: TargetFile | None


def target_changes(before: Targets | None, after: Targets) -> list[TargetChange]:
    """Return what ``after`` adds, changes, and removes, by path."""
    old = {} if before is None else before.targets
    changes = []
    for path in sorted(old.keys() | after.targets.keys()):
        was, now = old.get(path), after.targets.get(path)
        if now is None:
            changes.append(TargetChange("removed", path, None, was))
        elif was is None:
            changes.append(TargetChange("added", path, now, None))
        elif was != now:
            changes.append(TargetChange("changed", path, now, was))
    return changes


def target_digest(target: TargetFile) -> str:
    """Return the SHA-256 of a target.

    Raises:
        InvalidError: ``registry.metadata_malformed`` if the metadata states none.
    """
    digest = target.hashes.get("sha256")
    if digest is None or re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise InvalidError("registry.metadata_malformed", f"the target {target.path} has no SHA-256")
    return digest


def read_target(target: TargetFile, data: bytes) -> Manifest | Fleet:
    """Return the document that ``target`` names, after checking its bytes, path, and content against each other.

    Raises:
        RefusedError: ``registry.target_changed`` if ``data`` is not what the metadata names.
        InvalidError: ``registry.target_path``, ``registry.target_mismatch``, ``manifest.*``, ``fleet.malformed``.
    """
    if len(data) != target.length or sha256_hex(data) != target_digest(target):
        raise RefusedError("registry.target_changed", f"{target.path} does not hold the bytes that the metadata names")
    if target.path == FLEET_TARGET:
        return parse_fleet(data)
    match = _MODEL_PATH.fullmatch(target.path)
    if match is None:
        raise InvalidError("registry.target_path", f"{target.path} is neither fleet.json nor a model's manifest")
    manifest = parse_manifest(data)
    if target_path(manifest.name, manifest.version) != target.path:
        raise InvalidError("registry.target_mismatch", f"{target.path} holds the manifest of {manifest.id}")
    return manifest


def refuse_oversized_target(target: TargetFile) -> None:
    """Refuse a target that boards would not read.

    Raises:
        InvalidError: ``registry.target_too_large``.
    """
    limit = MAX_FLEET_BYTES if target.path == FLEET_TARGET else MAX_MANIFEST_BYTES
    if target.length > limit:
        raise InvalidError("registry.target_too_large", f"{target.path} has {target.length} bytes, more than {limit}")


def prefixed_path(target: TargetFile) -> str:
    """Return where a repository with consistent snapshots keeps ``target``: its digest before its file name."""
    folder, slash, name = target.path.rpartition("/")
    return f"{folder}{slash}{target_digest(target)}.{name}"


def write_durable(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that a power cut leaves either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + UNFINISHED)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_next_version(role: str, current: int | None, new: int) -> None:
    """Refuse a version that does not follow ``current`` (None: there is none yet).

    Raises:
        ConflictError: ``registry.version_not_next``.
    """
    if new != (current or 0) + 1:
        raise ConflictError(
            "registry.version_not_next",
            f"{role} version {new} does not follow version {current or 0}",
            hint="`garrison registry pull` fetches what is published; then make the change again",
            role=role,
            current=current or 0,
            version=new,
        )


def _bound(data: bytes, limit: int, role: str) -> None:
    if len(data) > limit:
        raise InvalidError("registry.metadata_too_large", f"{role} metadata of {len(data)} bytes, more than {limit}")


def _refuse_misnamed(keys: Mapping[str, Key], role: str) -> None:
    for keyid, key in keys.items():
        if not is_rightly_named(key):
            raise InvalidError(
                "registry.key_misnamed",
                f"{role} metadata puts another key, or one of no kind of ours, under the id {keyid[:64]}",
                hint="sign nothing: whoever made it passes a key off as somebody else's",
                role=role,
            )


def _malformed(role: str) -> GarrisonError:
    return InvalidError("registry.metadata_malformed", f"this is no {role} metadata")
