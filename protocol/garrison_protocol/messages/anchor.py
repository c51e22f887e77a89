"""The anchor: what the controller says now, bound to a nonce of the board (docs/protocol.md, "Anchor").

It is a board's secure source of time, and tells one that lost or went back in its store how far it had been. Signed
with a director key. Uptane calls the first part a time server's signed attestation.
"""

from __future__ import annotations

from pydantic import Field

from garrison_protocol.ids import Sha256
from garrison_protocol.messages.base import Message, Part

ANCHOR_KIND = "anchor"
NONCE_PATTERN = r"^[0-9a-f]{32}$"


class Committed(Part):
    """The newest row of a stream that the controller has of this board, in the board's newest epoch there."""

    epoch: str
    seq: int = Field(ge=0, lt=2**53)
    hash: Sha256 | None = None


class Anchor(Message):
    """The answer to one nonce; nothing of it holds for any other.

    Over HTTPS: ``GET /device/v1/anchor?device=<id>&nonce=<32 hex>``; over MQTT a fetch; on a stick beside the desired
    state, for the nonce that the board's last export carried.
    """

    nonce: str = Field(pattern=NONCE_PATTERN)
    time: int = Field(ge=0, lt=2**40)
    """Unix seconds by the controller's clock."""
    desired_counter: int = Field(default=0, ge=0, lt=2**53)
    """The newest desired state that the controller signed for this board; 0: none yet."""
    streams: dict[str, Committed] = Field(default_factory=dict)
