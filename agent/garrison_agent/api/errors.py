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


class TooSlowError(InvalidError):
    """The body does not come at a pace that a connection may be held for."""

    http_status = 408


class LimitedError(UnavailableError):
    """The application has used up what it may; ``retry_after_s`` among the fields says when to come back."""

    http_status = 429


class DeadlineError(UnavailableError):
    """The time that the client gave has passed."""

    http_status = 504


class WorkerDiedError(GarrisonError):
    """The model's worker ended, or spoke no HTTP, before its answer was complete."""

    http_status = 502
    unread = False
    """Whether it ended before it had read the request."""


def stopping() -> UnavailableError:
    """Return the error of requests that the agent's own end cuts short."""
    return UnavailableError("agent.stopping", "the agent is stopping", hint="retry in a moment", retryable=True)


def deadline_exceeded() -> DeadlineError:
    """Return the error of requests that were not answered within the time that they had."""
    return DeadlineError(
        "inference.deadline_exceeded",
        "the request was not answered within its time",
        hint="give it more time, or ask for fewer tokens",
        retryable=True,
    )


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

_OPENAI_CODES = {
    "model.unknown": "model_not_found",
    "api.body_too_large": "request_too_large",
    "api.key_missing": "invalid_api_key",
    "api.key_unknown": "invalid_api_key",
    "api.requests_limited": "rate_limit_exceeded",
    "api.tokens_limited": "rate_limit_exceeded",
    "api.concurrency_limited": "rate_limit_exceeded",
    "inference.deadline_exceeded": "deadline_exceeded",
}

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def http_status(error: GarrisonError) -> int:
    """Return the status that the inference surfaces answer with: OpenAI and the OIP say 400, never 422."""
    return 400 if error.http_status == 422 else error.http_status


def retry_after_s(error: GarrisonError) -> int | None:
    """Return the seconds of a Retry-After header, None where trying again would not help."""
    stated = error.fields.get("retry_after_s")
    if isinstance(stated, int):
        return stated
    return RETRY_AFTER_S if error.retryable and http_status(error) in (503, 507) else None


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


def ollama_body(error: GarrisonError) -> dict[str, object]:
    """Return Ollama's error object; an unknown model is reported in its very words, which clients look for."""
    if error.code == "model.unknown":
        return {"error": f"model {str(error.fields.get('name', ''))!r} not found"}
    return {"error": _sentence(error)}


def _openai_type(error: GarrisonError) -> str:
    if isinstance(error, RefusedError):
        return "server_error"  # trust refused the model's files, not the client
    status = http_status(error)
    if status >= 500:
        return "server_error"
    return _OPENAI_TYPES.get(status, "invalid_request_error")


def _sentence(error: GarrisonError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
