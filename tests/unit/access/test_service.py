from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from garrison_controller.access import queries, service
from garrison_controller.access.rules import GrantFacts, Role
from garrison_controller.access.service import Identified
from garrison_controller.access.tables import Grant, Principal, Token
from garrison_controller.db.base import Database
from garrison_protocol.errors import ConflictError, DeniedError, InvalidError, UnauthenticatedError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.create_all()
    yield database
    database.close()


def actions(session: Session) -> list[tuple[str, str, str]]:
    return [(event.principal, event.action, event.subject) for event in queries.events(session)]


def admin(session: Session, name: str = "alice") -> Identified:
    principal = queries.principal_by_name(session, name)
    assert principal is not None
    return Identified(principal.id, principal.name, queries.grants_of(session, principal.id))


def bootstrapped(session: Session) -> Identified:
    service.bootstrap(session, "alice", NOW)
    return admin(session)


def person(session: Session, name: str) -> Principal:
    return service.create_principal(session, "alice", name, "person", NOW)


def test_bootstrap_makes_one_security_admin_of_the_fleet(database: Database) -> None:
    with database.session() as session:
        issued = service.bootstrap(session, "alice", NOW)
    with database.reading() as session:
        who = service.authenticate(session, issued.secret, NOW)
        assert who.name == "alice"
        assert who.grants == (GrantFacts(Role.SECURITY_ADMIN, "/"),)
        assert ("console", "access.bootstrap", "alice") in actions(session)
    with database.session() as session, pytest.raises(ConflictError, match=r"access\.bootstrapped"):
        service.bootstrap(session, "mallory", NOW)


def test_only_the_hash_of_a_token_is_stored(database: Database) -> None:
    with database.session() as session:
        issued = service.bootstrap(session, "alice", NOW)
    with database.reading() as session:
        token = session.scalars(select(Token)).one()
        assert issued.secret not in repr(vars(token))
        assert len(issued.secret) > 43


def test_unknown_expired_and_revoked_tokens_are_refused(database: Database) -> None:
    with database.session() as session:
        issued = service.bootstrap(session, "alice", NOW)
        alice = admin(session)
        with pytest.raises(UnauthenticatedError, match=r"access\.token_unknown"):
            service.authenticate(session, issued.secret + "x", NOW)
        with pytest.raises(UnauthenticatedError, match=r"access\.token_expired"):
            service.authenticate(session, issued.secret, issued.expires_at)
        service.revoke_token(session, alice, issued.id, NOW)
        with pytest.raises(UnauthenticatedError, match=r"access\.token_expired"):
            service.authenticate(session, issued.secret, NOW)


