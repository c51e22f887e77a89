"""Roles, permissions, and the two questions about them. PURE: no I/O, ``now`` is passed in.

A grant gives one principal one role within a scope, a group path such as ``/eu/plant1/``. Nothing is allowed that
no grant allows; there are no denying grants, so a union never narrows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from garrison_protocol.errors import InvalidError

FLEET = "/"
"""The scope that holds every group."""
_SCOPE = re.compile(r"/([a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?/)*")
MAX_SCOPE_LENGTH = 256
TOKEN_DAYS = 90
"""How long a token lasts unless told otherwise."""
MAX_TOKEN_DAYS = 366
_PRINCIPAL = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")


class Permission(StrEnum):
    """What a call needs."""

    DEVICE_READ = "device.read"
    DEVICE_ENROL = "device.enrol"
    DEVICE_REVOKE = "device.revoke"
    MODEL_READ = "model.read"
    MODEL_PUBLISH = "model.publish"
    ROLLOUT_READ = "rollout.read"
    ROLLOUT_CREATE = "rollout.create"
    ROLLOUT_OPERATE = "rollout.operate"
    ROLLOUT_APPROVE = "rollout.approve"
    AUDIT_READ = "audit.read"
    BUNDLE_CARRY = "bundle.carry"
    ACCESS_READ = "access.read"
    ACCESS_GRANT = "access.grant"


class Role(StrEnum):
    """What an administrator hands out."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    MODEL_PUBLISHER = "model-publisher"
    RELEASE_MANAGER = "release-manager"
    APPROVER = "approver"
    AUDITOR = "auditor"
    DEVICE_ADMIN = "device-admin"
    SECURITY_ADMIN = "security-admin"


_VIEW = frozenset({Permission.DEVICE_READ, Permission.MODEL_READ, Permission.ROLLOUT_READ})

PERMISSIONS: dict[Role, frozenset[Permission]] = {
    Role.VIEWER: _VIEW,
    Role.OPERATOR: _VIEW | {Permission.ROLLOUT_OPERATE, Permission.BUNDLE_CARRY},
    Role.MODEL_PUBLISHER: frozenset({Permission.MODEL_READ, Permission.MODEL_PUBLISH}),
    Role.RELEASE_MANAGER: _VIEW | {Permission.ROLLOUT_CREATE, Permission.ROLLOUT_OPERATE, Permission.BUNDLE_CARRY},
    Role.APPROVER: _VIEW | {Permission.ROLLOUT_APPROVE},
    Role.AUDITOR: _VIEW | {Permission.AUDIT_READ, Permission.ACCESS_READ},
    Role.DEVICE_ADMIN: frozenset({Permission.DEVICE_READ, Permission.DEVICE_ENROL, Permission.DEVICE_REVOKE}),
    Role.SECURITY_ADMIN: frozenset({Permission.ACCESS_READ, Permission.ACCESS_GRANT, Permission.AUDIT_READ}),
}


@dataclass(frozen=True, slots=True)
class GrantFacts:
    """One grant of a principal. ``expires_at`` is aware UTC; None lasts until it is withdrawn."""

    role: Role
    scope: str
    expires_at: datetime | None = None


def is_principal_name(name: str) -> bool:
    """Tell whether ``name`` may name a principal (``console`` stands for the controller's own host)."""
    return _PRINCIPAL.fullmatch(name) is not None and name != "console"


def check_scope(scope: str) -> str:
    """Return ``scope`` if it is a group path: ``/`` or ``/eu/plant1/``.

    Raises:
        InvalidError: ``access.scope_malformed``.
    """
    if len(scope) > MAX_SCOPE_LENGTH or _SCOPE.fullmatch(scope) is None:
        raise InvalidError(
            "access.scope_malformed",
            f"{scope[:MAX_SCOPE_LENGTH]!r} is no group path",
            hint="write it like /eu/plant1/ : lower case, with a slash at both ends",
        )
    return scope


def scopes(grants: Iterable[GrantFacts], permission: Permission, now: datetime) -> tuple[str, ...]:
    """Return the group paths in which ``grants`` give ``permission``; a path stands for everything under it."""
    found = {
        grant.scope
        for grant in grants
        if permission in PERMISSIONS[grant.role] and (grant.expires_at is None or now < grant.expires_at)
    }
    return tuple(sorted(found))


def within(group: str, allowed_scopes: Iterable[str]) -> bool:
    """Tell whether ``group`` lies in one of ``allowed_scopes``. Both end with a slash, so prefixes are whole names."""
    return any(group.startswith(scope) for scope in allowed_scopes)


def allowed(grants: Iterable[GrantFacts], permission: Permission, scope_path: str, now: datetime) -> bool:
    """Tell whether ``grants`` give ``permission`` on all of ``scope_path``."""
    return within(scope_path, scopes(grants, permission, now))


def narrowed(grants: Iterable[GrantFacts], bounds: Iterable[str]) -> tuple[GrantFacts, ...]:
    """Return what is left of ``grants`` within ``bounds``, group paths; a wider grant shrinks to them."""
    limits = tuple(bounds)
    found: dict[GrantFacts, None] = {}
    for grant in grants:
        if within(grant.scope, limits):
            found[grant] = None
            continue
        for limit in limits:
            if within(limit, (grant.scope,)):
                found[GrantFacts(grant.role, limit, grant.expires_at)] = None
    return tuple(found)


def may_grant(grants: Iterable[GrantFacts], granter: str, grantee: str, scope: str, now: datetime) -> bool:
    """Tell whether ``granter`` may hand ``grantee`` a role in ``scope``.

    A security-admin hands out any role inside its own scope, except to itself: nobody widens their own rights.
    """
    return granter != grantee and allowed(grants, Permission.ACCESS_GRANT, scope, now)
