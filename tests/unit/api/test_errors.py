from __future__ import annotations

import pytest

from garrison_agent.api.errors import BadRequestError, TooLargeError, http_status, oip_body, openai_body
from garrison_protocol.errors import (
    DeniedError,
    GarrisonError,
    InsufficientError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (NotFoundError("model.unknown", "m"), 404, "invalid_request_error", "model_not_found"),
        (InvalidError("a.b", "m"), 400, "invalid_request_error", "a.b"),
        (BadRequestError("api.bad_json", "m"), 400, "invalid_request_error", "api.bad_json"),
        (TooLargeError("api.body_too_large", "m"), 413, "invalid_request_error", "request_too_large"),
        (DeniedError("api.origin_refused", "m"), 403, "permission_error", "api.origin_refused"),
        (RefusedError("model.digest_mismatch", "m"), 403, "server_error", "model.digest_mismatch"),
        (UnavailableError("model.loading", "m"), 503, "server_error", "model.loading"),
        (InsufficientError("memory.insufficient", "m"), 507, "server_error", "memory.insufficient"),
    ],
)
def test_openai_shape(error: GarrisonError, status: int, kind: str, code: str) -> None:
    assert http_status(error) == status
    assert openai_body(error) == {"error": {"message": "m", "type": kind, "param": None, "code": code}}


def test_messages_carry_the_hint_and_the_field() -> None:
    error = BadRequestError("api.model_missing", "no model", hint="set it", param="model")
    assert openai_body(error)["error"] == {
        "message": "no model (set it)",
        "type": "invalid_request_error",
        "param": "model",
        "code": "api.model_missing",
    }
    assert oip_body(error) == {"error": "api.model_missing: no model (set it)"}
