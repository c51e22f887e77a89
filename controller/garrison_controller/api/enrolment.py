"""Admitting boards, for operators: enrolment tokens, invitations, requests that wait, and replacements."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field, model_validator

from garrison_controller.access.rules import Permission, within
from garrison_controller.api.auth import Caller, require
from garrison_controller.api.devices import TheController, admission_of
from garrison_controller.devices import anchors, queries, requests, tokens
from garrison_controller.devices.pki import SERVER_CA
from garrison_controller.devices.requests import Place
from garrison_controller.devices.tables import APPROVED, BATCH, EnrolmentRequest, EnrolmentToken
from garrison_controller.wiring import Controller
from garrison_protocol.messages.enrolment import EnrolmentString, OfflineRequest, OfflineResponse

router = APIRouter(prefix="/api/v1", tags=["enrolment"])
Enroller = Annotated[Caller, Depends(require(Permission.DEVICE_ENROL, anywhere=True))]
Hours = Annotated[int | None, Field(default=None, ge=1, le=720)]
"""How long a token lasts; by default what the controller's configuration says."""


class NewPlace(BaseModel):
    """Where a board belongs."""

    group: str = Field(default="/", max_length=256)
    labels: dict[str, str] = Field(default_factory=dict)


class NewToken(NewPlace):
    """Boards to admit: one under ``name``, or up to ``uses`` whose names begin with ``prefix``."""

    name: str = Field(default="", max_length=63)
    prefix: str = Field(default="", max_length=63)
    uses: int = Field(default=1, ge=1, le=tokens.MAX_USES)
    hours: Hours = None

    @model_validator(mode="after")
    def _names_one_or_many(self) -> NewToken:
        if bool(self.name) == bool(self.prefix):
            raise ValueError("give a name for one board, or a prefix for a batch")
        return self


class Rotation(BaseModel):
    """A board to be replaced."""

    hours: Hours = None


class Approval(NewPlace):
    """What an approved board is called, and where it belongs. ``name`` empty: what it asked for."""

    name: str = Field(default="", max_length=63)

    @property
    def place(self) -> Place:
        """The same, for the service."""
        return Place(self.group, self.labels, self.name)


class OfflineApproval(Approval):
    """A request that somebody carried here."""

    request: OfflineRequest


@router.get("/enrolment/tokens")
def get_tokens(controller: TheController, caller: Enroller) -> dict[str, Any]:
    """Every enrolment token that admits into the caller's groups, the newest first; never its secret."""
    with controller.database.reading() as session:
        found = queries.tokens(session, caller.scopes(Permission.DEVICE_ENROL))
        boards = queries.admitted_by(session, [token.id for token in found])
        return {"tokens": [_token(token, boards.get(token.id, []), caller.at) for token in found]}


@router.post("/enrolment/tokens", status_code=201)
def post_token(controller: TheController, request: NewToken, caller: Enroller) -> dict[str, Any]:
    """Make an enrolment string for one board or a batch; it is shown only in this answer."""
    caller.check(Permission.DEVICE_ENROL, request.group)
    root_sha256 = controller.root_sha256()
    hours = request.hours or controller.config.devices.token_hours
    with controller.database.session() as session:
        if request.prefix:
            token, secret = tokens.create_batch(
                session,
                caller.name,
                request.prefix,
                uses=request.uses,
                group=request.group,
                labels=request.labels,
                hours=hours,
                now=caller.at,
            )
        else:
            for group in queries.pending_groups(session, request.name, caller.at):
                caller.check(Permission.DEVICE_ENROL, group)  # the new token ends the one given out there
            token, secret = tokens.create_token(
                session,
                caller.name,
                request.name,
                group=request.group,
                labels=request.labels,
                hours=hours,
                now=caller.at,
            )
        answer = _token(token, [], caller.at)
    return answer | {"enrolment": _string(controller, root_sha256, secret)}


@router.delete("/enrolment/tokens/{token_id}")
def delete_token(controller: TheController, token_id: int, caller: Enroller) -> dict[str, Any]:
    """End a token at once; boards that it admitted stay."""
    with controller.database.session() as session:
        caller.check(Permission.DEVICE_ENROL, tokens.get_token(session, token_id).group)
        token = tokens.revoke_token(session, caller.name, token_id, caller.at)
        boards = queries.admitted_by(session, [token_id])
    return _token(token, boards.get(token_id, []), caller.at)


@router.get("/enrolment/invitation")
def get_invitation(controller: TheController, _caller: Enroller) -> dict[str, Any]:
    """An enrolment string without a token: what it pins is public, and who comes with it waits for approval."""
    return {"enrolment": _string(controller, controller.root_sha256(), "")}


@router.get("/enrolment/requests")
def get_requests(controller: TheController, caller: Enroller) -> dict[str, Any]:
    """Boards that wait for a decision, or were denied, or approved into the caller's groups and not come back yet."""
    scopes = caller.scopes(Permission.DEVICE_ENROL)
    with controller.database.reading() as session:
        found = requests.listed(session, datetime.now(UTC))
        return {"requests": [_request(row) for row in found if row.state != APPROVED or within(row.group, scopes)]}


