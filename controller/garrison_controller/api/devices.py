"""Boards: what boards themselves call (``/device/v1``), and what operators call (``/api/v1/devices``)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from garrison_controller.access.events import REFUSED, record_event
from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.devices import queries, service
from garrison_controller.devices.filter import parse_filter
from garrison_controller.devices.pki import SERVER_CA
from garrison_controller.devices.sessions import SESSION_LIFETIME_S
from garrison_controller.devices.tables import Device
from garrison_controller.wiring import Controller
from garrison_protocol.errors import RefusedError, UnauthenticatedError
from garrison_protocol.ids import is_device_id
from garrison_protocol.messages.enrolment import (
    EnrolmentString,
    EnrolRequest,
    EnrolResponse,
    NonceResponse,
    SessionRequest,
    SessionResponse,
)

router = APIRouter()
_SESSION = HTTPBearer(auto_error=False, description="A board's session, from POST /device/v1/session")
MAX_PAGE = 1000


def controller_of(request: Request) -> Controller:
    """Return the controller that serves ``request``."""
    controller = request.app.state.controller
    assert isinstance(controller, Controller)
    return controller


TheController = Annotated[Controller, Depends(controller_of)]
"""Annotation for endpoints: ``def endpoint(controller: TheController)``."""


def device_session(
    controller: TheController, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_SESSION)] = None
) -> str:
    """Return the id of the board that calls, from its session bearer.

    Raises:
        UnauthenticatedError: ``session.missing`` or ``session.expired``.
        RefusedError: ``device.revoked``, ``device.unknown``.
    """
    if credentials is None:
        raise UnauthenticatedError(
            "session.missing", "the call carries no session", hint="answer a nonce at /device/v1/session"
        )
    with controller.database.reading() as session:
        return service.session_device(session, controller.sessions, credentials.credentials)


DeviceSession = Annotated[str, Depends(device_session)]
"""Annotation for boards' endpoints: ``def endpoint(device: DeviceSession)``."""


@router.get("/device/v1/server-ca.pem", tags=["boards"])
def get_server_ca(controller: TheController) -> Response:
    """The authority behind this server, as PEM; a board compares its digest with its enrolment string."""
    pem = (controller.config.pki_dir / f"{SERVER_CA}.pem").read_bytes()
    return Response(pem, media_type="application/x-pem-file")


@router.post("/device/v1/enroll", tags=["boards"])
def post_enroll(controller: TheController, request: EnrolRequest) -> EnrolResponse:
    """Admit a board: a one-time token and a CSR give a certificate."""
    now = datetime.now(UTC)
    try:
        with controller.database.session() as session:
            admitted = service.enrol(
                session, request, controller.device_ca, days=controller.config.devices.certificate_days, now=now
            )
    except RefusedError as error:
        device = error.fields.get("device")
        if isinstance(device, str) and is_device_id(device):
            # Only refusals that a real token caused: strangers must not be able to fill the record.
            with controller.database.session() as session:
                record_event(
                    session,
                    now,
                    f"device:{device}",
                    "device.enrol",
                    device,
                    outcome=REFUSED,
                    detail={"code": error.code},
                )
        raise
    host, port = controller.config.board_mqtt
    return EnrolResponse(
        device=admitted.device, certificate_pem=admitted.certificate_pem, mqtt_host=host, mqtt_port=port
    )


@router.get("/device/v1/nonce", tags=["boards"])
def get_nonce(controller: TheController) -> NonceResponse:
    """A nonce to answer within five minutes, and the controller's time."""
    return NonceResponse(nonce=controller.sessions.nonce(), time=int(time.time()))


@router.post("/device/v1/session", tags=["boards"])
def post_session(controller: TheController, request: SessionRequest) -> SessionResponse:
    """A bearer for the board whose identity key answered a nonce."""
    with controller.database.reading() as session:
        bearer = service.open_session(session, request, controller.sessions)
    return SessionResponse(token=bearer, expires_in=SESSION_LIFETIME_S)


