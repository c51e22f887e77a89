"""The board's audit chain: headers that commit to bodies and to each other (docs/protocol.md, "Audit chain").

Pure. Board and controller compute the same hashes from the same text. An entry is a canonical-JSON *header* with
``d`` device, ``e`` epoch, ``n`` sequence (from 1), ``t`` time (ms, information only), ``y`` type, ``p`` hash of the
entry before, and, where there is a body, ``c`` = SHA-256(salt || body). Erasing body and salt leaves the chain
whole. Telemetry rows use the same hash without the links, so that old ones can be thinned.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from garrison_protocol.canonical import canonical_json

SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a stream as stored and sent: ``header`` and ``body`` are exact canonical JSON text."""

    seq: int
    hash: str
    header: str
    body: str | None = None
    salt: str | None = None


def genesis(device: str, stream: str, epoch: str) -> str:
    """Return the hash that the first entry of an epoch links to."""
    return hashlib.sha256(f"garrison-chain/v1:{device}:{stream}:{epoch}".encode()).hexdigest()


def header_hash(header: str) -> str:
    """Return an entry's hash: SHA-256(0x00 || header), the leaf hash of RFC 6962."""
    return hashlib.sha256(b"\x00" + header.encode()).hexdigest()


def commitment(salt_hex: str, body: str) -> str:
    """Return what a header holds of its body."""
    return hashlib.sha256(bytes.fromhex(salt_hex) + body.encode()).hexdigest()


def build(
    *,
    device: str,
    epoch: str,
    seq: int,
    time_ms: int,
    kind: str,
    previous: str | None,
    facts: dict[str, str | int | bool | None],
    body: object | None = None,
    salt: bytes | None = None,
) -> Entry:
    """Return the entry that follows ``previous`` (None: a row that is not chained).

    ``facts`` go into the header for all to read; their keys have two letters or more. ``body`` is private to the
    fleet and needs ``salt`` (``SALT_BYTES`` random bytes).

    Raises:
        ValueError: A fact's key collides with the header's own, or a value is not canonical.
    """
    if any(len(key) < 2 for key in facts):
        raise ValueError("one-letter keys belong to the header")
    header: dict[str, object] = {"d": device, "e": epoch, "n": seq, "t": time_ms, "y": kind, **facts}
    if previous is not None:
        header["p"] = previous
    body_text = salt_hex = None
    if body is not None:
        if salt is None or len(salt) != SALT_BYTES:
            raise ValueError(f"a body needs {SALT_BYTES} bytes of salt")
        body_text, salt_hex = canonical_json(body).decode(), salt.hex()
        header["c"] = commitment(salt_hex, body_text)
    text = canonical_json(header).decode()
    return Entry(seq, header_hash(text), text, body_text, salt_hex)


def check(entry: Entry, *, device: str, epoch: str, seq: int, previous: str | None) -> str | None:
    """Return what is wrong with ``entry`` at this place of the chain, or None if all holds."""
    if header_hash(entry.header) != entry.hash:
        return "the entry was altered: its header does not match its hash"
    try:
        header = json.loads(entry.header)
    except (ValueError, RecursionError):
        return "the header is no JSON"
    if not isinstance(header, dict):
        return "the header is no JSON object"
    if header.get("d") != device or header.get("e") != epoch:
        return "the entry belongs to another board or epoch"
    if header.get("n") != seq or entry.seq != seq:
        return f"sequence {header.get('n')} stands where {seq} is due"
    if previous is not None and header.get("p") != previous:
        return "the entry does not follow the one before it"
    if entry.body is not None and (entry.salt is None or commitment(entry.salt, entry.body) != header.get("c")):
        return "the body was altered: it does not match the header's commitment"
    return None