@router.post("/enrolment/requests/{fingerprint}/approve")
def post_approve(controller: TheController, fingerprint: str, request: Approval, caller: Enroller) -> dict[str, Any]:
    """Let a board in, the next time that it asks."""
    caller.check(Permission.DEVICE_ENROL, request.group)
    with controller.database.session() as session:
        _check_decided(session_row := requests.find(session, fingerprint, caller.at), caller)
        return _request(requests.approve(session, caller.name, session_row.fingerprint, request.place, caller.at))


@router.post("/enrolment/requests/{fingerprint}/deny")
def post_deny(controller: TheController, fingerprint: str, caller: Enroller) -> dict[str, Any]:
    """Refuse a board that waits; approving it later is possible."""
    with controller.database.session() as session:
        _check_decided(row := requests.find(session, fingerprint, caller.at), caller)
        return _request(requests.deny(session, caller.name, row.fingerprint, caller.at))


@router.post("/enrolment/offline")
def post_offline(controller: TheController, request: OfflineApproval, caller: Enroller) -> OfflineResponse:
    """Admit a board that has no network, from the request that it wrote; the answer is carried back to it."""
    caller.check(Permission.DEVICE_ENROL, request.group)
    controller.root_sha256()
    with controller.database.session() as session:
        known = queries.by_identity(session, request.request.identity)
        if known is not None:
            caller.check(Permission.DEVICE_ENROL, known.group)
        waiting = session.get(EnrolmentRequest, request.request.identity)
        if waiting is not None and caller.at < waiting.expires_at:
            _check_decided(waiting, caller)
        admitted = requests.admit_offline(
            session, caller.name, request.request, request.place, admission_of(controller, caller.at)
        )
        session.flush()
        anchor = anchors.anchor(session, admitted.device, request.request.nonce, controller.keys.director, caller.at)
    host, port = controller.config.board_mqtt
    return OfflineResponse(
        device=admitted.device,
        url=controller.config.public_url,
        certificate_pem=admitted.certificate_pem,
        mqtt_host=host,
        mqtt_port=port,
        root=controller.registry.first_root().decode(),
        server_ca_pem=(controller.config.pki_dir / f"{SERVER_CA}.pem").read_text(encoding="utf-8"),
        anchor=anchor.decode(),
    )


@router.post("/devices/{device_id}/rotate", status_code=201)
def post_rotate(
    controller: TheController,
    device_id: str,
    request: Rotation,
    caller: Annotated[Caller, Depends(require(Permission.DEVICE_ENROL, anywhere=True))],
) -> dict[str, Any]:
    """Make an enrolment string for the board that takes over this name; the present one is shut out when it enrols.

    Needs the rights to enrol and to revoke.
    """
    root_sha256 = controller.root_sha256()
    hours = request.hours or controller.config.devices.token_hours
    with controller.database.session() as session:
        device = queries.get(session, device_id)
        for permission in (Permission.DEVICE_ENROL, Permission.DEVICE_REVOKE):
            caller.check(permission, device.group)
        token, secret = tokens.create_rotation(session, caller.name, device_id, hours=hours, now=caller.at)
        answer = _token(token, [], caller.at)
    return answer | {"device": device_id, "enrolment": _string(controller, root_sha256, secret)}


def _check_decided(row: EnrolmentRequest, caller: Caller) -> None:
    """What was approved into a group is changed only by who may enrol there."""
    if row.state == APPROVED:
        caller.check(Permission.DEVICE_ENROL, row.group)


def _string(controller: Controller, root_sha256: str, secret: str) -> str:
    return EnrolmentString(
        url=controller.config.public_url,
        token=secret,
        root_sha256=root_sha256,
        server_ca_sha256=controller.server_ca_sha256,
    ).encode()


def _token(token: EnrolmentToken, boards: list[str], now: datetime) -> dict[str, Any]:
    return {
        "id": token.id,
        "kind": token.kind,
        "name": f"{token.name}*" if token.kind == BATCH else token.name,
        "group": token.group,
        "labels": token.labels,
        "uses": token.uses,
        "uses_max": token.uses_max,
        "state": _state(token, now),
        "boards": boards,
        "created_at": token.created_at.isoformat(),
        "created_by": token.created_by,
        "expires_at": token.expires_at.isoformat(),
    }


def _state(token: EnrolmentToken, now: datetime) -> str:
    if token.uses >= token.uses_max:
        return "used"
    if token.revoked_at is not None:
        return "revoked"
    return "expired" if now >= token.expires_at else "open"


def _request(row: EnrolmentRequest) -> dict[str, Any]:
    return {
        "fingerprint": row.fingerprint,
        "asked_name": row.asked_name,
        "address": row.address,
        "state": row.state,
        "name": row.device_id,
        "group": row.group if row.state == APPROVED else None,
        "asked_at": row.asked_at.isoformat(),
        "expires_at": row.expires_at.isoformat(),
        "decided_by": row.decided_by,
    }
