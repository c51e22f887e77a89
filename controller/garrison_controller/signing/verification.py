"""Whether everything in a workspace holds: checked from its first root on, with no network and no controller."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Metadata, Root, Targets

from garrison_controller.signing.families import (
    TARGETS,
    check_delegations,
    families,
    is_family_role,
    refuse_unless_valid,
)
from garrison_controller.signing.metadata import parse_root, parse_targets, read_target, refuse_unsigned
from garrison_controller.signing.review import Review, review
from garrison_controller.signing.workspace import Workspace, first_root_sha256
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET


@dataclass(frozen=True)
class Verified:
    """What was found to hold."""

    first_root_sha256: str
    versions: dict[str, int]
    """Newest published version of each role."""
    expired: tuple[str, ...]
    """Published roles whose time is over; everything else about them holds."""
    targets: int
    pending: tuple[Review, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "first_root_sha256": self.first_root_sha256,
            "versions": self.versions,
            "expired": list(self.expired),
            "targets": self.targets,
            "pending": [one.to_dict() for one in self.pending],
        }


def verify_workspace(workspace: Workspace, now: datetime, first_root: str | None = None) -> Verified:
    """Return what ``workspace`` holds, if all of it follows from its first root.

    Signatures and thresholds of every root and of every published role, the bytes of every target, and that what is
    pending follows what is published. ``first_root`` is the SHA-256 that 1.root.json must have.

    Raises:
        RefusedError: ``signing.first_root_mismatch``, ``registry.threshold_unmet``, ``registry.target_changed``, and
            others of ``families`` and ``review``.
        ConflictError: ``registry.version_not_next``.
        NotFoundError: ``signing.workspace_empty``, ``signing.target_missing``.
        InvalidError: ``registry.metadata_malformed``, ``registry.version_mislabelled``, ``registry.fleet_missing``.
    """
    digest = first_root_sha256(workspace)
    if not digest:
        raise NotFoundError(
            "signing.workspace_empty", f"{workspace.folder} holds no registry", hint="name the folder with --workspace"
        )
    if first_root is not None and digest != first_root:
        raise RefusedError(
            "signing.first_root_mismatch",
            f"1.root.json of {workspace.folder} has the SHA-256 {digest}",
            hint="this is another registry, or the digest is mistyped",
        )
    for folder in ("metadata", "pending"):
        for path in sorted((workspace.folder / folder).glob("*.json")):
            _refuse_mislabelled(path)
    versions, expired = {}, []
    for role, signed in _published(workspace).items():
        versions[role] = signed.version
        if signed.expires <= now:
            expired.append(role)
    pending = _pending(workspace, now)
    return Verified(digest, versions, tuple(expired), _check_targets(workspace), pending)


def _published(workspace: Workspace) -> dict[str, Root | Targets]:
    """Return what is published, by role, after verifying it."""
    root, targets = workspace.published_root(), workspace.published_targets()
    if root is None:
        if targets is not None:
            raise NotFoundError("signing.workspace_empty", f"{workspace.folder} has targets metadata and no root")
        return {}
    found: dict[str, Root | Targets] = {"root": root.signed}
    if targets is None:
        return found
    result = root.signed.get_verification_result(TARGETS, targets.signed_bytes, targets.signatures)
    refuse_unsigned(TARGETS, targets.signed.version, result)
    check_delegations(targets.signed)
    if FLEET_TARGET not in targets.signed.targets:
        raise InvalidError("registry.fleet_missing", "the targets metadata names no fleet.json")
    found[TARGETS] = targets.signed
    for role in families(targets.signed):
        family = workspace.published_targets(role)
        if family is not None:
            refuse_unless_valid(targets.signed, role, family)
            found[role] = family.signed
    return found


def _refuse_mislabelled(path: Path) -> None:
    """Refuse a metadata file whose name says another version than its content, or no role of ours."""
    version, _, role = path.name.removesuffix(".json").partition(".")
    if role == "root":
        held = parse_root(path.read_bytes()).signed.version
    elif role == TARGETS or is_family_role(role):
        held = parse_targets(path.read_bytes(), role).signed.version
    else:
        raise InvalidError("registry.metadata_malformed", f"{path.name} is of no role of a registry")
    if str(held) != version:
        raise InvalidError("registry.version_mislabelled", f"{path.name} holds version {held}")


def _pending(workspace: Workspace, now: datetime) -> tuple[Review, ...]:
    try:
        return tuple(review(workspace, now))
    except ConflictError as error:
        if error.code != "signing.nothing_pending":
            raise
        return ()


def _check_targets(workspace: Workspace) -> int:
    checked = set()
    for metadata in all_targets(workspace):
        for target in metadata.signed.targets.values():
            read_target(target, workspace.target_bytes(target))
            checked.add(target.path)
    return len(checked)


def all_targets(workspace: Workspace) -> list[Metadata[Targets]]:
    """Return the targets metadata that ``workspace`` stands for: published and pending, families only if delegated."""
    found = [workspace.published_targets(), workspace.pending_targets()]
    delegated = {role for metadata in found if metadata is not None for role in families(metadata.signed)}
    for role in sorted(delegated):
        found += [workspace.published_targets(role), workspace.pending_targets(role)]
    return [one for one in found if one is not None]
