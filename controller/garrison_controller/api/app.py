"""The HTTP application: routers, errors, limits."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import Scope

from garrison_controller.api import (
    access,
    audit,
    blobs,
    bundles,
    devices,
    enrolment,
    errors,
    registry,
    rollouts,
    telemetry,
)
from garrison_controller.api.auth import is_known
from garrison_controller.api.devices import TheController
from garrison_controller.api.limits import BodyLimit
from garrison_controller.wiring import Controller

VERSION = version("garrison")
STREAMING = "/api/v1/registry/"
"""Endpoints below it read their bodies themselves, after they know who calls, and bound them."""


def create_app(controller: Controller) -> FastAPI:
    """Return the application that serves ``controller``; it starts and stops nothing."""
    app = FastAPI(
        title="Garrison controller",
        version=VERSION,
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page would load scripts from a public CDN
        redoc_url=None,
    )
    app.state.controller = controller
    errors.install(app)
    app.add_middleware(BodyLimit, streams=_streams, known=lambda scope: is_known(Request(scope)))
    for part in (devices, enrolment, access, registry, blobs, bundles, rollouts, audit, telemetry):
        app.include_router(part.router)
    app.get("/healthz", tags=["health"])(get_health)
    return app


def get_health(controller: TheController) -> dict[str, Any]:
    """Whether the controller and its database answer; for monitors, without a token."""
    with controller.database.reading() as session:
        session.connection().exec_driver_sql("SELECT 1")
    return {"status": "ok", "version": VERSION}


def _streams(scope: Scope) -> bool:
    return str(scope["path"]).startswith(STREAMING)
