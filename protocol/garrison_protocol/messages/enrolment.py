"""Enrolment and device requests over HTTPS (docs/protocol.md, "Enrolment").

An enrolment string carries the controller's URL, a one-time token, and the SHA-256 of ``1.root.json`` and of the
server CA, so that a board trusts nothing it meets on the way.
"""

from __future__ import annotations

import base64
import binascii

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import DeviceId, HexKey, Sha256

PREFIX = "garrison-enroll:"


class EnrolmentString(BaseModel):
    """What an operator hands to a board."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str = Field(pattern=r"^https://[^/ ]+$")
    token: str = Field(min_length=16, max_length=128)
    root_sha256: Sha256
    server_ca_sha256: Sha256

    def encode(self) -> str:
        """Return the one-line text form."""
        return PREFIX + base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


def parse_enrolment(text: str) -> EnrolmentString:
    """Return what an enrolment string says.

    Raises:
        InvalidError: ``enrolment.malformed``.
    """
    body = text.strip().removeprefix(PREFIX)
    try:
        if not text.strip().startswith(PREFIX):
            raise ValueError("no prefix")
        return EnrolmentString.model_validate_json(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, ValidationError, binascii.Error) as error:
        raise InvalidError(
            "enrolment.malformed",
            "this is no enrolment string",
            hint="copy the whole line that `garrison device token create` printed",
        ) from error


class EnrolRequest(BaseModel):
    """POST /device/v1/enroll. ``proof``: the identity key's signature (hex) over ``proof_bytes``."""

    model_config = ConfigDict(extra="ignore")

    token: str
    csr_pem: str = Field(max_length=16 * 1024)
    identity: HexKey
    proof: str = Field(pattern=r"^[0-9a-f]{128}$")


class EnrolResponse(BaseModel):
    """What a new board gets. The id comes from the token, never from the CSR."""

    model_config = ConfigDict(extra="ignore")

    device: DeviceId
    certificate_pem: str
    mqtt_host: str
    mqtt_port: int


class NonceResponse(BaseModel):
    """GET /device/v1/nonce: answered once, soon, over the board's identity key."""

    nonce: str
    time: int
    """The controller's Unix seconds; untrusted until signed."""


class SessionRequest(BaseModel):
    """POST /device/v1/session. ``proof``: the identity key's signature (hex) over ``session_bytes``."""

    device: DeviceId
    nonce: str = Field(max_length=256)
    proof: str = Field(pattern=r"^[0-9a-f]{128}$")


class SessionResponse(BaseModel):
    """A bearer token for blobs, valid for ``expires_in`` seconds."""

    token: str
    expires_in: int


def proof_bytes(token: str, csr_pem: str) -> bytes:
    """Return what the identity key signs at enrolment."""
    return b"garrison-enrol/v1\n" + token.encode() + b"\n" + csr_pem.encode()


def session_bytes(device: str, nonce: str) -> bytes:
    """Return what the identity key signs to open a session."""
    return f"garrison-session/v1\n{device}\n{nonce}".encode()
