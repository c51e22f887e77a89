"""A board's report: inventory, and how far its deployments are. Runs inside the caller's transaction."""

from __future__ import annotations

import json
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.audit.tables import ReportState
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts import execution, progress
from garrison_controller.rollouts.tables import Rollout
from garrison_protocol.errors import InvalidError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.report import Report

MAX_NUMBER = 2**53


def record(session: Session, device: Device, report: Report, director: SigningKey, now: datetime) -> bool:
    """Record ``report`` and advance the rollouts it concerns; return whether any desired state changed.

    Reports are level-triggered: one that is not newer than the last changes nothing.

    Raises:
        InvalidError: ``message.out_of_range``.
    """
    numbers = [report.revision]
    for alias in report.aliases:
        numbers += (alias.step, abs(alias.progress_bytes), abs(alias.total_bytes))
    if max(numbers) > MAX_NUMBER:
        raise InvalidError("message.out_of_range", f"a report of revision {report.revision}")
    state = session.get(ReportState, device.id, with_for_update=True)
    if state is None:
        state = ReportState(device_id=device.id, revision=0, epoch="", report={})
        session.add(state)
    if report.epoch and state.epoch and report.epoch != state.epoch:
        return False  # of a store that another has replaced, or whose first rows are still on their way
    if report.revision <= state.revision:
        return False
    state.revision, state.received_at = report.revision, now
    state.report = json.loads(report.model_dump_json())
    device.last_seen_at = now
    device.inventory = json.loads(report.inventory.model_dump_json())
    concerned: dict[str, Rollout] = {}
    for alias in sorted(report.aliases, key=lambda one: one.rollout):  # locks are taken in one order
        rollout = progress.record(session, device.id, alias, now)
        if rollout is not None:
            concerned[rollout.id] = rollout
    changed = False
    for rollout_id in sorted(concerned):
        changed = execution.advance(session, concerned[rollout_id], director, now) or changed
    return changed
