"""Rollouts: create, decide, operate, look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from garrison_controller.access import rules as access_rules
from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.api.devices import TheController
from garrison_controller.rollouts import documents, queries, service
from garrison_controller.rollouts.specification import RolloutSpec
from garrison_controller.rollouts.tables import Rollout
from garrison_controller.wiring import Controller

router = APIRouter(prefix="/api/v1/rollouts", tags=["rollouts"])
Reader = Annotated[Caller, Depends(require(Permission.ROLLOUT_READ, anywhere=True))]
Creator = Annotated[Caller, Depends(require(Permission.ROLLOUT_CREATE, anywhere=True))]
Operator = Annotated[Caller, Depends(require(Permission.ROLLOUT_OPERATE, anywhere=True))]
Approver = Annotated[Caller, Depends(require(Permission.ROLLOUT_APPROVE, anywhere=True))]


class DecisionRequest(BaseModel):
    """An approver's decision about the rollout that has this digest, and no other."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    comment: str = Field(default="", max_length=1000)


class PauseRequest(BaseModel):
    """Why a rollout pauses."""

    reason: str = Field(default="", max_length=1000)


@router.post("", status_code=201)
def post_rollout(controller: TheController, spec: RolloutSpec, caller: Creator) -> dict[str, Any]:
    """Create a rollout that waits for approval, and show which boards it would take."""
    access_rules.check_scope(spec.scope)
    caller.check(Permission.ROLLOUT_CREATE, spec.scope)
    with controller.database.session() as session:
        rollout = service.create(session, caller.identified, spec, caller.at)
        return documents.detail(session, rollout)


@router.get("")
def get_rollouts(controller: TheController, caller: Reader) -> dict[str, Any]:
    """The rollouts in the caller's groups, the newest first."""
    scopes = caller.scopes(Permission.ROLLOUT_READ)
    with controller.database.reading() as session:
        found = [one for one in queries.all_rollouts(session) if access_rules.within(one.scope, scopes)]
        counts = queries.state_counts(session, [rollout.id for rollout in found])
        return {"rollouts": [documents.summary(rollout, counts[rollout.id]) for rollout in found]}


@router.get("/{reference}")
def get_rollout(controller: TheController, reference: str, caller: Reader) -> dict[str, Any]:
    """One rollout, by id or name."""
    with controller.database.reading() as session:
        rollout = queries.find(session, reference)
        caller.check(Permission.ROLLOUT_READ, rollout.scope)
        return documents.detail(session, rollout)


@router.post("/{reference}/approve")
def post_approve(
    controller: TheController, reference: str, request: DecisionRequest, caller: Approver
) -> dict[str, Any]:
    """Approve exactly this rollout; the creator and the model's publisher cannot. It starts, unless it says not to."""

    def approve(session: Session, rollout: Rollout) -> None:
        service.approve(
            session,
            caller.identified,
            rollout,
            seen_digest=request.digest,
            comment=request.comment,
            director=controller.keys.director,
            now=caller.at,
        )

    return _change(controller, caller, Permission.ROLLOUT_APPROVE, reference, approve)


@router.post("/{reference}/deny")
def post_deny(controller: TheController, reference: str, request: DecisionRequest, caller: Approver) -> dict[str, Any]:
    """Refuse a rollout; it ends here."""

    def deny(session: Session, rollout: Rollout) -> None:
        service.deny(
            session,
            caller.identified,
            rollout,
            seen_digest=request.digest,
            comment=request.comment,
            now=caller.at,
        )

    return _change(controller, caller, Permission.ROLLOUT_APPROVE, reference, deny)


@router.post("/{reference}/start")
def post_start(controller: TheController, reference: str, caller: Operator) -> dict[str, Any]:
    """Start an approved rollout."""
    return _operate(controller, caller, reference, service.start)


@router.post("/{reference}/pause")
def post_pause(controller: TheController, reference: str, caller: Operator, request: PauseRequest) -> dict[str, Any]:
    """Take the change back from boards that are not yet loading it, and hand out no more."""

    def pause(session: Session, rollout: Rollout) -> None:
        service.pause(session, caller.identified, rollout, controller.keys.director, caller.at, reason=request.reason)

    return _change(controller, caller, Permission.ROLLOUT_OPERATE, reference, pause)


@router.post("/{reference}/resume")
def post_resume(controller: TheController, reference: str, caller: Operator) -> dict[str, Any]:
    """Go on where a rollout paused."""
    return _operate(controller, caller, reference, service.resume)


@router.post("/{reference}/stop")
def post_stop(controller: TheController, reference: str, caller: Operator) -> dict[str, Any]:
    """End a rollout; boards that did not succeed get back what they had."""
    return _operate(controller, caller, reference, service.stop)


@router.post("/{reference}/trigger-next-group")
def post_trigger_next_group(controller: TheController, reference: str, caller: Operator) -> dict[str, Any]:
    """Begin the next group without waiting for those at work."""
    return _operate(controller, caller, reference, service.trigger_next_group)


def _operate(controller: Controller, caller: Caller, reference: str, verb: Callable[..., object]) -> dict[str, Any]:
    def operate(session: Session, rollout: Rollout) -> None:
        verb(session, caller.identified, rollout, controller.keys.director, caller.at)

    return _change(controller, caller, Permission.ROLLOUT_OPERATE, reference, operate)


def _change(
    controller: Controller,
    caller: Caller,
    permission: Permission,
    reference: str,
    change: Callable[[Session, Rollout], None],
) -> dict[str, Any]:
    with controller.database.session() as session:
        rollout = queries.find(session, reference, lock=True)
        caller.check(permission, rollout.scope)
        change(session, rollout)
        session.flush()
        document = documents.detail(session, rollout)
    controller.bus.desired_changed()
    return document
