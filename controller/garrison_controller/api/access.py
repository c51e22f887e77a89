"""Principals, tokens, grants, administrative events; and who the caller is."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import AwareDatetime, BaseModel, Field

from garrison_controller.access import queries, rules, service
from garrison_controller.access.rules import MAX_TOKEN_DAYS, TOKEN_DAYS, GrantFacts, Permission, Role
from garrison_controller.api.auth import Caller, CurrentCaller, require
from garrison_controller.api.devices import TheController

router = APIRouter(prefix="/api/v1", tags=["access"])
Admin = Annotated[Caller, Depends(require(Permission.ACCESS_GRANT, anywhere=True))]
Reader = Annotated[Caller, Depends(require(Permission.ACCESS_READ, anywhere=True))]


class NewPrincipal(BaseModel):
    """A person or service to be known."""

    name: str = Field(max_length=64)
    kind: Literal["person", "service"] = "person"


class NewToken(BaseModel):
    """A token for a principal."""

    principal: str = Field(max_length=64)
    days: int = Field(default=TOKEN_DAYS, ge=1, le=MAX_TOKEN_DAYS)


class NewGrant(BaseModel):
    """A role to give."""

    principal: str = Field(max_length=64)
    role: Role
    scope: str = Field(default=rules.FLEET, max_length=rules.MAX_SCOPE_LENGTH)
    expires_at: AwareDatetime | None = None


@router.get("/whoami")
def get_whoami(caller: CurrentCaller) -> dict[str, Any]:
    """The caller and what it may do where."""
    permissions = {permission.value: caller.scopes(permission) for permission in Permission}
    return {
        "id": caller.principal_id,
        "name": caller.name,
        "grants": [_facts(grant) for grant in caller.grants],
        "permissions": {name: list(scopes) for name, scopes in permissions.items() if scopes},
    }


@router.get("/access/principals")
def get_principals(controller: TheController, _caller: Reader) -> dict[str, Any]:
    """Every principal with its grants and tokens; never a token's secret."""
    with controller.database.reading() as session:
        grants, tokens = queries.grants(session), queries.tokens(session)
        return {
            "principals": [
                {
                    "id": principal.id,
                    "name": principal.name,
                    "kind": principal.kind,
                    "created_at": principal.created_at.isoformat(),
                    "grants": [
                        {"id": grant.id, **_facts(GrantFacts(Role(grant.role), grant.scope, grant.expires_at))}
                        for grant in grants
                        if grant.principal_id == principal.id
                    ],
                    "tokens": [
                        {
                            "id": token.id,
                            "expires_at": token.expires_at.isoformat(),
                            "revoked_at": _text(token.revoked_at),
                            "scopes": token.scopes,
                        }
                        for token in tokens
                        if token.principal_id == principal.id
                    ],
                }
                for principal in queries.principals(session)
            ]
        }


@router.post("/access/principals", status_code=201)
def post_principal(controller: TheController, request: NewPrincipal, caller: Admin) -> dict[str, Any]:
    """Add a principal, which may do nothing yet."""
    with controller.database.session() as session:
        principal = service.create_principal(session, caller.name, request.name, request.kind, caller.at)
    return {"id": principal.id, "name": principal.name, "kind": principal.kind}


@router.post("/access/tokens", status_code=201)
def post_token(controller: TheController, request: NewToken, caller: CurrentCaller) -> dict[str, Any]:
    """Make a token: for oneself, or as security-admin for a principal with no wider reach. Its secret is shown once.

    It reaches nothing beyond what its issuer reached, even if the principal is granted more later.
    """
    with controller.database.session() as session:
        if request.principal != caller.name:
            caller.check_anywhere(Permission.ACCESS_GRANT)
        principal = queries.get_principal(session, request.principal)
        bounds = service.check_may_issue(session, caller.identified, principal, caller.at)
        issued = service.issue_token(session, caller.name, principal, bounds, days=request.days, now=caller.at)
    return {
        "id": issued.id,
        "principal": request.principal,
        "token": issued.secret,
        "expires_at": issued.expires_at.isoformat(),
        "scopes": list(bounds),
    }


@router.delete("/access/tokens/{token_id}", status_code=204)
def delete_token(controller: TheController, token_id: str, caller: CurrentCaller) -> None:
    """End a token at once."""
    with controller.database.session() as session:
        service.revoke_token(session, caller.identified, token_id, caller.at)


@router.post("/access/grants", status_code=201)
def post_grant(controller: TheController, request: NewGrant, caller: Admin) -> dict[str, Any]:
    """Give a role within a group; not to oneself, and only inside one's own scope."""
    facts = GrantFacts(request.role, request.scope, request.expires_at)
    with controller.database.session() as session:
        grantee = queries.get_principal(session, request.principal)
        grant = service.add_grant(session, caller.identified, grantee, facts, caller.at)
    return {"id": grant.id, "principal": request.principal, **_facts(facts)}


@router.delete("/access/grants/{grant_id}", status_code=204)
def delete_grant(controller: TheController, grant_id: str, caller: Admin) -> None:
    """Take a role away."""
    with controller.database.session() as session:
        service.withdraw_grant(session, caller.identified, grant_id, caller.at)


@router.get("/access/events")
def get_events(
    controller: TheController,
    _caller: Annotated[Caller, Depends(require(Permission.AUDIT_READ))],
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """What administrators did and were refused, oldest first. ``next`` is the following page's ``after``."""
    with controller.database.reading() as session:
        events = queries.events(session, after=after, limit=limit)
        return {
            "events": [
                {
                    "id": event.id,
                    "at": event.at.isoformat(),
                    "principal": event.principal,
                    "action": event.action,
                    "subject": event.subject,
                    "outcome": event.outcome,
                    "detail": event.detail,
                }
                for event in events
            ],
            "next": events[-1].id if len(events) == limit else None,
        }


def _facts(grant: GrantFacts) -> dict[str, Any]:
    return {"role": grant.role.value, "scope": grant.scope, "expires_at": _text(grant.expires_at)}


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
