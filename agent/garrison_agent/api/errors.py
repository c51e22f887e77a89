"""The API's own errors, and the three shapes in which clients of each surface expect any error."""

from __future__ import annotations

from garrison_protocol.errors import GarrisonError, InvalidError, RefusedError, UnavailableError


class BadRequestError(InvalidError):
    """The request cannot be understood."""

    http_status = 400


class MethodError(InvalidError):
    """The path exists, but not for this method."""

    http_status = 405


class TooLargeError(InvalidError):
    """The body exceeds the bound."""

    http_status = 413


class WorkerDiedError(GarrisonError):
    """The model's worker ended, or spoke no HTTP, before its answer was complete."""

    http_status = 502


def stopping() -> UnavailableError:
    """Return the error of requests that the agent's own end cuts short."""
    return UnavailableError("agent.stopping", "the agent is stopping", hint="retry in a moment", retryable=True)


def lease_expired(model: str) -> UnavailableError:
    """Return the error of requests to a model that must not serve without news of the registry."""
    return UnavailableError(
        "model.lease_expired",
        f"{model} may not serve any longer without news from its release signers",
        hint="connect the board to its controller, or bring it a fresh bundle; it is loaded again by itself",
        model=model,
    )


RETRY_AFTER_S = 2
"""What a client is told to wait before it asks a busy or loading model again."""

_OPENAI_CODES = {"model.unknown": "model_not_found", "api.body_too_large": "request_too_large"}


def http_status(error: GarrisonError) -> int:
    """Return the status that the inference surfaces answer with: OpenAI and the OIP say 400, never 422."""
    return 400 if error.http_status == 422 else error.http_status


def openai_body(error: GarrisonError) -> dict[str, object]:
    """Return OpenAI's error object. ``param`` names the offending field when the error has a field ``param``."""
    return {
        "error": {
            "message": _sentence(error),
            "type": _openai_type(error),
            "param": error.fields.get("param"),
            "code": _OPENAI_CODES.get(error.code, error.code),
        }
    }


def oip_body(error: GarrisonError) -> dict[str, object]:
    """Return the Open Inference Protocol's error object."""
    return {"error": f"{error.code}: {_sentence(error)}"}


def _openai_type(error: GarrisonError) -> str:
    if isinstance(error, RefusedError):
        return "server_error"  # trust refused the model's files, not the client
    status = http_status(error)
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")


def _sentence(error: GarrisonError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
