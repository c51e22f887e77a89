"""Every select about rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from garrison_controller.access import rules as access_rules
from garrison_controller.devices.filter import DeviceFacts, holds, parse_filter
from garrison_controller.devices.tables import ENROLLED, Device
from garrison_controller.registry.tables import Package
from garrison_controller.rollouts.rules import GroupFacts, TargetFacts
from garrison_controller.rollouts.specification import GroupSpec, Placement, place
from garrison_controller.rollouts.states import GroupStatus, RolloutStatus, TargetState
from garrison_controller.rollouts.tables import Approval, Assignment, Rollout, RolloutGroup, Target
from garrison_protocol.errors import NotFoundError
from garrison_protocol.states import DeploymentState


def find(session: Session, reference: str, *, lock: bool = False) -> Rollout:
    """Return the rollout with this id or name. ``lock`` keeps others from changing it until the transaction ends.

    Raises:
        NotFoundError: ``rollout.unknown``.
    """
    statement = select(Rollout).where((Rollout.id == reference) | (Rollout.name == reference)).order_by(Rollout.id)
    found = session.scalars(statement.with_for_update() if lock else statement).first()
    if found is None:
        raise NotFoundError("rollout.unknown", f"no rollout {reference[:128]}", hint="see `garrison rollout list`")
    return found


def all_rollouts(session: Session) -> Sequence[Rollout]:
    """Return every rollout, the newest first."""
    return session.scalars(select(Rollout).order_by(Rollout.created_at.desc(), Rollout.id)).all()


def running_ids(session: Session) -> Sequence[str]:
    """Return the ids of rollouts that the tick advances, in order of creation."""
    return session.scalars(
        select(Rollout.id).where(Rollout.status == RolloutStatus.RUNNING).order_by(Rollout.created_at, Rollout.id)
    ).all()


def groups_of(session: Session, rollout_id: str) -> Sequence[RolloutGroup]:
    """Return the rollout's groups in order."""
    return session.scalars(
        select(RolloutGroup).where(RolloutGroup.rollout_id == rollout_id).order_by(RolloutGroup.position)
    ).all()


def targets_of(session: Session, rollout_id: str) -> Sequence[Target]:
    """Return the rollout's boards by group and id; none before it starts."""
    return session.scalars(
        select(Target).where(Target.rollout_id == rollout_id).order_by(Target.position, Target.device_id)
    ).all()


def approvals_of(session: Session, rollout_id: str) -> Sequence[Approval]:
    """Return the decisions about a rollout, the oldest first."""
    return session.scalars(select(Approval).where(Approval.rollout_id == rollout_id).order_by(Approval.id)).all()


def package(session: Session, name: str, version: str) -> Package:
    """Return a published package.

    Raises:
        NotFoundError: ``model.unknown``.
    """
    found = session.scalars(select(Package).where(Package.name == name, Package.version == version)).first()
    if found is None:
        raise NotFoundError(
            "model.unknown", f"no published model {name} {version}", hint="see `garrison model list`, or publish it"
        )
    return found


def candidates(session: Session, rollout: Rollout) -> list[DeviceFacts]:
    """Return the enrolled boards in the rollout's scope that its target filter means."""
    terms = parse_filter(rollout.target_filter)
    facts = [
        DeviceFacts(device.id, device.group, device.labels)
        for device in session.scalars(select(Device).where(Device.state == ENROLLED).order_by(Device.id))
        if access_rules.within(device.group, (rollout.scope,))
    ]
    return [device for device in facts if holds(device, terms)]


def preview(session: Session, rollout: Rollout) -> Placement:
    """Return which boards would fall into which group if the rollout started now."""
    return place(rollout.id, group_specs(session, rollout), candidates(session, rollout))


def group_specs(session: Session, rollout: Rollout) -> list[GroupSpec]:
    """Return the groups as they were asked for."""
    return [
        GroupSpec(name=group.name, filter=group.filter, percent=group.percent)
        for group in groups_of(session, rollout.id)
    ]


def facts(session: Session, rollout_id: str) -> list[GroupFacts]:
    """Return what ``rules.tick`` decides by."""
    rows = session.execute(
        select(Target, Device.online).join(Device, Device.id == Target.device_id).where(Target.rollout_id == rollout_id)
    ).all()
    members: dict[int, list[TargetFacts]] = {}
    for target, online in rows:
        members.setdefault(target.position, []).append(target_facts(target, online=online))
    return [
        GroupFacts(
            position=group.position,
            name=group.name,
            status=GroupStatus(group.status),
            targets=tuple(members.get(group.position, ())),
            accepted_failures=group.accepted_failures,
        )
        for group in groups_of(session, rollout_id)
    ]


def target_facts(target: Target, *, online: bool = False) -> TargetFacts:
    """Return a board's row as the rules see it."""
    return TargetFacts(
        device=target.device_id,
        state=TargetState(target.state),
        deployment=None if target.deployment is None else DeploymentState(target.deployment),
        assigned_at=target.assigned_at,
        started_at=target.started_at,
        online=online,
    )


def state_counts(session: Session, rollout_ids: Sequence[str]) -> dict[str, Counter[str]]:
    """Return how many boards of each rollout stand in which state."""
    counts: dict[str, Counter[str]] = {rollout_id: Counter() for rollout_id in rollout_ids}
    rows = session.execute(select(Target.rollout_id, Target.state).where(Target.rollout_id.in_(rollout_ids)))
    for rollout_id, state in rows:
        counts[rollout_id][state] += 1
    return counts


def boards_without_room(session: Session, alias: str, devices: Sequence[str], most: int) -> Sequence[str]:
    """Return those of ``devices`` that have ``most`` aliases besides ``alias``."""
    rows = session.scalars(
        select(Assignment.device_id)
        .where(Assignment.alias != alias)
        .group_by(Assignment.device_id)
        .having(func.count() >= most)
        .order_by(Assignment.device_id)
    ).all()
    wanted = set(devices)
    return [device for device in rows if device in wanted]


def rivals(session: Session, rollout: Rollout, devices: Sequence[str]) -> Sequence[tuple[str, str]]:
    """Return (rollout name, board) where another open rollout of the same alias holds one of ``devices``."""
    rows = session.execute(
        select(Rollout.name, Target.device_id)
        .join(Target, Target.rollout_id == Rollout.id)
        .where(
            Rollout.id != rollout.id,
            Rollout.alias == rollout.alias,
            Rollout.status.in_([RolloutStatus.RUNNING, RolloutStatus.PAUSED]),
        )
        .order_by(Rollout.name, Target.device_id)
    ).all()
    wanted = set(devices)
    return [(name, device) for name, device in rows if device in wanted]
