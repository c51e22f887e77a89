"""Registry bytes over MQTT, where HTTP does not reach: a board asks, chunks come (docs/protocol.md, "Fetch").

A ``fetch`` is an envelope of the board; chunks are raw frames, since whoever asked verifies what it gets by digests or
signatures. A board asks for a window at a time, so that it alone decides how much is on its way.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from pydantic import Field, model_validator

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import Sha256
from garrison_protocol.messages.base import Message, Part

FETCH_KIND = "fetch"
MAX_WINDOW_BYTES = 8 * 1024 * 1024
MIN_PIECE_BYTES = 4 * 1024
MAX_PIECE_BYTES = 256 * 1024
_FRAME = struct.Struct(">4s8sQQB")
_MAGIC = b"GCH1"


class FetchKind(StrEnum):
    """What can be asked for."""

    METADATA = "metadata"
    """A TUF metadata file by ``name``."""
    TARGET = "target"
    """A small target by its path in ``name`` and its ``sha256``."""
    BLOB = "blob"
    """A blob by ``sha256``."""
    ANCHOR = "anchor"
    """The anchor for the board's nonce in ``name``."""
    NONCE = "nonce"
    """A nonce for a renewal: the ``NonceResponse`` as JSON."""
    CERTIFICATE = "certificate"
    """A renewal: ``RenewRequest`` as JSON in ``body``; answered with ``RenewResponse`` as JSON."""


class Fetch(Message):
    """Ask for the bytes from ``offset`` on, at most ``length`` of them, as chunks that carry ``request``."""

    request: str = Field(pattern=r"^[0-9a-f]{16}$")
    kind: FetchKind
    name: str = Field(default="", max_length=512)
    sha256: Sha256 | None = None
    offset: int = Field(default=0, ge=0, lt=2**53)
    length: int = Field(default=MAX_WINDOW_BYTES, ge=1, le=MAX_WINDOW_BYTES)
    piece: int = Field(default=MAX_PIECE_BYTES, ge=MIN_PIECE_BYTES, le=MAX_PIECE_BYTES)
    """Every chunk carries so many bytes, the last of the window or of the whole what is left."""
    body: str = Field(default="", max_length=32 * 1024)

    @model_validator(mode="after")
    def _names_something(self) -> Fetch:
        if self.kind in (FetchKind.TARGET, FetchKind.BLOB) and self.sha256 is None:
            raise ValueError(f"a {self.kind.value} is named by its sha256")
        return self


class ChunkStatus(IntEnum):
    """What a frame carries."""

    DATA = 0
    ERROR = 1
    """The data is a ``FetchRefusal`` as JSON, and the end of this request."""


class FetchRefusal(Part):
    """What an ERROR frame says, as in an HTTP refusal. Nobody signs it: whoever carries frames can make one up."""

    code: str = Field(pattern=r"^[a-z0-9_]{1,48}(\.[a-z0-9_]{1,48}){0,2}$")
    message: str = Field(max_length=500)
    hint: str = Field(default="", max_length=500)
    retryable: bool = False
    status: int = Field(ge=400, le=599)
    """The HTTP status of the same refusal."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One frame: ``data`` lies at ``offset`` of something that has ``total`` bytes."""

    request: str
    offset: int
    total: int
    status: ChunkStatus
    data: bytes


def pack_chunk(chunk: Chunk) -> bytes:
    """Return the frame: magic, request (8 bytes), offset, total (both 64 bits, big-endian), status, data."""
    head = _FRAME.pack(_MAGIC, bytes.fromhex(chunk.request), chunk.offset, chunk.total, chunk.status)
    return head + chunk.data


def unpack_chunk(frame: bytes) -> Chunk:
    """Return what a frame carries; nothing of it is verified.

    Raises:
        InvalidError: ``chunk.malformed``.
    """
    if not _FRAME.size <= len(frame) <= _FRAME.size + MAX_PIECE_BYTES:
        raise InvalidError("chunk.malformed", f"a chunk frame of {len(frame)} bytes")
    magic, request, offset, total, status = _FRAME.unpack_from(frame)
    if magic != _MAGIC or status not in set(ChunkStatus):
        raise InvalidError("chunk.malformed", "this is no chunk frame")
    return Chunk(request.hex(), offset, total, ChunkStatus(status), frame[_FRAME.size :])
