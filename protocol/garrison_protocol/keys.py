"""Ed25519 keys as Garrison names and stores them."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import RefusedError

if TYPE_CHECKING:  # at run time they would load every kind of key there is, on boards too
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_PLAIN_PEM = re.compile(rb"\s*-----BEGIN PRIVATE KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PRIVATE KEY-----\s*")
_ED25519_PREFIX = bytes.fromhex("302e020100300506032b657004220420")
"""The DER of an unencrypted Ed25519 private key before its 32 bytes (RFC 8410, section 7)."""


def key_id(public_hex: str) -> str:
    """Return the id of a raw Ed25519 public key: SHA-256 of its 32 bytes, in hex."""
    return sha256_hex(bytes.fromhex(public_hex))


class SigningKey:
    """A private key that signs envelopes. Not for TUF roles, whose keys stay with python-tuf's signers."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public_hex = private.public_key().public_bytes_raw().hex()

    @property
    def public_hex(self) -> str:
        """The raw public key in hex."""
        return self._public_hex

    @property
    def key_id(self) -> str:
        """The id under which envelopes name this key."""
        return key_id(self._public_hex)

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key from the system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> SigningKey:
        """Return the key in the PKCS#8 PEM file ``path``, encrypted if and only if there is a ``passphrase``.

        Raises:
            GarrisonError: As ``load_private_key``.
        """
        private = load_private_key(path, passphrase)
        if not isinstance(private, Ed25519PrivateKey):
            raise RefusedError("key.wrong_type", f"{path} holds no Ed25519 key")
        return cls(private)

    def save(self, path: Path, passphrase: bytes | None = None) -> None:
        """Write the key as PKCS#8 PEM, mode 0600, durably; an existing file is never overwritten."""
        write_private_file(path, private_key_pem(self._private, passphrase))

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of ``data`` (RFC 8032)."""
        return self._private.sign(data)

    def signature(self, data: bytes) -> tuple[str, bytes]:
        """Return the key's id and its signature of ``data``: of one and the same key, also while keys are switched."""
        return self.key_id, self.sign(data)


def verify(public_hex: str, signature: bytes, data: bytes) -> bool:
    """Tell whether ``signature`` over ``data`` is by the key ``public_hex``."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_private_key(path: Path, passphrase: bytes | None) -> PrivateKeyTypes:
    """Return the private key in the PKCS#8 PEM file ``path``, encrypted if and only if there is a ``passphrase``.

    A plain key where a passphrase is set is refused: whoever set it believes that the file alone is worth nothing.

    Raises:
        RefusedError: ``key.readable_by_others``, ``key.passphrase_missing``, ``key.wrong_passphrase``,
            ``key.not_encrypted``.
        OSError: The file cannot be read.
        ValueError: It holds no private key.
    """
    refuse_if_readable_by_others(path)
    return parse_private_key(path.read_bytes(), passphrase, path)


def parse_private_key(pem: bytes, passphrase: bytes | None, path: Path) -> PrivateKeyTypes:
    """Return the private key in ``pem``, read from ``path``; as ``load_private_key``.

    Raises:
        RefusedError: ``key.passphrase_missing``, ``key.wrong_passphrase``, ``key.not_encrypted``.
        ValueError: It holds no private key.
    """
    encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in pem
    if encrypted and passphrase is None:
        raise RefusedError(
            "key.passphrase_missing",
            f"{path} is encrypted, and no passphrase is set",
            hint="name the passphrase's file in the configuration, or give it as a credential",
        )
    if passphrase is not None and not encrypted and b"PRIVATE KEY" in pem:
        raise RefusedError(
            "key.not_encrypted",
            f"{path} is not encrypted, though a passphrase is set",
            hint="`garrison serve encrypt-keys` encrypts it; replace the key if someone may have copied it",
        )
    if not encrypted and (plain := _plain_ed25519(pem)) is not None:
        return plain
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 -- 3 MB, which no board has to pay

    try:
        return serialization.load_pem_private_key(pem, passphrase)
    except UnsupportedAlgorithm as error:
        raise ValueError(f"{path} holds a key of an unknown kind") from error
    except (ValueError, TypeError) as error:
        if not encrypted:
            raise ValueError(f"{path} holds no private key") from error
        raise RefusedError(
            "key.wrong_passphrase",
            f"the passphrase does not open {path}",
            hint="give the passphrase that `garrison serve init` or `encrypt-keys` was given",
        ) from error


def private_key_pem(private: PrivateKeyTypes, passphrase: bytes | None) -> bytes:
    """Return ``private`` as PKCS#8 PEM, encrypted if there is a ``passphrase``."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 -- see ``parse_private_key``

    protection = (
        serialization.NoEncryption() if passphrase is None else serialization.BestAvailableEncryption(passphrase)
    )
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


def _plain_ed25519(pem: bytes) -> Ed25519PrivateKey | None:
    """Return the key if ``pem`` is an unencrypted Ed25519 key, as ``SigningKey.save`` writes it; else None."""
    match = _PLAIN_PEM.fullmatch(pem)
    if match is None:
        return None
    try:
        der = base64.b64decode(b"".join(match[1].split()), validate=True)
    except binascii.Error:
        return None
    if len(der) != len(_ED25519_PREFIX) + 32 or not der.startswith(_ED25519_PREFIX):
        return None
    return Ed25519PrivateKey.from_private_bytes(der[-32:])


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
