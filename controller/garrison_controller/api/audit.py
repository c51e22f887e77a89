"""Boards' audit as it arrived: streams, entries, alarms, verification, export. Bounded by the caller's groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse

from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.api.devices import TheController
from garrison_controller.audit import queries
from garrison_controller.audit.tables import Alarm, StreamRow, StreamState
from garrison_controller.audit.verify import verify
from garrison_controller.db.base import Database

router = APIRouter(prefix="/api/v1/audit", tags=["audit"])
Auditor = Annotated[Caller, Depends(require(Permission.AUDIT_READ, anywhere=True))]
DeviceQuery = Annotated[str | None, Query(max_length=63)]
MAX_PAGE = 10_000


@router.get("/streams")
def get_streams(controller: TheController, caller: Auditor, device: DeviceQuery = None) -> dict[str, Any]:
    """How far every stream has come: the last row stored, its hash, how many rows, and how many came again."""
    with controller.database.reading() as session:
        found = queries.streams(session, caller.scopes(Permission.AUDIT_READ), device)
        return {"streams": [_stream(state) for state in found]}


@router.get("/entries")
def get_entries(
    controller: TheController,
    caller: Auditor,
    *,
    device: DeviceQuery = None,
    kind: Annotated[str | None, Query(max_length=64)] = None,
    since: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
) -> dict[str, Any]:
    """The newest audit entries since a time (ms since 1970, by the boards' clocks); ``kind`` may end with ``*``."""
    with controller.database.reading() as session:
        found = queries.entries(
            session,
            caller.scopes(Permission.AUDIT_READ),
            device=device,
            kind=kind,
            since_ms=since,
            limit=limit,
        )
        return {"entries": [_entry(row) for row in found]}


@router.get("/alarms")
def get_alarms(
    controller: TheController,
    caller: Auditor,
    device: DeviceQuery = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
) -> dict[str, Any]:
    """What does not add up, the latest first."""
    with controller.database.reading() as session:
        found = queries.alarms(session, caller.scopes(Permission.AUDIT_READ), device, limit)
        return {"alarms": [_alarm(alarm) for alarm in found]}


@router.get("/refusals")
def get_refusals(
    controller: TheController, caller: Annotated[Caller, Depends(require(Permission.AUDIT_READ))]
) -> dict[str, Any]:
    """How many boards' messages were refused, by sender and code. Needs the right on the whole fleet."""
    del caller
    with controller.database.reading() as session:
        return {
            "refusals": [
                {
                    "sender": refusal.sender,
                    "code": refusal.code,
                    "count": refusal.count,
                    "last_at": _text(refusal.last_at),
                    "last_message": refusal.last_message,
                }
                for refusal in queries.refusals(session)
            ]
        }


@router.get("/verify")
def get_verification(controller: TheController, caller: Auditor, device: DeviceQuery = None) -> dict[str, Any]:
    """Recompute every chain that the caller may read, and name the first entry of each that does not hold."""
    scopes = caller.scopes(Permission.AUDIT_READ)
    with controller.database.reading() as session:
        reports = [report for name in queries.boards(session, scopes, device) for report in verify(session, name)]
    return {"ok": all(report.ok for report in reports), "chains": [report.to_dict() for report in reports]}


@router.get("/export")
def get_export(controller: TheController, caller: Auditor, device: DeviceQuery = None) -> StreamingResponse:
    """Every audit entry as one JSON object a line, with the exact text that was hashed."""
    lines = _lines(controller.database, caller.scopes(Permission.AUDIT_READ), device)
    return StreamingResponse(lines, media_type="application/x-ndjson")


def _lines(database: Database, scopes: Sequence[str], device: str | None) -> Iterator[str]:
    with database.reading() as session:
        for row in queries.export(session, scopes, device):
            document = {
                "device": row.device_id,
                "epoch": row.epoch,
                "seq": row.seq,
                "hash": row.hash,
                "header": row.header,
                "body": row.body,
                "salt": row.salt,
            }
            yield json.dumps(document) + "\n"


def _stream(state: StreamState) -> dict[str, Any]:
    return {
        "device": state.device_id,
        "stream": state.stream,
        "epoch": state.epoch,
        "up_to": state.up_to,
        "hash": state.hash,
        "rows": state.rows,
        "dropped": state.dropped,
        "duplicates": state.duplicates,
        "received_at": None if state.received_at is None else _text(state.received_at),
    }


def _entry(row: StreamRow) -> dict[str, Any]:
    header = _decoded(row.header)
    if not isinstance(header, dict):
        header = {"header": row.header}
    return {
        "device": row.device_id,
        "epoch": row.epoch,
        "seq": row.seq,
        "time_ms": row.time_ms,
        "kind": row.kind,
        "facts": {key: value for key, value in header.items() if len(key) > 1},
        "body": None if row.body is None else _decoded(row.body),
        "hash": row.hash,
        "received_at": _text(row.received_at),
    }


def _decoded(text: str) -> Any:
    """Return the JSON value that a board sent; as plain text where it is none, or none that an answer can hold.

    One board's odd entry must not hide all others. Floats, which canonical JSON has none of, become text.
    """
    try:
        value = json.loads(text, parse_float=str, parse_constant=str)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return value


def _alarm(alarm: Alarm) -> dict[str, Any]:
    return {
        "device": alarm.device_id,
        "code": alarm.code,
        "subject": alarm.subject,
        "message": alarm.message,
        "detail": alarm.detail,
        "count": alarm.count,
        "first_at": _text(alarm.first_at),
        "last_at": _text(alarm.last_at),
    }


def _text(at: datetime) -> str:
    return at.isoformat()
