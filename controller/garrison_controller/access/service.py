"""Use cases of access control. Each runs inside the caller's transaction."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from garrison_controller.access import queries, rules
from garrison_controller.access.events import record_event
from garrison_controller.access.rules import GrantFacts, Permission, Role
from garrison_controller.access.tables import Grant, Principal, Token
from garrison_protocol.errors import ConflictError, DeniedError, InvalidError, NotFoundError, UnauthenticatedError

CONSOLE = "console"
"""Who acts when the controller's own host does, without a token."""
PREFIX = "garrison_"
"""Tokens start so, for scanners that look for leaked secrets."""
MAX_TOKEN_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Identified:
    """Whose token it was, and what they may do with it: nothing beyond ``bounds``, where ``grants`` end already."""

    principal_id: str
    name: str
    grants: tuple[GrantFacts, ...]
    bounds: tuple[str, ...] = (rules.FLEET,)


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token. ``secret`` is known only now."""

    id: str
    secret: str
    expires_at: datetime


def authenticate(session: Session, secret: str, now: datetime) -> Identified:
    """Return whose token ``secret`` is. Only reads.

    Raises:
        UnauthenticatedError: ``access.token_unknown`` or ``access.token_expired`` (a revoked one included).
    """
    digest = hashlib.sha256(secret[:MAX_TOKEN_LENGTH].encode()).hexdigest()
    found = session.execute(
        select(Token, Principal).join(Principal, Token.principal_id == Principal.id).where(Token.token_sha256 == digest)
    ).one_or_none()
    if found is None:
        raise UnauthenticatedError(
            "access.token_unknown", "this API token is not known", hint="ask a security-admin for a new token"
        )
    token, principal = found
    if token.revoked_at is not None or now >= token.expires_at:
        raise UnauthenticatedError(
            "access.token_expired",
            f"the API token of {principal.name} has ended",
            hint="ask a security-admin for a new token (`garrison access token create`)",
        )
    bounds = tuple(token.scopes)
    grants = rules.narrowed(queries.grants_of(session, principal.id), bounds)
    return Identified(principal.id, principal.name, grants, bounds)


def bootstrap(session: Session, name: str, now: datetime) -> IssuedToken:
    """Create a security-admin with a grant on the whole fleet, and return its token. Console only.

    For the first one, and where the grants or tokens of all others have ended: nobody could act any more.

    Raises:
        ConflictError: ``access.bootstrapped`` when a security-admin can act.
    """
    able = session.scalars(
        select(Token)
        .join(Grant, Token.principal_id == Grant.principal_id)
        .where(
            Grant.role == Role.SECURITY_ADMIN.value,
            Grant.scope == rules.FLEET,
            Grant.expires_at.is_(None) | (Grant.expires_at > now),
            Token.revoked_at.is_(None),
            Token.expires_at > now,
        )
    )
    if any(rules.FLEET in token.scopes for token in able):
        raise ConflictError(
            "access.bootstrapped",
            "this controller has a security-admin already",
            hint="that principal grants further roles with `garrison access grant`",
        )
    principal = create_principal(session, CONSOLE, name, "person", now)
    _add_grant(session, (CONSOLE, CONSOLE), principal, GrantFacts(Role.SECURITY_ADMIN, rules.FLEET), now)
    record_event(session, now, CONSOLE, "access.bootstrap", name)
    return issue_token(session, CONSOLE, principal, (rules.FLEET,), days=rules.TOKEN_DAYS, now=now)


def create_principal(
    session: Session, actor: str, name: str, kind: Literal["person", "service"], now: datetime
) -> Principal:
    """Add a principal; it may do nothing yet.

    Raises:
        ConflictError: ``access.principal_exists``.
        InvalidError: ``access.name_malformed``.
    """
    if not rules.is_principal_name(name):
        raise InvalidError(
            "access.name_malformed",
            f"{name[:80]!r} is no principal name",
            hint="use lower-case letters, digits, '.', '_', '@' and '-', at most 64",
        )
    if queries.principal_by_name(session, name) is not None:
        raise ConflictError("access.principal_exists", f"principal {name} exists", hint="use it, or another name")
    principal = Principal(id=secrets.token_hex(16), name=name, kind=kind, created_at=now)
    session.add(principal)
    session.flush()
    record_event(session, now, actor, "access.principal.create", name, detail={"kind": kind})
    return principal


def check_may_issue(session: Session, issuer: Identified, principal: Principal, now: datetime) -> tuple[str, ...]:
    """Return how far tokens reach that ``issuer`` makes for ``principal``: itself, or one with no wider reach.

    A security-admin of one plant could otherwise act as a principal of the whole fleet, now or once it is one.

    Raises:
        DeniedError: ``access.denied``.
    """
    if issuer.principal_id == principal.id:
        return issuer.bounds
    reach = {grant.scope for grant in queries.grants_of(session, principal.id)}
    mine = rules.scopes(issuer.grants, Permission.ACCESS_GRANT, now)
    if not mine:
        raise _no_right(issuer, rules.FLEET)
    for scope in sorted(reach):
        if not rules.within(scope, mine):
            raise _no_right(issuer, scope)
    return mine


def issue_token(
    session: Session, actor: str, principal: Principal, bounds: tuple[str, ...], *, days: int, now: datetime
) -> IssuedToken:
    """Add a token for ``principal`` that ends after ``days`` and reaches nothing beyond ``bounds``; return its secret.

    Raises:
        InvalidError: ``access.token_lifetime``.
    """
    if not 1 <= days <= rules.MAX_TOKEN_DAYS:
        raise InvalidError(
            "access.token_lifetime", f"a token of {days} days", hint=f"choose 1 to {rules.MAX_TOKEN_DAYS} days"
        )
    secret = PREFIX + secrets.token_urlsafe(32)
    token = Token(
        id=secrets.token_hex(16),
        token_sha256=hashlib.sha256(secret.encode()).hexdigest(),
        principal_id=principal.id,
        created_at=now,
        expires_at=now + timedelta(days=days),
        scopes=list(bounds),
    )
    session.add(token)
    detail = {"token": token.id, "days": days, "scopes": token.scopes}
    record_event(session, now, actor, "access.token.create", principal.name, detail=detail)
    return IssuedToken(token.id, secret, token.expires_at)


def revoke_token(session: Session, issuer: Identified, token_id: str, now: datetime) -> None:
    """End a token at once; ending it again changes nothing.

    Raises:
        NotFoundError: ``access.token_not_found``.
        DeniedError: ``access.denied``.
    """
    token = session.get(Token, token_id)
    if token is None:
        raise NotFoundError("access.token_not_found", f"no token {token_id[:64]}", hint="see `garrison access list`")
    bounds = check_may_issue(session, issuer, session.get_one(Principal, token.principal_id), now)
    for grant in rules.narrowed(queries.grants_of(session, token.principal_id), token.scopes):
        if not rules.within(grant.scope, bounds):
            raise _no_right(issuer, grant.scope)
    if token.revoked_at is None:
        token.revoked_at = now
        record_event(session, now, issuer.name, "access.token.revoke", token_id)


def add_grant(
    session: Session,
    granter: Identified,
    grantee: Principal,
    facts: GrantFacts,
    now: datetime,
) -> Grant:
    """Give ``grantee`` a role within ``scope``; granting it again replaces the expiry.

    Raises:
        DeniedError: ``access.grant_to_self`` or ``access.denied``.
        InvalidError: ``access.scope_malformed``, ``access.expiry_past``.
    """
    rules.check_scope(facts.scope)
    if facts.expires_at is not None and facts.expires_at <= now:
        raise InvalidError("access.expiry_past", "the grant would end before it begins", hint="choose a later date")
    _check_may_grant(granter, grantee, facts, now)
    return _add_grant(session, (granter.principal_id, granter.name), grantee, facts, now)


def withdraw_grant(session: Session, granter: Identified, grant_id: str, now: datetime) -> None:
    """Take a role away.

    Raises:
        NotFoundError: ``access.grant_not_found``.
        DeniedError: ``access.denied``.
        ConflictError: ``access.last_admin`` for the last security-admin of the fleet.
    """
    grant = session.get(Grant, grant_id)
    if grant is None:
        raise NotFoundError("access.grant_not_found", f"no grant {grant_id[:64]}", hint="see `garrison access list`")
    if not rules.allowed(granter.grants, Permission.ACCESS_GRANT, grant.scope, now):
        raise _no_right(granter, grant.scope)
    if _is_last_admin(session, grant):
        raise ConflictError(
            "access.last_admin",
            "nobody could grant roles any more",
            hint="make another principal security-admin of / first",
        )
    principal = session.get_one(Principal, grant.principal_id)
    session.delete(grant)
    record_event(
        session, now, granter.name, "access.withdraw", principal.name, detail={"role": grant.role, "scope": grant.scope}
    )


def _add_grant(
    session: Session, granter: tuple[str, str], grantee: Principal, facts: GrantFacts, now: datetime
) -> Grant:
    granter_id, granter_name = granter
    role = facts.role.value
    grant = session.scalar(
        select(Grant).where(Grant.principal_id == grantee.id, Grant.role == role, Grant.scope == facts.scope)
    )
    if grant is None:
        grant = Grant(id=secrets.token_hex(16), principal_id=grantee.id, role=role, scope=facts.scope)
        session.add(grant)
    grant.expires_at, grant.granted_by, grant.granted_at = facts.expires_at, granter_id, now
    session.flush()
    until = facts.expires_at.isoformat() if facts.expires_at else None
    detail = {"grant": grant.id, "role": role, "scope": facts.scope, "expires_at": until}
    record_event(session, now, granter_name, "access.grant", grantee.name, detail=detail)
    return grant


def _check_may_grant(granter: Identified, grantee: Principal, facts: GrantFacts, now: datetime) -> None:
    if rules.may_grant(granter.grants, granter.principal_id, grantee.id, facts.scope, now):
        return
    if granter.principal_id == grantee.id:
        raise DeniedError(
            "access.grant_to_self",
            f"{granter.name} cannot grant {facts.role.value} to itself",
            hint="another security-admin must grant it",
            permission=Permission.ACCESS_GRANT.value,
            scope=facts.scope,
        )
    raise _no_right(granter, facts.scope)


def _no_right(granter: Identified, scope: str) -> DeniedError:
    return DeniedError(
        "access.denied",
        f"{granter.name} is no security-admin of {scope}",
        hint="ask a security-admin of that group",
        permission=Permission.ACCESS_GRANT.value,
        scope=scope,
    )


def _is_last_admin(session: Session, grant: Grant) -> bool:
    if grant.role != Role.SECURITY_ADMIN.value or grant.scope != rules.FLEET:
        return False
    others = session.scalar(
        select(func.count())
        .select_from(Grant)
        .where(Grant.role == grant.role, Grant.scope == rules.FLEET, Grant.expires_at.is_(None), Grant.id != grant.id)
    )
    return not others
