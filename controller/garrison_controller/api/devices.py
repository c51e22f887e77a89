"""Boards: what boards themselves call (``/device/v1``), and what operators call (``/api/v1/devices``)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.devices import anchors, enrolment, queries, refusals, requests, service
from garrison_controller.devices.enrolment import Admission, Admitted
from garrison_controller.devices.filter import parse_filter
from garrison_controller.devices.requests import Waiting
from garrison_controller.devices.sessions import SESSION_LIFETIME_S
from garrison_controller.devices.tables import Device, RetiredIdentity
from garrison_controller.wiring import Controller
from garrison_protocol.errors import RefusedError, UnauthenticatedError, UnavailableError
from garrison_protocol.ids import DEVICE_ID_PATTERN
from garrison_protocol.messages.anchor import NONCE_PATTERN
from garrison_protocol.messages.enrolment import (
    EnrolPending,
    EnrolRequest,
    EnrolResponse,
    NonceResponse,
    RenewRequest,
    RenewResponse,
    SessionRequest,
    SessionResponse,
    key_fingerprint,
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


def admission_of(controller: Controller, now: datetime) -> Admission:
    """Return with what this controller admits boards ``now``."""
    return Admission(controller.device_ca, controller.keys.director, controller.config.devices.certificate_days, now)


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
    return Response(controller.server_ca_pem, media_type="application/x-pem-file")


@router.post("/device/v1/enroll", tags=["boards"], responses={202: {"model": EnrolPending}})
def post_enroll(controller: TheController, request: EnrolRequest, http: Request, response: Response) -> Any:
    """Admit a board: a token and a CSR give a certificate. Without a token, 202 until an operator has decided."""
    now = datetime.now(UTC)
    admission = admission_of(controller, now)
    with _recorded(controller, "device.enrol", now), controller.database.session() as session:
        answer: Admitted | Waiting
        if request.token:
            answer = enrolment.enrol(session, request, admission)
        else:
            address = http.client.host if http.client is not None else ""
            answer = requests.ask(session, request, admission, address=address)
    if isinstance(answer, Waiting):
        response.status_code = 202
        return EnrolPending(fingerprint=answer.fingerprint, name=answer.name)
    if answer.replaced:
        controller.write_revocation_list()
        controller.bus.desired_changed()
    host, port = controller.config.board_mqtt
    return EnrolResponse(device=answer.device, certificate_pem=answer.certificate_pem, mqtt_host=host, mqtt_port=port)


@router.post("/device/v1/certificate", tags=["boards"])
def post_certificate(controller: TheController, request: RenewRequest) -> RenewResponse:
    """A new certificate for a board that proves its identity key; the old one may have ended, within the grace time."""
    now = datetime.now(UTC)
    devices = controller.config.devices
    with _recorded(controller, "device.renew", now), controller.database.session() as session:
        renewed = service.renew(
            session,
            request,
            controller.sessions,
            controller.device_ca,
            days=devices.certificate_days,
            grace_days=devices.grace_days,
            now=now,
        )
    host, port = controller.config.board_mqtt
    return RenewResponse(certificate_pem=renewed.certificate_pem, mqtt_host=host, mqtt_port=port)


@router.get("/device/v1/anchor", tags=["boards"])
def get_anchor(
    controller: TheController,
    device: Annotated[str, Query(pattern=DEVICE_ID_PATTERN)],
    nonce: Annotated[str, Query(pattern=NONCE_PATTERN)],
) -> Response:
    """The signed time for a board's nonce, its newest desired counter, and the newest rows that came from it."""
    with controller.database.reading() as session:
        sealed = anchors.anchor(session, device, nonce, controller.keys.director, datetime.now(UTC))
    return Response(sealed, media_type="application/json")


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


class Revocation(BaseModel):
    """Why a board is shut out."""

    reason: str = Field(default="", max_length=512)


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
        return _detail(device) | {"earlier_identities": _earlier(queries.retired_identities(session, device_id))}


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


@contextmanager
def _recorded(controller: Controller, action: str, now: datetime) -> Iterator[None]:
    """Record what a board is refused within the block, after the transaction there has ended."""
    try:
        yield
    except (RefusedError, UnavailableError) as error:
        if error.code != "database.busy":
            with controller.database.session() as session:
                refusals.record(session, action, error, now)
        raise


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
        "cert_serial": device.cert_serial,
        "cert_not_after": _text(device.cert_not_after),
        "fingerprint": key_fingerprint(device.identity_public),
    }


def _detail(device: Device) -> dict[str, Any]:
    return _summary(device) | {
        "identity_public": device.identity_public,
        "identity_since": _text(device.identity_since or device.enrolled_at),
        "connection": device.connection,
        "inventory": device.inventory,
        "status": device.status,
    }


def _earlier(retired: Sequence[RetiredIdentity]) -> list[dict[str, Any]]:
    return [
        {"fingerprint": key_fingerprint(one.identity_public), "since": _text(one.since), "until": _text(one.until)}
        for one in retired
    ]


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
