"""Whether uploaded metadata may become the registry's next version. PURE: bytes and ``now`` come in, decisions go out.

Signatures are checked by python-tuf against the *current* root; the order follows the TUF specification, section 5.3
(root) and 5.6 (targets, and the families that it delegates to). What boards would refuse is refused here already, with
a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from garrison_controller.signing.families import (
    all_targets,
    check_delegations,
    families,
    family_progress,
    is_family_role,
    model_of,
    refuse_unknown,
    refuse_unless_valid,
)
from garrison_controller.signing.metadata import (
    parse_root,
    parse_targets,
    read_target,
    refuse_expired,
    refuse_oversized_target,
    refuse_unsigned,
    root_progress,
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
    """What a publisher sends: new roots in order, new targets metadata, families' by role, new targets' by path."""

    roots: tuple[bytes, ...] = ()
    targets: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    families: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Current:
    """What is published now; None before the first upload."""

    root: Metadata[Root] | None
    targets: Metadata[Targets] | None
    families: Mapping[str, Metadata[Targets]] = field(default_factory=dict)
    """Those that ``targets`` delegates to, by role."""
    listed: Mapping[str, int] = field(default_factory=dict)
    """The version of every family that the snapshot lists, those that were taken back as well."""
    fleet: Fleet | None = None

    @property
    def every_target(self) -> dict[str, tuple[str, TargetFile]]:
        """Every published target with its role, by path."""
        if self.targets is None:
            return {}
        return all_targets(self.targets.signed, {role: one.signed for role, one in self.families.items()})


@dataclass(frozen=True)
class OwnKeys:
    """The controller's own keys, active and staged: TUF ids of the online roles', raw public keys (hex) of others."""

    snapshot: Collection[str]
    timestamp: Collection[str]
    purposes: Mapping[KeyPurpose, Collection[str]]


@dataclass(frozen=True)
class NewTarget:
    """A target that the upload adds or changes, and the role that names it."""

    role: str
    target: TargetFile
    data: bytes
    document: Manifest | Fleet


@dataclass(frozen=True)
class Accepted:
    """What to publish. ``roots``, ``targets_bytes``, and ``families`` are exactly the uploaded bytes."""

    roots: tuple[tuple[int, bytes], ...]
    root: Metadata[Root]
    targets: Metadata[Targets]
    targets_bytes: bytes | None
    """None if the published targets metadata stays."""
    new: tuple[NewTarget, ...]
    families: Mapping[str, tuple[int, bytes]]
    """New versions, by role."""

    @property
    def packages(self) -> list[tuple[NewTarget, Manifest]]:
        """The model packages among the new targets."""
        return [(one, one.document) for one in self.new if isinstance(one.document, Manifest)]

    @property
    def unchanged(self) -> bool:
        """Tell whether everything uploaded is published already."""
        return not self.roots and self.targets_bytes is None and not self.families


def check_upload(current: Current, upload: Upload, own: OwnKeys, now: datetime) -> Accepted:
    """Return what ``upload`` changes, if every rule holds.

    Raises:
        InvalidError: ``registry.metadata_malformed`` and other faults of form, ``registry.upload_empty``,
            ``registry.fleet_missing``, ``registry.delegation_malformed``, ``registry.delegation_nested``.
        ConflictError: ``registry.version_not_next`` (replayed, lower, or skipped versions),
            ``registry.target_removed``, ``registry.version_reused``, ``registry.delegations_overlap``,
            ``registry.family_missing``.
        RefusedError: ``registry.threshold_unmet``, ``registry.metadata_expired``, ``registry.target_changed``,
            ``registry.online_keys_not_delegated``, ``registry.fleet_lacks_keys``, ``registry.below_floor``,
            ``registry.role_unknown``, ``registry.outside_delegation``.
        NotFoundError: ``registry.target_missing`` if the bytes of a new target did not come along.
    """
    if not upload.roots and upload.targets is None and not upload.families:
        raise InvalidError("registry.upload_empty", "the upload holds neither root nor targets metadata")
    roots, root = _check_roots(current.root, upload.roots)
    if root is None:
        raise InvalidError("registry.root_missing", "the registry is empty and the upload holds no root metadata")
    refuse_expired("root", root.signed.expires, now)
    _check_online_roles(root.signed, own)
    targets, fresh = _check_targets(root.signed, current.targets, upload.targets, now)
    if not fresh:
        _check_still_signed(root.signed, targets)
    check_delegations(targets.signed)
    of_families = _check_families(targets.signed, current, upload.families, now)
    after = all_targets(targets.signed, {role: one.signed for role, one in of_families.items()})
    new = tuple(_new_targets(current.every_target, after, upload.files))
    _check_fleet(targets.signed, new, own, now)
    _check_removed(current, targets.signed, after, new)
    changed = {
        role: (one.signed.version, upload.families[role])
        for role, one in of_families.items()
        if one is not current.families.get(role)
    }
    return Accepted(roots, root, targets, upload.targets if fresh else None, new, changed)


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
    for role, keyids in (("snapshot", own.snapshot), ("timestamp", own.timestamp)):
        delegated = root.roles[role]
        if not set(keyids) & set(delegated.keyids) or delegated.threshold != 1:
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


def _check_families(
    targets: Targets, current: Current, uploaded: Mapping[str, bytes], now: datetime
) -> dict[str, Metadata[Targets]]:
    """Return the metadata of every family as it will be; where the upload brings nothing new, the published one."""
    found: dict[str, Metadata[Targets]] = {}
    for role, data in uploaded.items():
        refuse_unknown(targets, role)
        following, known = parse_targets(data, role), current.families.get(role)
        if known is not None and following.signed == known.signed and _signed(targets, role, known):
            continue  # the same push again
        refuse_unsigned(
            role, following.signed.version, family_progress(targets, role, current.listed.get(role), following)
        )
        refuse_expired(role, following.signed.expires, now)
        found[role] = following
    for role in families(targets):
        metadata = found.get(role) or current.families.get(role)
        if metadata is None:
            raise ConflictError(
                "registry.family_missing",
                f"the targets metadata delegates to {role}, which has published nothing",
                hint="its signers run `garrison registry sign`; then push targets and family together",
                role=role,
            )
        refuse_unless_valid(targets, role, metadata)
        found[role] = metadata
    return found


def _signed(targets: Targets, role: str, metadata: Metadata[Targets]) -> bool:
    return targets.get_verification_result(role, metadata.signed_bytes, metadata.signatures).verified


def _new_targets(
    before: Mapping[str, tuple[str, TargetFile]],
    after: Mapping[str, tuple[str, TargetFile]],
    files: Mapping[str, bytes],
) -> Iterator[NewTarget]:
    for path, (role, target) in sorted(after.items()):
        was = before[path][1] if path in before else None
        if was == target:
            continue
        refuse_oversized_target(target)
        data = files.get(path)
        if data is None:
            raise NotFoundError("registry.target_missing", f"the upload does not hold {path}")
        document = read_target(target, data)
        if was is not None and isinstance(document, Manifest):
            raise ConflictError(
                "registry.version_reused",
                f"{document.id} is published already, with other content",
                hint="pack it again under a new version",
            )
        yield NewTarget(role, target, data, document)


def _check_removed(
    current: Current, targets: Targets, after: Mapping[str, tuple[str, TargetFile]], new: tuple[NewTarget, ...]
) -> None:
    """Refuse to drop what boards may be running; only a family that is taken back leaves withdrawn versions behind."""
    fleets = [one.document for one in new if isinstance(one.document, Fleet)]
    fleet = fleets[0] if fleets else current.fleet
    kept = families(targets)
    for path, (role, _) in current.every_target.items():
        if path in after:
            continue
        taken_back = is_family_role(role) and role not in kept
        if not (taken_back and fleet is not None and fleet.below_floor(*model_of(path))):
            raise ConflictError(
                "registry.target_removed",
                f"{path} of {role} is dropped, which boards may be running",
                hint="withdraw versions with `garrison model floor`; `delegate remove` keeps all the others",
            )


def _check_fleet(targets: Targets, new: tuple[NewTarget, ...], own: OwnKeys, now: datetime) -> None:
    if FLEET_TARGET not in targets.targets:
        raise InvalidError("registry.fleet_missing", "the targets metadata names no fleet.json")
    for fleet in (one.document for one in new if isinstance(one.document, Fleet)):
        for purpose, publics in own.purposes.items():
            if all(fleet.public_key(purpose, key_id(public), now) is None for public in publics):
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
