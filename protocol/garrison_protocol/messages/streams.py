"""Batches upward and receipts downward (docs/protocol.md, "Streams and receipts")."""

from __future__ import annotations

from pydantic import Field

from garrison_protocol.ids import Sha256
from garrison_protocol.messages.base import Message, Part
from garrison_protocol.states import Stream

AUDIT_KIND = "audit"
TELEMETRY_KIND = "telemetry"
RECEIPT_KIND = "receipt"
EPOCH_PATTERN = r"^[0-9a-f]{16}$"
MAX_ROWS = 500


class Row(Part):
    """One entry: ``header`` is the exact canonical JSON that was hashed; its sequence stands inside."""

    header: str = Field(max_length=256 * 1024)
    body: str | None = Field(default=None, max_length=256 * 1024)
    salt: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")


class Batch(Message):
    """Consecutive rows of one stream within one epoch, the first of them numbered ``first`` (from 1).

    ``dropped`` counts the rows directly before ``first`` that the board thinned by policy and can never send (its
    audit chain says so): a gap of that size is no reason to ask again. Audit rows are never dropped.
    """

    stream: Stream
    epoch: str = Field(pattern=EPOCH_PATTERN)
    first: int = Field(ge=1)
    dropped: int = Field(default=0, ge=0)
    rows: tuple[Row, ...] = Field(min_length=1, max_length=MAX_ROWS)


class Receipt(Message):
    """All rows up to ``up_to`` are committed at the controller; ``hash`` is that row's (None: nothing yet).

    Signed with the receipt key after the commit. ``resend`` asks for the rows from ``up_to + 1`` on.
    """

    stream: Stream
    epoch: str = Field(pattern=EPOCH_PATTERN)
    up_to: int = Field(ge=0, lt=2**53)
    hash: Sha256 | None = None
    resend: bool = False
