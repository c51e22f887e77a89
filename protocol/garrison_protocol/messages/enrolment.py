"""Enrolment and device requests over HTTPS (docs/protocol.md, "Enrolment").

An enrolment string carries the controller's URL, a token, and the SHA-256 of ``1.root.json`` and of the server CA, so
that a board trusts nothing it meets on the way. An invitation has no token: who comes with it waits for approval.
"""

from __future__ import annotations

import base64
import binascii

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import DeviceId, HexKey, Sha256
from garrison_protocol.keys import key_id

PREFIX = "garrison-enroll:"


class EnrolmentString(BaseModel):
    """What an operator hands to a board."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str = Field(pattern=r"^https://[^/ ]+$")
    token: str = Field(default="", max_length=128)
    """Empty in an invitation."""
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
    """POST /device/v1/enroll. ``proof``: the identity key's signature (hex) over ``proof_bytes``.

    Without a token it is answered with 202 and ``EnrolPending`` until an operator has approved it; then the same
    request is answered as one with a token.
    """

    model_config = ConfigDict(extra="ignore")

    token: str = Field(default="", max_length=128)
    name: str = Field(default="", max_length=63)
    """What the board would like to be called; binding where the token leaves it open, a proposal without a token."""
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


class EnrolPending(BaseModel):
    """202: an operator has to compare ``fingerprint`` (``key_fingerprint``) with the one that the board shows."""

    model_config = ConfigDict(extra="ignore")

    fingerprint: str
    name: str
    """What the board asked to be called."""


class NonceResponse(BaseModel):
    """GET /device/v1/nonce: answered once, soon, over the board's identity key."""

    nonce: str = Field(pattern=r"^[!-~]{1,256}$")
    """What requests take back: longer, or with half a surrogate pair in it, it could not be signed or sent."""
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


class RenewRequest(BaseModel):
    """POST /device/v1/certificate. ``proof``: the identity key's signature (hex) over ``renewal_bytes``.

    The nonce is one of GET /device/v1/nonce, so that a recorded request renews nothing. The old certificate may have
    ended: the identity key proves who asks.
    """

    model_config = ConfigDict(extra="ignore")

    device: DeviceId
    nonce: str = Field(max_length=256)
    csr_pem: str = Field(max_length=16 * 1024)
    proof: str = Field(pattern=r"^[0-9a-f]{128}$")


class RenewResponse(BaseModel):
    """A new certificate for the key in the CSR, and where the broker is now."""

    model_config = ConfigDict(extra="ignore")

    certificate_pem: str
    mqtt_host: str
    mqtt_port: int


class OfflineRequest(BaseModel):
    """What ``garrison-agent enroll --offline`` writes for a board without a network, carried to an operator.

    ``proof``: the identity key's signature (hex) over ``proof_bytes("", csr_pem)``. ``nonce`` (32 hex digits) is the
    board's own; the answer's anchor is bound to it.
    """

    model_config = ConfigDict(extra="ignore")

    format: str = Field(default="garrison-offline-request/v1", pattern=r"^garrison-offline-request/v1$")
    name: str = Field(default="", max_length=63)
    csr_pem: str = Field(max_length=16 * 1024)
    identity: HexKey
    proof: str = Field(pattern=r"^[0-9a-f]{128}$")
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")


class OfflineResponse(BaseModel):
    """What the operator carries back. Its sender is trusted for nothing: the person compares ``root_sha256``."""

    model_config = ConfigDict(extra="ignore")

    format: str = Field(default="garrison-offline-response/v1", pattern=r"^garrison-offline-response/v1$")
    device: DeviceId
    url: str = Field(pattern=r"^https://[^/ ]+$")
    certificate_pem: str
    mqtt_host: str
    mqtt_port: int
    root: str
    """``1.root.json``, exact text."""
    server_ca_pem: str
    anchor: str
    """The anchor (an envelope, exact text) for the request's nonce."""


def proof_bytes(token: str, csr_pem: str) -> bytes:
    """Return what the identity key signs at enrolment."""
    return b"garrison-enrol/v1\n" + token.encode() + b"\n" + csr_pem.encode()


def session_bytes(device: str, nonce: str) -> bytes:
    """Return what the identity key signs to open a session."""
    return f"garrison-session/v1\n{device}\n{nonce}".encode()


def renewal_bytes(device: str, nonce: str, csr_pem: str) -> bytes:
    """Return what the identity key signs to renew the board's certificate."""
    return f"garrison-renew/v1\n{device}\n{nonce}\n{csr_pem}".encode()


def key_fingerprint(identity: str) -> str:
    """Return a public identity key's fingerprint as people compare it: 8 groups of 4 hex digits (128 bits)."""
    digits = key_id(identity)[:32]
    return "-".join(digits[at : at + 4] for at in range(0, 32, 4))
