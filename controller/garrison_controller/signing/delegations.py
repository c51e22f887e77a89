"""Delegations in a signers' workspace: hand model families to their own signers, change who they are, take them back.

Every change is a next version of the targets metadata, which its own signers must sign; what the family's signers must
sign besides is prepared along with it, so that no delegation is published that boards cannot follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from securesystemslib.signer import SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, Targets

from garrison_controller.signing.families import (
    TARGETS,
    check_delegations,
    check_paths,
    check_pattern,
    families,
    family_role,
    model_of,
)
from garrison_controller.signing.keys import signer_name
from garrison_controller.signing.metadata import parse_targets, to_bytes
from garrison_controller.signing.workspace import RoleKeys, Workspace
from garrison_protocol.errors import InvalidError, NotFoundError


@dataclass(frozen=True)
class Delegation:
    """One family's role, as the current targets metadata has it."""

    role: str
    paths: tuple[str, ...]
    signers: tuple[str, ...]
    keyids: tuple[str, ...]
    threshold: int
    version: int | None
    """Of its current metadata; None before the first."""
    packages: int
    pending: bool

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "role": self.role,
            "paths": list(self.paths),
            "signers": list(self.signers),
            "keyids": list(self.keyids),
            "threshold": self.threshold,
            "version": self.version,
            "packages": self.packages,
            "pending": self.pending,
        }


def add_delegation(
    workspace: Workspace,
    name: str,
    *,
    paths: Sequence[str],
    keys: Sequence[SSlibKey],
    threshold: int,
    days: int,
    now: datetime,
) -> list[str]:
    """Hand ``paths`` to the family ``name`` with these signers, or change what it has; return the roles to sign.

    Packages that are published already stay with the role that published them. Where the family's metadata is new,
    or its signers' signatures no longer suffice, its next version waits for them too.

    Raises:
        NotFoundError: ``signing.workspace_empty``.
        InvalidError: ``signing.name_invalid``, ``signing.threshold_invalid``, ``signing.key_twice``,
            ``registry.delegation_malformed``.
        ConflictError: ``registry.delegations_overlap``.
        RefusedError: ``registry.outside_delegation`` if the family has published what the new paths leave out.
    """
    role = family_role(name)
    if not paths:
        raise InvalidError("registry.delegation_malformed", f"{role} needs a path", hint="give --path")
    for pattern in paths:
        check_pattern(pattern)
    RoleKeys(role, tuple(keys), threshold).check()
    targets = _next_targets(workspace, days, now)
    known, delegations = _without(targets, role)
    for key in keys:
        delegations.keys[key.keyid] = key
    delegated = DelegatedRole(role, [key.keyid for key in keys], threshold, True, list(paths))
    assert delegations.roles is not None
    delegations.roles = {**delegations.roles, role: delegated}
    targets.delegations = delegations
    check_delegations(targets)
    family = None if known is None else workspace.current_family(role)  # one taken back before begins empty again
    if family is not None:
        check_paths(delegated, family.signed)
    workspace.propose(TARGETS, targets)
    kept = family is not None and (
        targets.get_verification_result(role, family.signed_bytes, family.signatures).verified
        and workspace.pending_targets(role) is None
    )
    if kept:
        return [TARGETS]
    _propose_next(workspace, role, Targets() if family is None else family.signed, days, now)
    return [TARGETS, role]


def renew_family(workspace: Workspace, name: str, *, days: int, now: datetime) -> int:
    """Prepare the next version of a family's metadata with the same packages and a later end; return the version.

    Raises:
        NotFoundError: ``signing.delegation_unknown``, ``signing.workspace_empty``.
        InvalidError: ``signing.name_invalid``.
    """
    role = family_role(name)
    family = workspace.current_family(role)
    if role not in families(workspace.current_targets().signed) or family is None:
        raise _unknown(role)
    return _propose_next(workspace, role, family.signed, days, now)


def remove_delegation(workspace: Workspace, name: str, *, days: int, now: datetime) -> list[str]:
    """Take the family ``name`` back; return the paths that the targets role takes over.

    Its published packages move into the targets metadata, whose signers approve them with it; those below their floor
    are let go. Its drafts are dropped.

    Raises:
        NotFoundError: ``signing.delegation_unknown``, ``signing.workspace_empty``.
        InvalidError: ``signing.name_invalid``.
    """
    role = family_role(name)
    targets = _next_targets(workspace, days, now)
    known, delegations = _without(targets, role)
    if known is None:
        raise _unknown(role)
    targets.delegations = delegations if delegations.roles else None
    published, fleet = workspace.published_targets(role), workspace.fleet()
    taken = {}
    for path, target in ({} if published is None else published.signed.targets).items():
        if not fleet.below_floor(*model_of(path)):
            taken[path] = target
    targets.targets.update(taken)
    workspace.drop_pending(role)
    workspace.propose(TARGETS, targets)
    return sorted(taken)


def list_delegations(workspace: Workspace) -> list[Delegation]:
    """Return every family's role of the current targets metadata, by name.

    Raises:
        NotFoundError: ``signing.workspace_empty``.
    """
    targets = workspace.current_targets().signed
    found = []
    for role, delegated in sorted(families(targets).items()):
        assert targets.delegations is not None
        keys = [targets.delegations.keys[keyid] for keyid in delegated.keyids]
        family = workspace.current_family(role)
        found.append(
            Delegation(
                role=role,
                paths=tuple(delegated.paths or ()),
                signers=tuple(signer_name(key) for key in keys),
                keyids=tuple(delegated.keyids),
                threshold=delegated.threshold,
                version=None if family is None else family.signed.version,
                packages=0 if family is None else len(family.signed.targets),
                pending=workspace.pending_targets(role) is not None,
            )
        )
    return found


def _next_targets(workspace: Workspace, days: int, now: datetime) -> Targets:
    current = parse_targets(to_bytes(workspace.current_targets())).signed
    if workspace.pending_targets() is None:
        current.version += 1
    current.expires = now.replace(microsecond=0) + timedelta(days=days)
    return current


def _propose_next(workspace: Workspace, role: str, draft: Targets, days: int, now: datetime) -> int:
    published = workspace.published_targets(role)
    draft.version = (0 if published is None else published.signed.version) + 1
    draft.expires = now.replace(microsecond=0) + timedelta(days=days)
    workspace.propose(role, draft)
    return draft.version


def _unknown(role: str) -> NotFoundError:
    return NotFoundError(
        "signing.delegation_unknown",
        f"nothing is delegated to {role}",
        hint="see `garrison registry delegate list`",
    )


def _without(targets: Targets, role: str) -> tuple[DelegatedRole | None, Delegations]:
    """Return ``role`` as delegated, if it is, and the delegations without it and without keys that only it had."""
    old = targets.delegations
    roles = families(targets)
    known = roles.pop(role, None)
    used = {keyid for other in roles.values() for keyid in other.keyids}
    keys = {} if old is None else {keyid: key for keyid, key in old.keys.items() if keyid in used}
    return known, Delegations(keys, roles)
