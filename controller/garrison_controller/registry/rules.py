"""Whether uploaded metadata may become the registry's next version. PURE: bytes and ``now`` come in, decisions go out.

Signatures are checked by python-tuf against the *current* root; the order follows the TUF specification, section 5.3
(root) and 5.6 (targets). What boards would refuse is refused here already, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from garrison_controller.signing.metadata import (
    parse_root,
    parse_targets,
    read_target,
    refuse_expired,
    refuse_oversized_target,
    refuse_unsigned,
    root_progress,
    target_changes,
    targets_progress,
)
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET, Fleet
from garrison_protocol.keys import key_id
from garrison_protocol.manifest import Manifest
from garrison_protocol.states import KeyPurpose

MAX_ROOTS_PER_UPLOAD = 32


@dataclass(frozen=True)
class Upload:
    """What a publisher sends: new roots in order, new targets metadata, and the bytes of new targets by path."""

    roots: tuple[bytes, ...] = ()
    targets: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Current:
    """What is published now; both None before the first upload."""

    root: Metadata[Root] | None
    targets: Metadata[Targets] | None


@dataclass(frozen=True)
class OwnKeys:
    """The controller's own keys: TUF key ids of the online roles, raw public keys (hex) of the others."""

    snapshot: str
    timestamp: str
    purposes: Mapping[KeyPurpose, str]


@dataclass(frozen=True)
class NewTarget:
    """A target that the upload adds or changes."""

    target: TargetFile
    data: bytes
    document: Manifest | Fleet


@dataclass(frozen=True)
class Accepted:
    """What to publish. ``roots`` and ``targets_bytes`` are exactly the uploaded bytes."""

    roots: tuple[tuple[int, bytes], ...]
    root: Metadata[Root]
    targets: Metadata[Targets]
    targets_bytes: bytes | None
    """None if the published targets metadata stays."""
    new: tuple[NewTarget, ...]

    @property
    def packages(self) -> list[tuple[NewTarget, Manifest]]:
        """The model packages among the new targets."""
        return [(one, one.document) for one in self.new if isinstance(one.document, Manifest)]

    @property
    def unchanged(self) -> bool:
        """Tell whether everything uploaded is published already."""
        return not self.roots and self.targets_bytes is None


def check_upload(current: Current, upload: Upload, own: OwnKeys, now: datetime) -> Accepted:
    """Return what ``upload`` changes, if every rule holds.

    Raises:
        InvalidError: ``registry.metadata_malformed`` and other faults of form, ``registry.upload_empty``,
            ``registry.fleet_missing``.
        ConflictError: ``registry.version_not_next`` (replayed, lower, or skipped versions),
            ``registry.target_removed``, ``registry.version_reused``.
        RefusedError: ``registry.threshold_unmet``, ``registry.metadata_expired``, ``registry.target_changed``,
            ``registry.online_keys_not_delegated``, ``registry.fleet_lacks_keys``, ``registry.below_floor``.
        NotFoundError: ``registry.target_missing`` if the bytes of a new target did not come along.
    """
    if not upload.roots and upload.targets is None:
        raise InvalidError("registry.upload_empty", "the upload holds neither root nor targets metadata")
    roots, root = _check_roots(current.root, upload.roots)
    if root is None:
        raise InvalidError("registry.root_missing", "the registry is empty and the upload holds no root metadata")
    refuse_expired("root", root.signed.expires, now)
    _check_online_roles(root.signed, own)
    targets, fresh = _check_targets(root.signed, current.targets, upload.targets, now)
    if not fresh:
        _check_still_signed(root.signed, targets)
        return Accepted(roots, root, targets, None, ())
    new = tuple(_new_targets(current.targets, targets.signed, upload.files))
    _check_fleet(targets.signed, new, own, now)
    return Accepted(roots, root, targets, upload.targets, new)