class NewToken(BaseModel):
    """A board to admit."""

    name: str = Field(max_length=63)
    group: str = Field(default="/", max_length=256)
    labels: dict[str, str] = Field(default_factory=dict)
    hours: int | None = Field(default=None, ge=1, le=720)
    """How long the token lasts; by default what the controller's configuration says."""


class Revocation(BaseModel):
    """Why a board is shut out."""

    reason: str = Field(default="", max_length=512)


@router.post("/api/v1/devices/tokens", tags=["devices"], status_code=201)
def post_token(
    controller: TheController,
    request: NewToken,
    caller: Annotated[Caller, Depends(require(Permission.DEVICE_ENROL, anywhere=True))],
) -> dict[str, Any]:
    """Make a one-time enrolment string; it is shown only in this answer."""
    caller.check(Permission.DEVICE_ENROL, request.group)
    root_sha256 = controller.root_sha256()
    hours = request.hours or controller.config.devices.token_hours
    with controller.database.session() as session:
        for group in queries.pending_groups(session, request.name, caller.at):
            caller.check(Permission.DEVICE_ENROL, group)  # the new token ends the one given out there
        token, secret = service.create_token(
            session, caller.name, request.name, group=request.group, labels=request.labels, hours=hours, now=caller.at
        )
    enrolment = EnrolmentString(
        url=controller.config.public_url,
        token=secret,
        root_sha256=root_sha256,
        server_ca_sha256=controller.server_ca_sha256,
    )
    return {"device": token.device_id, "enrolment": enrolment.encode(), "expires_at": token.expires_at.isoformat()}


@router.get("/api/v1/devices", tags=["devices"])
def get_devices(
    controller: TheController,
    caller: Annotated[Caller, Depends(require(Permission.DEVICE_READ, anywhere=True))],
    query: Annotated[str, Query(alias="filter", max_length=1024)] = "",
    after: Annotated[str, Query(max_length=63)] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
) -> dict[str, Any]:
    """Boards that the filter means and the caller may see, by id. ``next`` is the following page's ``after``."""
    terms = parse_filter(query)
    with controller.database.reading() as session:
        found, more = queries.page(session, terms, caller.scopes(Permission.DEVICE_READ), after=after, limit=limit)
        return {"devices": [_summary(device) for device in found], "next": found[-1].id if more else None}


@router.get("/api/v1/devices/{device_id}", tags=["devices"])
def get_device(
    controller: TheController,
    device_id: str,
    caller: Annotated[Caller, Depends(require(Permission.DEVICE_READ, anywhere=True))],
) -> dict[str, Any]:
    """One board with what it last said about itself."""
    with controller.database.reading() as session:
        device = queries.get(session, device_id)
        caller.check(Permission.DEVICE_READ, device.group)
        return _detail(device)


@router.post("/api/v1/devices/{device_id}/revoke", tags=["devices"])
def post_revoke(
    controller: TheController,
    device_id: str,
    request: Revocation,
    caller: Annotated[Caller, Depends(require(Permission.DEVICE_REVOKE, anywhere=True))],
) -> dict[str, Any]:
    """Shut a board out at once, and write the revocation list for the broker."""
    with controller.database.session() as session:
        caller.check(Permission.DEVICE_REVOKE, queries.get(session, device_id).group)
        device = service.revoke(session, caller.name, device_id, request.reason, caller.at)
    controller.write_revocation_list()
    return _summary(device)


def _summary(device: Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "name": device.name,
        "group": device.group,
        "labels": device.labels,
        "state": device.state,
        "online": device.online,
        "last_seen_at": _text(device.last_seen_at),
        "agent_version": device.agent_version,
        "enrolled_at": _text(device.enrolled_at),
        "cert_not_after": _text(device.cert_not_after),
    }


def _detail(device: Device) -> dict[str, Any]:
    return _summary(device) | {
        "identity_public": device.identity_public,
        "cert_serial": device.cert_serial,
        "connection": device.connection,
        "inventory": device.inventory,
        "status": device.status,
    }


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
