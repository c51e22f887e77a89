"""What a text worker refuses a request with, before it is put into the words of one API or another."""

from __future__ import annotations

from typing import Any

from garrison_protocol.errors import GarrisonError, InvalidError, UnavailableError

DEADLINE_EXCEEDED = "inference.deadline_exceeded"
_RETRY_AFTER_S = 2


class ApiError(Exception):
    """A refusal. ``code`` is ours, dotted, for records; clients see its last part. ``body`` is OpenAI's form of it."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def public_code(self) -> str:
        """The code as clients see it."""
        return self.code.rpartition(".")[2]

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The HTTP headers that belong to it."""
        return () if self.retry_after_s is None else ((b"retry-after", str(self.retry_after_s).encode()),)

    def body(self) -> dict[str, Any]:
        """Return OpenAI's JSON answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.public_code}}


def api_error(error: GarrisonError, *, param: str | None = None) -> ApiError:
    """Return ``error`` as a client sees it: 400 what it can correct, 503 and 504 what it may try again."""
    retry_after_s = None
    if isinstance(error, InvalidError):
        status = 400
    elif error.code == DEADLINE_EXCEEDED:
        status = 504
    elif isinstance(error, UnavailableError):
        status, retry_after_s = 503, _RETRY_AFTER_S
    else:
        status = 500
    return ApiError(status, error.code, error.message, param=param, retry_after_s=retry_after_s)