def _check_roots(
    root: Metadata[Root] | None, uploaded: tuple[bytes, ...]
) -> tuple[tuple[tuple[int, bytes], ...], Metadata[Root] | None]:
    if len(uploaded) > MAX_ROOTS_PER_UPLOAD:
        raise InvalidError("registry.metadata_too_large", f"{len(uploaded)} roots in one upload")
    accepted = []
    for data in uploaded:
        following = parse_root(data)
        if root is not None and following.signed == root.signed:
            continue  # the same push again
        for result in root_progress(root, following):
            refuse_unsigned("root", following.signed.version, result)
        if not following.signed.consistent_snapshot:
            raise InvalidError("registry.metadata_malformed", "the root does not use consistent snapshots")
        root = following
        accepted.append((following.signed.version, data))
    return tuple(accepted), root


def _check_online_roles(root: Root, own: OwnKeys) -> None:
    for role, keyid in (("snapshot", own.snapshot), ("timestamp", own.timestamp)):
        delegated = root.roles[role]
        if keyid not in delegated.keyids or delegated.threshold != 1:
            raise RefusedError(
                "registry.online_keys_not_delegated",
                f"root version {root.version} does not let this controller's key sign {role} metadata alone",
                hint="make the root from this controller's online.json (`garrison serve init` writes it)",
                role=role,
            )


def _check_targets(
    root: Root, current: Metadata[Targets] | None, uploaded: bytes | None, now: datetime
) -> tuple[Metadata[Targets], bool]:
    if uploaded is None:
        if current is None:
            raise InvalidError("registry.targets_missing", "the registry is empty and the upload holds no targets")
        return current, False
    targets = parse_targets(uploaded)
    if current is not None and targets.signed == current.signed:
        return current, False
    refuse_unsigned("targets", targets.signed.version, targets_progress(root, current, targets))
    refuse_expired("targets", targets.signed.expires, now)
    return targets, True


def _check_still_signed(root: Root, targets: Metadata[Targets]) -> None:
    result = root.get_verification_result("targets", targets.signed_bytes, targets.signatures)
    refuse_unsigned("targets", targets.signed.version, result)


def _new_targets(
    current: Metadata[Targets] | None, targets: Targets, files: Mapping[str, bytes]
) -> Iterator[NewTarget]:
    for change in target_changes(None if current is None else current.signed, targets):
        if change.target is None:
            raise ConflictError(
                "registry.target_removed",
                f"targets version {targets.version} drops {change.path}, which boards may be running",
                hint="withdraw versions with `garrison model floor`",
            )
        refuse_oversized_target(change.target)
        data = files.get(change.path)
        if data is None:
            raise NotFoundError("registry.target_missing", f"the upload does not hold {change.path}")
        document = read_target(change.target, data)
        if change.before is not None and isinstance(document, Manifest):
            raise ConflictError(
                "registry.version_reused",
                f"{document.id} is published already, with other content",
                hint="pack it again under a new version",
            )
        yield NewTarget(change.target, data, document)


def _check_fleet(targets: Targets, new: tuple[NewTarget, ...], own: OwnKeys, now: datetime) -> None:
    if FLEET_TARGET not in targets.targets:
        raise InvalidError("registry.fleet_missing", "the targets metadata names no fleet.json")
    for fleet in (one.document for one in new if isinstance(one.document, Fleet)):
        for purpose, public in own.purposes.items():
            if fleet.public_key(purpose, key_id(public), now) is None:
                raise RefusedError(
                    "registry.fleet_lacks_keys",
                    f"fleet.json does not let this controller's {purpose.value} key sign now",
                    hint="boards would refuse this controller; list its keys from online.json",
                    purpose=purpose.value,
                )


def check_floor(fleet: Fleet, manifest: Manifest) -> None:
    """Refuse to publish a version that boards may not install.

    Raises:
        RefusedError: ``registry.below_floor``.
    """
    if fleet.below_floor(manifest.name, manifest.version):
        raise RefusedError(
            "registry.below_floor",
            f"{manifest.id} is below the floor {fleet.floors[manifest.name]} in fleet.json",
            hint="publish a version at or above the floor",
        )
