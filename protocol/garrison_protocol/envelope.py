"""DSSE envelopes: bytes on the wire <-> a verified message body (docs/protocol.md, "Envelope").

Source: the Dead Simple Signing Envelope, protocol v1.0. A large body is compressed before it is signed, and
decompressed, with a bound, only after its signature held. Nothing here parses JSON of an unverified body.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from garrison_protocol import keys
from garrison_protocol.errors import InvalidError, RefusedError

MAX_ENVELOPE_BYTES = 512 * 1024 - 1
"""Checked before publishing: a QoS 1 publish above a broker's packet limit can block its client for ever."""
MAX_BODY_BYTES = 4 * 1024 * 1024
COMPRESS_ABOVE_BYTES = 1024
TYPE_PREFIX = "application/vnd.garrison.v1."
_JSON = "+json"
_ZLIB = "+json+zlib"


@dataclass(frozen=True, slots=True)
class Opened:
    """A body whose signature held: what kind it says it is, the exact bytes, and who signed."""

    kind: str
    body: bytes
    key_id: str


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding, the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(kind: str, body: bytes, key: keys.SigningKey) -> bytes:
    """Return the envelope for ``body``, signed by ``key``.

    Raises:
        InvalidError: ``envelope.too_large``; the caller must split what it sends.
    """
    payload, payload_type = body, TYPE_PREFIX + kind + _JSON
    if len(body) > COMPRESS_ABOVE_BYTES:
        payload, payload_type = zlib.compress(body, 6), TYPE_PREFIX + kind + _ZLIB
    keyid, signature = key.signature(pae(payload_type, payload))
    envelope = json.dumps(
        {
            "payloadType": payload_type,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": keyid, "sig": base64.b64encode(signature).decode()}],
        },
        separators=(",", ":"),
    ).encode()
    if len(envelope) > MAX_ENVELOPE_BYTES or len(body) > MAX_BODY_BYTES:
        raise InvalidError("envelope.too_large", f"a {kind} envelope of {len(envelope)} bytes", size=len(envelope))
    return envelope


def unseal(envelope: bytes, public_key: Callable[[str], str | None]) -> Opened:
    """Return the body of ``envelope`` once one of its signatures holds.

    ``public_key`` maps a key id to the raw public key in hex if that key is trusted *for this use*, else None.

    Raises:
        InvalidError: ``envelope.too_large``, ``envelope.malformed``, ``envelope.kind_unknown``.
        RefusedError: ``envelope.key_unknown`` or ``envelope.bad_signature``.
    """
    payload_type, payload, signatures = _parse(envelope)
    known = False
    for signer, signature in signatures:
        public = public_key(signer)
        if public is None:
            continue
        known = True
        if keys.verify(public, signature, pae(payload_type, payload)):
            return Opened(*_body(payload_type, payload), signer)
    if known:
        raise RefusedError("envelope.bad_signature", "the signature does not match the message")
    raise RefusedError("envelope.key_unknown", "no signature by a key that is trusted for this message")


def signers(envelope: bytes) -> tuple[str, ...]:
    """Return the key ids that ``envelope`` names, nothing of it verified.

    Raises:
        InvalidError: ``envelope.too_large``, ``envelope.malformed``.
    """
    return tuple(signer for signer, _ in _parse(envelope)[2])


def _parse(envelope: bytes) -> tuple[str, bytes, list[tuple[str, bytes]]]:
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise InvalidError("envelope.too_large", f"an envelope of {len(envelope)} bytes", size=len(envelope))
    try:
        outer = json.loads(envelope)
        payload_type = outer["payloadType"]
        pae(payload_type, b"")  # JSON may escape half a surrogate pair, which has no bytes to sign
        payload = base64.b64decode(outer["payload"], validate=True)
        signatures = [
            (str(one["keyid"]), base64.b64decode(one["sig"], validate=True)) for one in outer["signatures"][:8]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise InvalidError("envelope.malformed", "this is no DSSE envelope") from error
    if not isinstance(payload_type, str):
        raise InvalidError("envelope.malformed", "payloadType is no string")
    return payload_type, payload, signatures


def _body(payload_type: str, payload: bytes) -> tuple[str, bytes]:
    if not payload_type.startswith(TYPE_PREFIX):
        raise InvalidError("envelope.kind_unknown", f"payload type {payload_type[:80]!r}")
    rest = payload_type.removeprefix(TYPE_PREFIX)
    if rest.endswith(_ZLIB):
        return rest.removesuffix(_ZLIB), _decompress(payload)
    if rest.endswith(_JSON):
        if len(payload) > MAX_BODY_BYTES:
            raise InvalidError("envelope.too_large", f"a body of {len(payload)} bytes", size=len(payload))
        return rest.removesuffix(_JSON), payload
    raise InvalidError("envelope.kind_unknown", f"payload type {payload_type[:80]!r}")


def _decompress(payload: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(payload, MAX_BODY_BYTES)
    except zlib.error as error:
        raise InvalidError("envelope.malformed", "the compressed body is damaged") from error
    if stream.unconsumed_tail:
        raise InvalidError("envelope.too_large", f"a body above {MAX_BODY_BYTES} bytes")
    if not stream.eof or stream.unused_data:
        raise InvalidError("envelope.malformed", "the compressed body is cut short or has bytes behind it")
    return body
