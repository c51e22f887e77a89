"""The one mapping from errors to HTTP answers, and the record of denials."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from garrison_controller.access.events import DENIED, REFUSED, record_event
from garrison_controller.api.auth import Caller, database_of
from garrison_protocol.errors import DeniedError, GarrisonError, InvalidError, RefusedError

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = "5"


def install(app: FastAPI) -> None:
    """Make ``app`` answer every expected failure with ``GarrisonError.to_dict()``."""
    app.add_exception_handler(GarrisonError, _expected)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


def _expected(request: Request, error: Exception) -> JSONResponse:
    # A plain function: Starlette runs it in a worker thread, where it may use the database.
    assert isinstance(error, GarrisonError)
    caller = getattr(request.state, "caller", None)
    if isinstance(caller, Caller) and isinstance(error, (DeniedError, RefusedError)):
        _record(request, caller, error)
    headers = {}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retryable:
        headers["Retry-After"] = _RETRY_AFTER_S
    return JSONResponse(error.to_dict(), status_code=error.http_status, headers=headers)


def _record(request: Request, caller: Caller, error: GarrisonError) -> None:
    with database_of(request).session() as session:
        record_event(
            session,
            datetime.now(UTC),
            caller.name,
            str(error.fields.get("permission") or f"{request.method} {request.url.path}"[:64]),
            request.url.path,
            outcome=DENIED if isinstance(error, DeniedError) else REFUSED,
            detail={"code": error.code, "message": error.message, **error.fields},
        )


def _malformed(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    hint = "correct that value; /api/openapi.json describes all of them"
    answer = InvalidError("request.malformed", f"{place}: {first['msg']}", hint=hint, field=place)
    return JSONResponse(answer.to_dict(), status_code=answer.http_status)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = GarrisonError(
        f"http.{error.status_code}",
        f"{request.method} {request.url.path}: {error.detail}",
        hint="see /api/openapi.json for the calls there are",
    )
    return JSONResponse(body.to_dict(), status_code=error.status_code, headers=error.headers)


def _bug(request: Request, error: Exception) -> JSONResponse:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    body = GarrisonError("internal", "the controller failed on this call", hint="its log holds the cause")
    return JSONResponse(body.to_dict(), status_code=500)
