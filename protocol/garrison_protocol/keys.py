"""Ed25519 keys as Garrison names and stores them."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import RefusedError


def key_id(public_hex: str) -> str:
    """Return the id of a raw Ed25519 public key: SHA-256 of its 32 bytes, in hex."""
    return sha256_hex(bytes.fromhex(public_hex))


class SigningKey:
    """A private key that signs envelopes. Not for TUF roles, whose keys stay with python-tuf's signers."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_hex = private.public_key().public_bytes_raw().hex()
        self.key_id = key_id(self.public_hex)

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key from the system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Return the key in the PKCS#8 PEM file ``path``.

        Raises:
            RefusedError: ``key.readable_by_others`` if others than the owner may read it, ``key.wrong_type``.
        """
        refuse_if_readable_by_others(path)
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(private, Ed25519PrivateKey):
            raise RefusedError("key.wrong_type", f"{path} holds no Ed25519 key")
        return cls(private)

    def save(self, path: Path) -> None:
        """Write the key as PKCS#8 PEM, mode 0600, durably; an existing file is never overwritten."""
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private_file(path, pem)

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of ``data`` (RFC 8032)."""
        return self._private.sign(data)


def verify(public_hex: str, signature: bytes, data: bytes) -> bool:
    """Tell whether ``signature`` over ``data`` is by the key ``public_hex``."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def refuse_if_readable_by_others(path: Path) -> None:
    """Refuse a private key file that group or others can read.

    Raises:
        RefusedError: ``key.readable_by_others``.
    """
    if path.stat().st_mode & 0o077:
        raise RefusedError(
            "key.readable_by_others",
            f"{path} can be read by others than its owner",
            hint=f"chmod 600 {path}, and replace the key if others may have read it",
        )


def write_private_file(path: Path, data: bytes) -> None:
    """Create ``path`` with mode 0600 holding ``data``, durably.

    Raises:
        FileExistsError: ``path`` exists; private files are never overwritten.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
