"""Release signers' keys: encrypted PKCS#8 Ed25519 files, used as python-tuf signers. Other keys: ``key_uris``.

TUF key ids stay securesystemslib's (they differ from ``garrison_protocol.keys.key_id``). The signer's name travels in
the key object as ``x-garrison-signer``, so that every review can say who signs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.ids import NAME_PATTERN
from garrison_protocol.keys import refuse_if_readable_by_others, write_private_file

SIGNER_FIELD = "x-garrison-signer"
MIN_PASSPHRASE = 8
MAX_KEY_FILE_BYTES = 16 * 1024
ED25519 = ("ed25519", "ed25519")
KINDS = (ED25519, ("ecdsa", "ecdsa-sha2-nistp256"), ("ecdsa", "ecdsa-sha2-nistp384"))
"""Key types and schemes of signers; the second and third are what PKCS#11 tokens hold."""


@dataclass(frozen=True)
class KeyFiles:
    """A new key pair on disk."""

    name: str
    keyid: str
    private_path: Path
    public_path: Path


def generate_key(name: str, folder: Path, passphrase: str) -> KeyFiles:
    """Create ``<name>.key`` (PKCS#8, encrypted with ``passphrase``, mode 0600) and ``<name>.pub.json`` in ``folder``.

    Raises:
        InvalidError: ``signing.name_invalid``, ``signing.passphrase_short``.
        ConflictError: ``signing.key_exists``; a key is never overwritten.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise InvalidError(
            "signing.passphrase_short",
            f"the passphrase of {name} has fewer than {MIN_PASSPHRASE} characters",
            hint="use a long one: whoever has file and passphrase signs in your name",
        )
    private_path, public_path = new_key_paths(name, folder)
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase.encode()),
    )
    key = SSlibKey.from_crypto(private.public_key())
    write_private_file(private_path, pem)
    write_public(public_path, name, key)
    return KeyFiles(name, key.keyid, private_path, public_path)


def new_key_paths(name: str, folder: Path) -> tuple[Path, Path]:
    """Return where ``name``'s private and public key go in ``folder``, which is made if need be.

    Raises:
        InvalidError: ``signing.name_invalid``.
        ConflictError: ``signing.key_exists``.
    """
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise InvalidError("signing.name_invalid", f"{name!r} cannot name a key", hint="use a-z, 0-9, '.', '_', '-'")
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.key", folder / f"{name}.pub.json"
    for path in paths:
        if path.exists():
            raise ConflictError("signing.key_exists", f"{path} exists already", hint="choose another name or folder")
    return paths


def write_public(path: Path, name: str, key: SSlibKey) -> None:
    """Write what a signer hands in."""
    document = {"name": name, "keyid": key.keyid, "key": key.to_dict()}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_signer(path: Path, passphrase: str) -> CryptoSigner:
    """Return the signer whose encrypted private key is in ``path``.

    Raises:
        NotFoundError: ``signing.key_missing``.
        RefusedError: ``signing.wrong_passphrase``, ``key.readable_by_others``.
        InvalidError: ``signing.key_malformed`` if it is no encrypted Ed25519 PKCS#8 key.
    """
    if not path.is_file():
        raise NotFoundError(
            "signing.key_missing", f"there is no key file {path}", hint="name what `registry key generate` wrote"
        )
    refuse_if_readable_by_others(path)
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), passphrase.encode())
    except TypeError as error:
        raise InvalidError(
            "signing.key_malformed",
            f"{path} is not encrypted",
            hint="signers' keys are made by `garrison registry key generate` and always have a passphrase",
        ) from error
    except ValueError as error:
        if b"BEGIN ENCRYPTED PRIVATE KEY" not in path.read_bytes():
            raise InvalidError("signing.key_malformed", f"{path} holds no PKCS#8 private key") from error
        raise RefusedError(
            "signing.wrong_passphrase",
            f"the passphrase does not open {path}",
            hint="give it with --passphrase-file, GARRISON_KEY_PASSPHRASE, or at the prompt",
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InvalidError("signing.key_malformed", f"{path} holds no Ed25519 key")
    return CryptoSigner(private)


def load_public(path: Path) -> SSlibKey:
    """Return the public key in a ``<name>.pub.json`` file, named by its signer.

    The key id is computed from the key, never taken from the file.

    Raises:
        NotFoundError: ``signing.key_missing``.
        InvalidError: ``signing.key_malformed``.
    """
    if not path.is_file():
        raise NotFoundError(
            "signing.key_missing", f"there is no public key file {path}", hint="signers hand in NAME.pub.json"
        )
    try:
        document = json.loads(path.read_bytes()[:MAX_KEY_FILE_BYTES])
        name, stated = document["name"], document["key"]
        kind, public = (stated["keytype"], stated["scheme"]), stated["keyval"]["public"]
        if re.fullmatch(NAME_PATTERN, name) is None or kind not in KINDS:
            raise ValueError("no named key of a kind that boards verify")
        if kind == ED25519:
            return public_key(public, name)
        key = named_key(load_pem_public_key(public.encode()), name)
        if (key.keytype, key.scheme) != kind:
            raise ValueError("the scheme does not fit the curve")
        return key
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidError(
            "signing.key_malformed",
            f"{path} is no public key of a signer",
            hint="use the .pub.json file that `garrison registry key generate` wrote",
        ) from error


def public_key(public_hex: str, signer: str) -> SSlibKey:
    """Return the TUF key for a raw Ed25519 public key in hex.

    Raises:
        ValueError: ``public_hex`` is no 32-byte key.
    """
    return named_key(Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)), signer)


def named_key(public: PublicKeyTypes, signer: str) -> SSlibKey:
    """Return the TUF key for ``public``, held by ``signer``.

    Raises:
        ValueError: Keys of this kind have no TUF scheme, or none that boards verify.
    """
    key = SSlibKey.from_crypto(public)
    if (key.keytype, key.scheme) not in KINDS:
        raise ValueError(f"boards verify no {key.scheme} signatures")
    key.unrecognized_fields[SIGNER_FIELD] = signer
    return key


def is_rightly_named(key: Key) -> bool:
    """Tell whether ``key`` is of a kind of ours, and its id the one that follows from it.

    TUF lets metadata choose ids. People compare keys by them: the id of one key must not stand before another.
    """
    public = key.keyval.get("public")
    if not isinstance(public, str):
        return False
    try:
        if (key.keytype, key.scheme) == ED25519:
            named = public_key(public, "")
        else:
            named = named_key(load_pem_public_key(public.encode()), "")
    except (ValueError, UnsupportedAlgorithm):
        return False
    return (named.keyid, named.keytype, named.scheme) == (key.keyid, key.keytype, key.scheme)


def signer_name(key: Key) -> str:
    """Return who holds ``key``, as root metadata says; the start of the key id where it does not."""
    name = key.unrecognized_fields.get(SIGNER_FIELD)
    return name if isinstance(name, str) else key.keyid[:12]
