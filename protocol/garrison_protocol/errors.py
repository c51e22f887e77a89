"""Errors with stable codes, one mapping for REST, CLI exit status, and refusals on the wire.

Every expected failure of Garrison is a ``GarrisonError``. Its ``code`` never changes once released
(docs/errors.md lists all of them); its message says what happened, to what; its hint what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class GarrisonError(Exception):
    """An expected failure.

    ``code`` is stable and dotted (``envelope.bad_signature``). ``fields`` are facts a program may want
    (device, digest, ...); they are JSON values. ``retryable`` tells whether the same call may succeed later.
    """

    http_status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        retryable: bool = False,
        **fields: str | int | float | None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.hint = hint
        self.retryable = retryable
        self.fields = fields

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form that REST clients and ``-o json`` see."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            "fields": self.fields,
        }


class InvalidError(GarrisonError):
    """The input is malformed or out of range; the same call will fail again."""

    http_status = 422
    exit_status = 2


class NotFoundError(GarrisonError):
    """The named thing does not exist."""

    http_status = 404
    exit_status = 4


class ConflictError(GarrisonError):
    """The call does not fit the current state."""

    http_status = 409
    exit_status = 5


class RefusedError(GarrisonError):
    """Trust refused: a signature, digest, counter, or identity does not hold."""

    http_status = 403
    exit_status = 6


class DeniedError(GarrisonError):
    """The principal may not do this."""

    http_status = 403
    exit_status = 7


class UnauthenticatedError(GarrisonError):
    """No valid credential came with the call."""

    http_status = 401
    exit_status = 7


class UnavailableError(GarrisonError):
    """A needed party cannot be reached or is busy; retry later."""

    http_status = 503
    exit_status = 8


class InsufficientError(GarrisonError):
    """Disk or memory does not suffice."""

    http_status = 507
    exit_status = 9
