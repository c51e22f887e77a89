"""Signers' keys that are no files of ours: PKCS#11 tokens and key services, named by securesystemslib's URIs.

``hsm:2?label=TOKEN`` is key 2 of a token (environment variable PYKCS11LIB names its driver), ``file2:PATH`` an
unencrypted PKCS#8 file as other TUF tools keep, ``gcpkms:``, ``awskms:``, ``azurekms:``, ``hv:``, ``tkey:`` are the
services and devices that securesystemslib knows, each with a library of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import HSMSigner, Key, Signature, Signer, SSlibKey

from garrison_controller.signing.keys import KeyFiles, named_key, new_key_paths, write_public
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.keys import refuse_if_readable_by_others

HSM, FILE = "hsm", "file2"
SCHEMES = (HSM, FILE, "gcpkms", "awskms", "azurekms", "hv", "tkey")

Secret = Callable[[str], str]
"""Given what is asked for ("pin"), returns it."""


def is_uri(key: str) -> bool:
    """Tell whether ``key`` names a key by URI, and not a file of ours."""
    scheme, colon, _ = key.partition(":")
    return bool(colon) and scheme in SCHEMES


def import_key(name: str, uri: str, folder: Path, secret: Secret, public_pem: bytes | None = None) -> KeyFiles:
    """Write ``<name>.pub.json`` for the key that ``uri`` names; the private key stays where it is.

    The public half comes from the token (``hsm:``) or the file (``file2:``), else from ``public_pem``.

    Raises:
        InvalidError: ``signing.name_invalid``, ``signing.key_uri_malformed``.
        ConflictError: ``signing.key_exists``.
        RefusedError: ``signing.key_unusable``, ``key.readable_by_others``.
    """
    scheme, _, rest = uri.partition(":")
    if not is_uri(uri):
        raise InvalidError("signing.key_uri_malformed", f"{uri!r} names no key", hint=f"begins with {SCHEMES}")
    _, public_path = new_key_paths(name, folder)
    try:
        if public_pem is not None:
            public = load_pem_public_key(public_pem)
        elif scheme == HSM:
            number, query = urlsplit(uri).path, dict(parse_qsl(urlsplit(uri).query))
            _, found = HSMSigner.import_(int(number) if number else None, query.get("label"), secret)
            public = load_pem_public_key(str(found.keyval["public"]).encode())
        elif scheme == FILE:
            refuse_if_readable_by_others(_existing(Path(rest)))
            public = load_pem_private_key(Path(rest).read_bytes(), None).public_key()
        else:
            raise InvalidError(
                "signing.key_uri_malformed",
                f"the public half of a {scheme} key is not known here",
                hint="export it from the service as PEM, and give it with --public-pem",
            )
        key = named_key(public, name)
    except GarrisonError:
        raise
    except Exception as error:  # every driver raises what it likes
        raise _unusable(uri, error) from error
    write_public(public_path, name, key)
    return KeyFiles(name, key.keyid, Path(uri), public_path)


def open_uri(uri: str, public: SSlibKey, secret: Secret) -> Signer:
    """Return the signer for the key ``uri``, whose public half is ``public``; each signature is verified at once.

    Raises:
        RefusedError: ``signing.key_unusable``, ``key.readable_by_others``.
        NotFoundError: ``signing.key_missing``.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == FILE:
        refuse_if_readable_by_others(_existing(Path(rest)))
    try:
        return _Checked(uri, Signer.from_priv_key_uri(uri, public, secret))
    except Exception as error:  # as above
        raise _unusable(uri, error) from error


class _Checked(Signer):
    """Signs with another signer and refuses what does not verify: the token may hold another key than was named."""

    def __init__(self, uri: str, signer: Signer) -> None:
        self._uri, self._signer = uri, signer

    @property
    def public_key(self) -> Key:
        return self._signer.public_key

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Secret | None = None) -> Signer:
        return cls(priv_key_uri, Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler))

    def sign(self, payload: bytes) -> Signature:
        try:
            signature = self._signer.sign(payload)
            self.public_key.verify_signature(signature, payload)
        except UnverifiedSignatureError as error:
            raise RefusedError(
                "signing.key_mismatch",
                f"{self._uri} is not the key whose public half was given",
                hint="compare the key with `garrison registry key list`",
            ) from error
        except GarrisonError:
            raise
        except Exception as error:  # as above
            raise _unusable(self._uri, error) from error
        return signature


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NotFoundError("signing.key_missing", f"there is no key file {path}")
    return path


def _unusable(uri: str, error: Exception) -> RefusedError:
    return RefusedError(
        "signing.key_unusable",
        f"the key {uri} cannot be used: {str(error) or type(error).__name__}",
        hint="a token needs its driver's path in PYKCS11LIB, `pip install python-pkcs11`, and the right PIN",
    )
