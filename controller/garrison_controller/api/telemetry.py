"""What boards measured: ``/api/v1/devices/{id}/metrics``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.api.devices import TheController
from garrison_controller.devices import queries as devices
from garrison_controller.telemetry import queries, rules

router = APIRouter(tags=["telemetry"])
MAX_SAMPLES = 10_000


@router.get("/api/v1/devices/{device_id}/metrics")
def get_metrics(
    controller: TheController,
    device_id: str,
    caller: Annotated[Caller, Depends(require(Permission.DEVICE_READ, anywhere=True))],
    since: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_SAMPLES)] = 100,
) -> dict[str, Any]:
    """The newest samples of a board since a time (ms since 1970, by the board's clock), offline ones included."""
    with controller.database.reading() as session:
        device = devices.get(session, device_id)
        caller.check(Permission.DEVICE_READ, device.group)
        samples = queries.samples(session, device.id, since_ms=since, limit=limit)
    return {"device": device_id, "rows": samples, "summary": rules.summary(samples)}
