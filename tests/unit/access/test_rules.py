from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from garrison_controller.access import rules
from garrison_controller.access.rules import PERMISSIONS, GrantFacts, Permission, Role
from garrison_protocol.errors import InvalidError

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.mark.parametrize(
    ("scope", "wanted", "expected"),
    [
        ("/", "/", True),
        ("/", "/eu/plant1/", True),
        ("/eu/", "/eu/plant1/", True),
        ("/eu/plant1/", "/eu/plant1/", True),
        ("/eu/plant1/", "/eu/", False),
        ("/eu/plant1/", "/", False),
        ("/eu/plant1/", "/eu/plant10/", False),
        ("/eu/", "/us/", False),
    ],
)
def test_a_grant_reaches_its_scope_and_what_is_under_it(scope: str, wanted: str, expected: bool) -> None:
    grants = (GrantFacts(Role.OPERATOR, scope),)
    assert rules.allowed(grants, Permission.ROLLOUT_OPERATE, wanted, NOW) is expected


def test_nothing_is_allowed_without_a_grant() -> None:
    assert not any(rules.allowed((), permission, "/eu/", NOW) for permission in Permission)


def test_a_grant_ends() -> None:
    grants = (GrantFacts(Role.VIEWER, "/", NOW),)
    assert rules.allowed(grants, Permission.DEVICE_READ, "/", NOW - timedelta(seconds=1))
    assert not rules.allowed(grants, Permission.DEVICE_READ, "/", NOW)


@pytest.mark.parametrize("role", list(Role))
def test_a_role_gives_exactly_its_permissions(role: Role) -> None:
    grants = (GrantFacts(role, "/"),)
    given = {permission for permission in Permission if rules.allowed(grants, permission, "/", NOW)}
    assert given == PERMISSIONS[role]


def test_no_role_can_both_create_and_approve_a_rollout() -> None:
    both = {Permission.ROLLOUT_CREATE, Permission.ROLLOUT_APPROVE}
    assert not [role for role, permissions in PERMISSIONS.items() if both <= permissions]


def test_every_permission_belongs_to_a_role() -> None:
    assert frozenset().union(*PERMISSIONS.values()) == set(Permission)


def test_scopes_lists_where_a_permission_holds() -> None:
    grants = (
        GrantFacts(Role.VIEWER, "/eu/"),
        GrantFacts(Role.OPERATOR, "/us/"),
        GrantFacts(Role.VIEWER, "/asia/", NOW - timedelta(days=1)),
        GrantFacts(Role.MODEL_PUBLISHER, "/"),
    )
    assert rules.scopes(grants, Permission.DEVICE_READ, NOW) == ("/eu/", "/us/")


def test_a_security_admin_grants_inside_its_scope_but_never_to_itself() -> None:
    grants = (GrantFacts(Role.SECURITY_ADMIN, "/eu/"),)
    assert rules.may_grant(grants, "alice", "bob", "/eu/plant1/", NOW)
    assert not rules.may_grant(grants, "alice", "bob", "/", NOW)
    assert not rules.may_grant(grants, "alice", "alice", "/eu/", NOW)


@pytest.mark.parametrize("scope", ["/", "/eu/", "/eu/plant-1/line.2/"])
def test_group_paths(scope: str) -> None:
    assert rules.check_scope(scope) == scope


@pytest.mark.parametrize("scope", ["", "eu/", "/eu", "//", "/EU/", "/../", "/a b/", "/%/", "/" + "a/" * 200])
def test_other_scopes_are_refused(scope: str) -> None:
    with pytest.raises(InvalidError, match=r"access\.scope_malformed"):
        rules.check_scope(scope)
