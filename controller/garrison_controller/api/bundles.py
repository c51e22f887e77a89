"""Bundles for operators: what goes onto a stick, and what boards sent home on one (docs/protocol.md, "Bundles")."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from garrison_controller.access.events import record_event
from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.api.blobs import BlobResponse
from garrison_controller.api.devices import TheController
from garrison_controller.bundles import requests, service
from garrison_controller.bundles.home import Home, Outcome
from garrison_controller.devices import queries
from garrison_controller.devices.filter import MAX_FILTER_LENGTH, parse_filter
from garrison_protocol import bundle
from garrison_protocol.bundle import HomeRequest
from garrison_protocol.envelope import MAX_ENVELOPE_BYTES
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError
from garrison_protocol.topics import Up

router = APIRouter(prefix="/api/v1/bundles", tags=["bundles"])
Carrier = Annotated[Caller, Depends(require(Permission.BUNDLE_CARRY, anywhere=True))]
Filter = Annotated[str, Query(max_length=MAX_FILTER_LENGTH)]
_MESSAGES = {"status": Up.STATUS, "report": Up.REPORT, "audit": Up.AUDIT, "telemetry": Up.TELEMETRY}


class Export(BaseModel):
    """Which boards a bundle is for, and how long its metadata shall hold."""

    devices: str = Field(default="*", max_length=MAX_FILTER_LENGTH)
    valid_days: int = Field(default=30, ge=1, le=service.MAX_VALID_DAYS)


class ImportSummary(BaseModel):
    """What an import brought, for the record: counts of outcomes by board."""

    devices: dict[str, dict[str, int]] = Field(max_length=bundle.MAX_DEVICES)


@router.post("")
def post_export(controller: TheController, caller: Carrier, export: Export) -> dict[str, Any]:
    """Everything that goes into a bundle; blobs by digest and size, the rest in base64 by path."""
    terms = parse_filter(export.devices)
    scopes = caller.scopes(Permission.BUNDLE_CARRY)
    with controller.database.reading() as session:
        service.chosen(session, terms, scopes)  # refuse before anything is signed
    stamp = controller.registry.carry_timestamp(caller.at, export.valid_days)
    keys = service.Keys(controller.keys.director, controller.keys.receipt, controller.config.board_mqtt)
    with controller.database.session() as session:
        devices = service.chosen(session, terms, scopes)
        contents = service.collect(session, controller.registry, stamp, devices, keys=keys, now=caller.at)
        detail = {
            "devices": len(devices),
            "filter": export.devices,
            "valid_until": datetime.fromtimestamp(contents.head.valid_until, UTC).isoformat(),
            "blobs": len(contents.blobs),
        }
        record_event(session, caller.at, caller.name, "bundle.export", export.devices, detail=detail)
    return {
        "head": contents.head.model_dump(mode="json"),
        "files": {path: base64.b64encode(data).decode() for path, data in contents.files.items()},
        "blobs": [{"sha256": blob.sha256, "size": blob.size} for blob in contents.blobs],
    }


@router.get("/blobs/{sha256}", response_class=BlobResponse)
def get_blob(controller: TheController, caller: Carrier, sha256: str, devices: Filter = "*") -> BlobResponse:
    """A blob that a board of this filter, in the caller's groups, needs."""
    with controller.database.reading() as session:
        found = service.chosen(session, parse_filter(devices), caller.scopes(Permission.BUNDLE_CARRY))
        needed = service.needed_blobs(session, found)
    blobs = controller.registry.blobs
    if sha256 not in needed or blobs.size(sha256) is None:
        raise NotFoundError(
            "bundle.blob_not_needed",
            f"no board of this filter needs a blob {sha256[:64]}, or it is not here",
            hint="export again: the desired state may have changed meanwhile",
        )
    return BlobResponse(blobs.path(sha256), media_type="application/octet-stream")


@router.put(
    "/home/{device}/{kind}", openapi_extra={"requestBody": {"content": {"application/octet-stream": {"schema": {}}}}}
)
async def put_home(
    controller: TheController, caller: Carrier, device: str, kind: str, request: Request
) -> dict[str, Any]:
    """Take in one message of a board, as if MQTT had brought it, or (``request``) what it asks its next bundle for."""
    await run_in_threadpool(_check_device, controller, caller, device)
    data = await _body(request)
    if kind == "request":
        return await run_in_threadpool(_take_request, controller, caller, device, data)
    if kind not in _MESSAGES:
        raise InvalidError("bundle.name_unknown", f"boards send home no {kind[:32]!r}")
    return await run_in_threadpool(_take_message, controller, caller, device, _MESSAGES[kind], data)


@router.post("/home")
def post_import(controller: TheController, caller: Carrier, summary: ImportSummary) -> dict[str, Any]:
    """Record that somebody brought a stick home, and what it held by that person's account."""
    counts = {outcome.value: 0 for outcome in Outcome}
    for outcomes in summary.devices.values():
        for name, count in outcomes.items():
            if name in counts:
                counts[name] += count
    with controller.database.session() as session:
        detail: dict[str, object] = {"devices": len(summary.devices), **counts}
        record_event(session, caller.at, caller.name, "bundle.import", "home", detail=detail)
    return {"devices": len(summary.devices), **counts}


def _check_device(controller: TheController, caller: Caller, device: str) -> None:
    with controller.database.reading() as session:
        caller.check(Permission.BUNDLE_CARRY, queries.get(session, device).group)


def _take_message(controller: TheController, caller: Caller, device: str, kind: Up, data: bytes) -> dict[str, Any]:
    keys = controller.keys
    home = Home(controller.database, director=keys.director, receipt=keys.receipt, now=caller.at)
    taken = home.take(device, kind, data)
    if taken.desired_changed:
        controller.bus.desired_changed()
    return _answer(taken.outcome, taken.error)


def _take_request(controller: TheController, caller: Caller, device: str, data: bytes) -> dict[str, Any]:
    devices = controller.config.devices
    try:
        request = bundle.parse_document(HomeRequest, data, "request.json")
        with controller.database.session() as session:
            news = requests.take(
                session,
                device,
                request,
                controller.device_ca,
                days=devices.certificate_days,
                grace_days=devices.grace_days,
                now=caller.at,
            )
    except GarrisonError as error:
        if error.retryable:
            raise
        return _answer(Outcome.REFUSED, error)
    return _answer(Outcome.NEW if news else Outcome.REPEATED, None)


def _answer(outcome: Outcome, error: GarrisonError | None) -> dict[str, Any]:
    return {"outcome": outcome.value, "error": None if error is None else error.to_dict()}


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_ENVELOPE_BYTES:
            raise InvalidError("envelope.too_large", f"a message of more than {MAX_ENVELOPE_BYTES} bytes")
    return bytes(body)
