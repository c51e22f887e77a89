from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from garrison_controller.access.service import Identified
from garrison_controller.rollouts import four_eyes, queries, service
from garrison_controller.rollouts.tables import Approval
from garrison_protocol.errors import ConflictError, DeniedError, RefusedError
from tests.unit.rollouts.fleet import ALICE, BOB, PUBLISHER, Fleet


@pytest.mark.parametrize("who", [ALICE, PUBLISHER])
def test_neither_creator_nor_publisher_approves(fleet: Fleet, who: Identified) -> None:
    rollout = fleet.create()
    with pytest.raises(DeniedError) as refused:
        fleet.approve(rollout, who)
    assert refused.value.code == "access.four_eyes"
    assert fleet.rollout(rollout).status == "WAITING_FOR_APPROVAL"
    assert fleet.desired("edge-1") is None


def test_an_approval_names_the_digest_that_was_seen(fleet: Fleet) -> None:
    rollout = fleet.create()
    with pytest.raises(ConflictError) as refused:
        fleet.approve(rollout, digest="0" * 64)
    assert refused.value.code == "rollout.digest_mismatch"


def test_a_denied_rollout_never_starts(fleet: Fleet) -> None:
    rollout = fleet.create()
    with fleet.database.session() as session:
        row = queries.find(session, rollout)
        service.deny(session, BOB, row, seen_digest=row.digest, comment="no", now=fleet.clock())
    assert fleet.rollout(rollout).status == "APPROVAL_DENIED"
    with pytest.raises(ConflictError):
        fleet.approve(rollout)


@pytest.mark.parametrize("who", [ALICE, PUBLISHER])
def test_the_database_refuses_an_approval_by_creator_or_publisher(fleet: Fleet, who: Identified) -> None:
    rollout = fleet.create()
    digest = fleet.rollout(rollout).digest
    with pytest.raises(IntegrityError, match="four eyes"), fleet.database.session() as session:
        session.add(
            Approval(
                rollout_id=rollout,
                principal_id=who.principal_id,
                digest=digest,
                decision="approve",
                at=fleet.clock(),
            )
        )


def test_the_database_refuses_an_approval_of_another_digest(fleet: Fleet) -> None:
    rollout = fleet.create()
    with pytest.raises(IntegrityError, match="four eyes"), fleet.database.session() as session:
        session.add(
            Approval(
                rollout_id=rollout,
                principal_id=BOB.principal_id,
                digest="0" * 64,
                decision="approve",
                at=fleet.clock(),
            )
        )


def _sql(statement: str) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(text(statement))


@pytest.mark.parametrize(
    ("approved", "statement"),
    [
        (False, "UPDATE rollout SET status = 'READY'"),
        (False, "UPDATE rollout SET status = 'RUNNING'"),
        (True, "UPDATE rollout_approval SET principal_id = 'id-alice'"),
        (True, "DELETE FROM rollout_approval"),
        (True, "UPDATE rollout SET package_version = '2.0.0'"),
        (True, "UPDATE rollout SET created_by = 'id-bob'"),
        (True, "UPDATE rollout SET digest = 'x'"),
        (True, "UPDATE rollout_group SET name = 'other'"),
        (True, "UPDATE rollout_group SET filter = 'name=edge-3' WHERE position = 0"),
    ],
)
def test_the_database_keeps_the_invariants_against_any_code(fleet: Fleet, approved: bool, statement: str) -> None:
    rollout = fleet.create(start_on_approval=False)
    if approved:
        fleet.approve(rollout)
    with pytest.raises(IntegrityError), fleet.database.session() as session:
        _sql(statement)(session.connection())


def test_a_rollout_altered_behind_the_triggers_does_not_start(fleet: Fleet) -> None:
    rollout = fleet.create(start_on_approval=False)
    fleet.approve(rollout)
    with fleet.database.session() as session:
        session.execute(text("DROP TRIGGER rollout_frozen"))
        session.execute(text("UPDATE rollout SET limits = '{\"max_rss_mb\": 1}'"))
    with pytest.raises(RefusedError) as refused, fleet.database.session() as session:
        service.start(session, ALICE, queries.find(session, rollout), fleet.director, fleet.clock())
    assert refused.value.code == "rollout.altered"


def test_every_rule_is_written_for_both_databases() -> None:
    assert len(four_eyes.statements("postgresql")) == 2 * len(four_eyes.statements("sqlite"))
    with pytest.raises(ValueError, match="mysql"):
        four_eyes.statements("mysql")


@pytest.mark.parametrize("change", ["limits = '{}'", "max_unavailable = 7", "max_unavailable = NULL"])
def test_limits_and_disruption_budget_are_frozen_too(fleet: Fleet, change: str) -> None:
    fleet.create(max_unavailable=1, limits={"min_tokens_per_s": 5})
    with pytest.raises(IntegrityError, match="a specification never changes"), fleet.database.session() as session:
        session.execute(text(f"UPDATE rollout SET {change}"))