def test_a_security_admin_cannot_grant_to_itself(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
        principal = queries.get_principal(session, "alice")
        with pytest.raises(DeniedError, match=r"access\.grant_to_self"):
            service.add_grant(session, alice, principal, GrantFacts(Role.APPROVER, "/"), NOW)


def test_the_database_itself_refuses_a_grant_to_oneself(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
    forged = Grant(
        id="x",
        principal_id=alice.principal_id,
        role="approver",
        scope="/",
        granted_by=alice.principal_id,
        granted_at=NOW,
    )
    with pytest.raises(IntegrityError, match="not_to_oneself"), database.session() as session:
        session.add(forged)


def test_a_scoped_security_admin_stays_in_its_scope(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
        bob, carol = person(session, "bob"), person(session, "carol")
        service.add_grant(session, alice, bob, GrantFacts(Role.SECURITY_ADMIN, "/eu/"), NOW)
        scoped = admin(session, "bob")
        service.add_grant(session, scoped, carol, GrantFacts(Role.OPERATOR, "/eu/plant1/"), NOW)
        with pytest.raises(DeniedError, match=r"access\.denied"):
            service.add_grant(session, scoped, carol, GrantFacts(Role.OPERATOR, "/"), NOW)
        with pytest.raises(DeniedError, match=r"access\.denied"):
            service.add_grant(session, scoped, carol, GrantFacts(Role.VIEWER, "/us/"), NOW)


def test_a_scoped_security_admin_gets_no_token_of_a_wider_principal(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
        bob, carol, dora = person(session, "bob"), person(session, "carol"), person(session, "dora")
        service.add_grant(session, alice, bob, GrantFacts(Role.SECURITY_ADMIN, "/eu/"), NOW)
        service.add_grant(session, alice, carol, GrantFacts(Role.APPROVER, "/"), NOW)
        service.add_grant(session, alice, dora, GrantFacts(Role.OPERATOR, "/eu/plant1/"), NOW)
        scoped = admin(session, "bob")
        service.check_may_issue(session, scoped, dora, NOW)
        service.check_may_issue(session, scoped, bob, NOW)
        with pytest.raises(DeniedError, match=r"access\.denied"):
            service.check_may_issue(session, scoped, carol, NOW)
        with pytest.raises(DeniedError, match=r"access\.denied"):
            service.check_may_issue(session, admin(session, "dora"), bob, NOW)


def test_granting_again_changes_the_expiry_only(database: Database) -> None:
    later = NOW + timedelta(days=1)
    with database.session() as session:
        alice = bootstrapped(session)
        bob = person(session, "bob")
        first = service.add_grant(session, alice, bob, GrantFacts(Role.VIEWER, "/"), NOW)
        again = service.add_grant(session, alice, bob, GrantFacts(Role.VIEWER, "/", later), NOW)
        assert first.id == again.id
        assert queries.grants_of(session, bob.id) == (GrantFacts(Role.VIEWER, "/", later),)
        with pytest.raises(InvalidError, match=r"access\.expiry_past"):
            service.add_grant(session, alice, bob, GrantFacts(Role.VIEWER, "/", NOW), NOW)


def test_the_last_security_admin_cannot_be_withdrawn(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
        own = queries.grants(session)[0]
        with pytest.raises(ConflictError, match=r"access\.last_admin"):
            service.withdraw_grant(session, alice, own.id, NOW)
        bob = person(session, "bob")
        service.add_grant(session, alice, bob, GrantFacts(Role.SECURITY_ADMIN, "/"), NOW)
        service.withdraw_grant(session, admin(session, "bob"), own.id, NOW)
        assert queries.grants_of(session, alice.principal_id) == ()


@pytest.mark.parametrize("name", ["console", "", "Bob", "a b", "device:edge-1", "x" * 65])
def test_principal_names_that_mean_something_else_are_refused(database: Database, name: str) -> None:
    with database.session() as session, pytest.raises(InvalidError, match=r"access\.name_malformed"):
        person(session, name)


def test_every_change_is_recorded_in_its_own_transaction(database: Database) -> None:
    def crash() -> None:
        with database.session() as session:
            bootstrapped(session)
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    with database.session() as session:
        assert actions(session) == []
        alice = bootstrapped(session)
        bob = person(session, "bob")
        issued = service.issue_token(session, "alice", bob, ("/",), days=30, now=NOW)
        grant = service.add_grant(session, alice, bob, GrantFacts(Role.VIEWER, "/"), NOW)
        service.withdraw_grant(session, alice, grant.id, NOW)
        service.revoke_token(session, alice, issued.id, NOW)
    with database.reading() as session:
        assert [action for _, action, _ in actions(session)][-5:] == [
            "access.principal.create",
            "access.token.create",
            "access.grant",
            "access.withdraw",
            "access.token.revoke",
        ]
        assert issued.secret not in repr([event.detail for event in queries.events(session)])


def test_bootstrap_helps_once_nobody_can_grant_any_more(database: Database) -> None:
    with database.session() as session:
        bootstrapped(session)
    later = NOW + timedelta(days=90)
    with database.session() as session, pytest.raises(ConflictError):
        service.bootstrap(session, "mallory", later - timedelta(seconds=1))
    with database.session() as session:
        service.bootstrap(session, "bob", later)  # alice's token has ended
    with database.session() as session, pytest.raises(ConflictError):
        service.bootstrap(session, "mallory", later)


def scoped_admin(session: Session, alice: Identified) -> Identified:
    eve = person(session, "eve")
    service.add_grant(session, alice, eve, GrantFacts(Role.SECURITY_ADMIN, "/eu/"), NOW)
    return admin(session, "eve")


def test_a_token_reaches_no_further_than_its_issuer_did(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
        eve = scoped_admin(session, alice)
        bob = person(session, "bob")
        bounds = service.check_may_issue(session, eve, bob, NOW)
        kept = service.issue_token(session, "eve", bob, bounds, days=30, now=NOW)
        service.add_grant(session, alice, bob, GrantFacts(Role.DEVICE_ADMIN, "/"), NOW)
        service.add_grant(session, alice, bob, GrantFacts(Role.VIEWER, "/us/"), NOW)
        who = service.authenticate(session, kept.secret, NOW)
        assert who.grants == (GrantFacts(Role.DEVICE_ADMIN, "/eu/"),)
        # With that token it makes another one for itself: that reaches no further either.
        bounds = service.check_may_issue(session, who, bob, NOW)
        again = service.issue_token(session, "bob", bob, bounds, days=30, now=NOW)
        assert service.authenticate(session, again.secret, NOW).grants == who.grants
        whole = service.issue_token(session, "alice", bob, ("/",), days=30, now=NOW)
        assert len(service.authenticate(session, whole.secret, NOW).grants) == 2


def test_a_narrow_token_ends_no_wider_one(database: Database) -> None:
    with database.session() as session:
        alice = bootstrapped(session)
        eve = scoped_admin(session, alice)
        bob = person(session, "bob")
        bounds = service.check_may_issue(session, eve, bob, NOW)
        narrow = service.issue_token(session, "eve", bob, bounds, days=30, now=NOW)
        wide = service.issue_token(session, "alice", bob, ("/",), days=30, now=NOW)
        service.revoke_token(session, eve, wide.id, NOW)  # it reaches nothing outside of /eu/ yet
        wide = service.issue_token(session, "alice", bob, ("/",), days=30, now=NOW)
        service.add_grant(session, alice, bob, GrantFacts(Role.VIEWER, "/us/"), NOW)
        who = service.authenticate(session, narrow.secret, NOW)
        with pytest.raises(DeniedError, match=r"access\.denied"):
            service.revoke_token(session, who, wide.id, NOW)
        service.revoke_token(session, who, narrow.id, NOW)


def test_a_bounded_token_of_the_last_admin_does_not_count_as_able_to_act(database: Database) -> None:
    with database.session() as session:
        issued = service.bootstrap(session, "alice", NOW)
        session.get_one(Token, issued.id).scopes = ["/eu/"]
        service.bootstrap(session, "bob", NOW)
