"""Who is calling, and may they: dependencies of every operator's endpoint.

A ``DeniedError`` ends the request's transaction; ``api.errors`` then records the denial in one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from garrison_controller.access import rules, service
from garrison_controller.access.rules import Permission
from garrison_controller.db.base import Database
from garrison_protocol.errors import DeniedError, GarrisonError, UnauthenticatedError

_BEARER = HTTPBearer(auto_error=False, description="An API token, as `garrison access token create` prints it")


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated principal with its grants as they stood when the request came."""

    principal_id: str
    name: str
    grants: tuple[rules.GrantFacts, ...]
    at: datetime
    bounds: tuple[str, ...] = (rules.FLEET,)
    """Group paths that its token does not reach beyond."""

    @property
    def identified(self) -> service.Identified:
        """The caller as the services of ``access`` take it."""
        return service.Identified(self.principal_id, self.name, self.grants, self.bounds)

    def scopes(self, permission: Permission) -> tuple[str, ...]:
        """Return the group paths in which the caller has ``permission``; empty for none. Filter lists by it."""
        return rules.scopes(self.grants, permission, self.at)

    def check(self, permission: Permission, scope: str = rules.FLEET) -> None:
        """Return if the caller has ``permission`` on all of ``scope``, a group path.

        Raises:
            DeniedError: ``access.denied``.
            InvalidError: ``access.scope_malformed``, rather than a denial that a typing error caused.
        """
        if not rules.allowed(self.grants, permission, scope, self.at):
            raise _denied(self.name, permission, rules.check_scope(scope))

    def check_anywhere(self, permission: Permission) -> None:
        """Return if the caller has ``permission`` in some scope: for lists, which the caller's scopes then bound.

        Raises:
            DeniedError: ``access.denied``.
        """
        if not self.scopes(permission):
            raise _denied(self.name, permission, "any group")


def database_of(request: Request) -> Database:
    """Return the store of the application that serves ``request``."""
    database = request.app.state.controller.database
    assert isinstance(database, Database)
    return database


def current(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)] = None
) -> Caller:
    """Return who calls, from the bearer token.

    Raises:
        UnauthenticatedError: ``access.token_missing``, ``access.token_unknown``, ``access.token_expired``.
    """
    if credentials is None:
        raise UnauthenticatedError(
            "access.token_missing",
            "the call carries no API token",
            hint="run `garrison access login`, or set GARRISON_TOKEN",
        )
    now = datetime.now(UTC)
    with database_of(request).reading() as session:
        identified = service.authenticate(session, credentials.credentials, now)
    caller = Caller(identified.principal_id, identified.name, identified.grants, now, identified.bounds)
    request.state.caller = caller
    return caller


def is_known(request: Request) -> bool:
    """Tell whether ``request`` carries an API token that counts, before anything else of it is looked at."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        return False
    try:
        with database_of(request).reading() as session:
            service.authenticate(session, secret.strip(), datetime.now(UTC))
    except GarrisonError:
        return False
    return True


CurrentCaller = Annotated[Caller, Depends(current)]
"""Annotation for endpoints: ``def endpoint(caller: CurrentCaller)``."""


def require(permission: Permission, *, anywhere: bool = False) -> Callable[[Caller], Caller]:
    """Return a dependency that lets in callers with ``permission`` on the whole fleet.

    With ``anywhere`` a right in some group suffices; the endpoint then must check or filter by scope itself.
    """

    def dependency(caller: CurrentCaller) -> Caller:
        if anywhere:
            caller.check_anywhere(permission)
        else:
            caller.check(permission)
        return caller

    return dependency


def _denied(name: str, permission: Permission, scope: str) -> DeniedError:
    roles = ", ".join(role.value for role, held in rules.PERMISSIONS.items() if permission in held)
    return DeniedError(
        "access.denied",
        f"{name} has no {permission.value} on {scope}",
        hint=f"ask a security-admin of that group for a role that has it (`garrison access grant`): {roles}",
        permission=permission.value,
        scope=scope,
    )
