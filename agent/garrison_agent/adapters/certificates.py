"""TLS keys, certificate requests, and what an answer to one has to be. Loads ``cryptography.x509``: import it late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from garrison_agent.core.certificate import Validity
from garrison_protocol.errors import RefusedError

MAX_CHAIN = 4


@contextlib.contextmanager
def _value_errors_only() -> Iterator[None]:
    """Translate what ``cryptography`` raises for versions and algorithms that it does not know.

    Raises:
        ValueError: In the place of those.
    """
    try:
        yield
    except (x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from error


def new_key() -> bytes:
    """Return a new P-256 key as PKCS#8 PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def request_pem(key_pem: bytes) -> str:
    """Return a CSR; the controller takes the key from it and decides name and extensions itself.

    Raises:
        RefusedError: ``key.wrong_type``.
    """
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RefusedError("key.wrong_type", "the TLS key is no elliptic curve key", hint="delete it and enrol again")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "garrison-board")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


@_value_errors_only()
def checked_pair(certificate_pem: str, key_pem: bytes, device: str) -> bytes:
    """Return certificate (with its chain, if one came) and key in one PEM text, after a line for ``noted``.

    Raises:
        ValueError: This is no certificate, or not one for this key and this board.
    """
    chain = x509.load_pem_x509_certificates(certificate_pem.encode())
    key = serialization.load_pem_private_key(key_pem, password=None)
    names = [item.value for item in chain[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise ValueError(f"it is for {', '.join(str(name)[:80] for name in names) or 'nobody'}, not for {device}")
    if chain[0].public_key() != key.public_key():
        raise ValueError("it is for another key than the one that this board has just made")
    if len(chain) > MAX_CHAIN:
        raise ValueError(f"it comes with {len(chain) - 1} others")
    return _note(chain[0]) + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain) + key_pem


@_value_errors_only()
def check_issuer(pair_pem: bytes, cas_pem: str) -> None:
    """Return if one of the CAs in ``cas_pem`` issued the first certificate in ``pair_pem``.

    Raises:
        ValueError: None did, or there is none.
    """
    leaf = x509.load_pem_x509_certificate(pair_pem)
    for ca in x509.load_pem_x509_certificates(cas_pem.encode()):
        try:
            leaf.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return
    raise ValueError("no device CA of the fleet issued it")


@_value_errors_only()
def read_certificate(pair_pem: bytes) -> tuple[str, Validity]:
    """Return SHA-256 (hex) and span of the first certificate in ``pair_pem``.

    Raises:
        ValueError: There is none.
    """
    certificate = x509.load_pem_x509_certificate(pair_pem)
    span = Validity(certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())
    return certificate.fingerprint(hashes.SHA256()).hex(), span


def _note(leaf: x509.Certificate) -> bytes:
    return b"certificate %s from %d to %d\n" % (
        leaf.fingerprint(hashes.SHA256()).hex().encode(),
        leaf.not_valid_before_utc.timestamp(),
        leaf.not_valid_after_utc.timestamp(),
    )
