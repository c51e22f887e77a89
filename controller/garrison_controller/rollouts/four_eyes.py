"""Four eyes as database invariants: triggers that hold whatever code or person writes to the database.

An approver is neither the rollout's creator nor the publisher of its package; an approval names the digest of the
exact rollout; approvals are never changed or removed; no rollout leaves ``WAITING_FOR_APPROVAL`` towards boards
without such an approval; and what the digest covers never changes.

``statements`` are run after the tables are created: by ``create_all`` through an event, in production by the
migration that creates them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_BROKEN_APPROVAL = """NEW.decision = 'approve' AND NOT EXISTS (
    SELECT 1 FROM rollout WHERE rollout.id = NEW.rollout_id AND rollout.digest = NEW.digest
    AND rollout.created_by <> NEW.principal_id AND rollout.published_by <> NEW.principal_id)"""
_UNAPPROVED = """NEW.status IN ('READY', 'RUNNING', 'PAUSED', 'FINISHED') AND NOT EXISTS (
    SELECT 1 FROM rollout_approval AS approval WHERE approval.rollout_id = NEW.id
    AND approval.decision = 'approve' AND approval.digest = NEW.digest
    AND approval.principal_id <> NEW.created_by AND approval.principal_id <> NEW.published_by)"""
_FROZEN = (
    "id",
    "name",
    "alias",
    "package_name",
    "package_version",
    "manifest_sha256",
    "scope",
    "target_filter",
    "soak_s",
    "success_threshold",
    "error_threshold",
    "min_executed",
    "queued_timeout_s",
    "in_progress_timeout_s",
    "start_on_approval",
    "created_by",
    "published_by",
    "digest",
)
_CHANGED = " OR ".join(
    (
        *(f"NEW.{column} <> OLD.{column}" for column in _FROZEN),
        "COALESCE(NEW.max_unavailable, 0) <> COALESCE(OLD.max_unavailable, 0)",
        "CAST(NEW.limits AS TEXT) <> CAST(OLD.limits AS TEXT)",
    )
)
_FROZEN_GROUP = " OR ".join(
    (
        "NEW.rollout_id <> OLD.rollout_id OR NEW.position <> OLD.position OR NEW.name <> OLD.name",
        "COALESCE(NEW.filter, '') <> COALESCE(OLD.filter, '')",
        "COALESCE(NEW.percent, 0) <> COALESCE(OLD.percent, 0)",
    )
)


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    event: str
    table: str
    condition: str
    """When it holds, the change is refused with ``message``."""
    message: str


_RULES = (
    _Rule("approval_four_eyes", "INSERT", "rollout_approval", _BROKEN_APPROVAL, "four eyes: this approval is void"),
    _Rule("approval_update", "UPDATE", "rollout_approval", "1 = 1", "approvals are never changed"),
    _Rule("approval_delete", "DELETE", "rollout_approval", "1 = 1", "approvals are never removed"),
    _Rule("rollout_born", "INSERT", "rollout", "NEW.status <> 'WAITING_FOR_APPROVAL'", "a rollout begins unapproved"),
    _Rule("rollout_approved", "UPDATE", "rollout", _UNAPPROVED, "four eyes: no valid approval"),
    _Rule("rollout_frozen", "UPDATE", "rollout", _CHANGED, "a specification never changes"),
    _Rule("rollout_group_frozen", "UPDATE", "rollout_group", _FROZEN_GROUP, "the groups of a rollout never change"),
)


def statements(dialect: str, table: str | None = None) -> tuple[str, ...]:
    """Return the DDL for an SQLAlchemy dialect in the order to run, of one table or of all.

    Raises:
        ValueError: The dialect is neither ``sqlite`` nor ``postgresql``: four eyes would not hold there.
    """
    if dialect not in _WRITERS:
        raise ValueError(f"four eyes cannot be enforced on {dialect}")
    write = _WRITERS[dialect]
    return tuple(statement for rule in _RULES if table in {None, rule.table} for statement in write(rule))


def _sqlite(rule: _Rule) -> tuple[str, ...]:
    return (
        f"CREATE TRIGGER {rule.name} BEFORE {rule.event} ON {rule.table} WHEN {rule.condition}"
        f" BEGIN SELECT RAISE(ABORT, '{rule.message}'); END",
    )


def _postgresql(rule: _Rule) -> tuple[str, ...]:
    row = "OLD" if rule.event == "DELETE" else "NEW"
    return (
        f"CREATE FUNCTION {rule.name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF {rule.condition} THEN RAISE EXCEPTION '{rule.message}' USING ERRCODE = 'check_violation'; END IF;"
        f" RETURN {row}; END $$",
        f"CREATE TRIGGER {rule.name} BEFORE {rule.event} ON {rule.table} FOR EACH ROW EXECUTE FUNCTION {rule.name}()",
    )


_WRITERS: dict[str, Callable[[_Rule], tuple[str, ...]]] = {"sqlite": _sqlite, "postgresql": _postgresql}
