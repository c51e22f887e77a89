"""Certificate authorities: who may sign what, and exactly what a certificate says.

A board's certificate takes nothing from its CSR but the public key: subject and extensions are ours, or a CSR could
ask for another board's name at the broker. Sources: RFC 5280; docs/security.md, "Certificates".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from garrison_protocol import keys
from garrison_protocol.errors import InvalidError, RefusedError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
CRL_DAYS = 3650
"""A stale revocation list locks every board out of the broker, so it practically never ends."""
CLOCK_SKEW = timedelta(minutes=5)
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Issued:
    """A signed certificate."""

    pem: str
    serial: str
    """In hex."""
    not_after: datetime
    issuer: str
    """``Authority.fingerprint``."""


class Authority:
    """A CA with its private key. Its methods keep no state; callers store serials."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate
        self.pem = to_pem(certificate)

    @classmethod
    def create(cls, name: str, now: datetime) -> Authority:
        """Return a new P-256 authority called ``name``, for ten years, that signs end certificates only."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def of(cls, key: PrivateKeyTypes, certificate_path: Path) -> Authority:
        """Return the authority that holds ``key`` and a certificate for it in a PEM file, where others may lie too.

        Raises:
            RefusedError: ``key.wrong_type``; the key is of another kind, or of no certificate there.
        """
        for certificate in x509.load_pem_x509_certificates(certificate_path.read_bytes()):
            if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
                return cls(key, certificate)
        raise RefusedError("key.wrong_type", f"the private key of {certificate_path} is another one")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex."""
        return fingerprint(self.certificate)

    def key_pem(self, passphrase: bytes | None = None) -> bytes:
        """Return the private key as PKCS#8 PEM, encrypted if there is a ``passphrase``."""
        return keys.private_key_pem(self._key, passphrase)

    def issue_device(self, device: str, csr_pem: str, days: int, now: datetime) -> Issued:
        """Return a client certificate with CN ``device`` for the public key of the CSR.

        Raises:
            RefusedError: ``enrolment.csr_refused``: no CSR, a bad self-signature, or another kind of key.
        """
        return self.issue_client(device, csr_public_key(csr_pem), days, now)

    def issue_client(self, name: str, public: PublicKey, days: int, now: datetime) -> Issued:
        """Return a client certificate with CN ``name`` and the URI ``garrison:device:<name>``."""
        alternative = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"garrison:device:{name}")])
        return self._issue(name, public, days, now, ExtendedKeyUsageOID.CLIENT_AUTH, alternative)

    def issue_server(self, names: Sequence[str], public: PublicKey, days: int, now: datetime) -> Issued:
        """Return a server certificate for DNS names and addresses; the first is its CN."""
        alternative = x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys(names)])
        return self._issue(names[0][:64], public, days, now, ExtendedKeyUsageOID.SERVER_AUTH, alternative)

    def revocation_list(self, revoked: Iterable[tuple[str, datetime]], now: datetime) -> bytes:
        """Return a CRL (PEM) naming serial numbers (hex) with the times of their revocation."""
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self.certificate.subject, last_update=now - CLOCK_SKEW, next_update=now + timedelta(CRL_DAYS)
        ).add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        for serial, at in revoked:
            entry = x509.RevokedCertificateBuilder(int(serial, 16), at).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        name: str,
        public: PublicKey,
        days: int,
        now: datetime,
        *extensions: x509.ObjectIdentifier | x509.SubjectAlternativeName,
    ) -> Issued:
        purpose, alternative = extensions
        assert isinstance(purpose, x509.ObjectIdentifier)
        assert isinstance(alternative, x509.SubjectAlternativeName)
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        certificate = (
            _builder(_name(name), self.certificate.subject, public, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(alternative, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        return Issued(pem, f"{certificate.serial_number:x}", certificate.not_valid_after_utc, self.fingerprint)


def csr_public_key(csr_pem: str) -> PublicKey:
    """Return the key that a CSR proves to hold.

    Raises:
        RefusedError: ``enrolment.csr_refused``.
    """
    hint = "make the request with a P-256 or Ed25519 key"
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        public = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise RefusedError("enrolment.csr_refused", "this is no certificate request", hint=hint) from error
    if not valid:
        raise RefusedError("enrolment.csr_refused", "the certificate request is not signed by its own key", hint=hint)
    if isinstance(public, ed25519.Ed25519PublicKey):
        return public
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return public
    raise RefusedError("enrolment.csr_refused", "keys of this type get no certificate", hint=hint)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return ``key`` as PKCS#8 PEM without a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_end(path: Path) -> datetime:
    """Return when the last of the certificates in a PEM file ends (aware UTC).

    Raises:
        InvalidError: ``pki.certificate_damaged``.
    """
    return max(certificate.not_valid_after_utc for certificate in read_certificates(path))


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Return every certificate in a PEM file; at least one.

    Raises:
        InvalidError: ``pki.certificate_damaged``.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise InvalidError("pki.certificate_damaged", f"{path} holds no certificate", hint="restore it") from error


def fingerprints(pem: str) -> set[str]:
    """Return the fingerprint of every certificate in ``pem``; none where it holds something else."""
    try:
        return {fingerprint(certificate) for certificate in x509.load_pem_x509_certificates(pem.encode())}
    except ValueError:
        return set()


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the certificate's SHA-256 in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def to_pem(certificate: x509.Certificate) -> str:
    """Return ``certificate`` as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _builder(
    subject: x509.Name, issuer: x509.Name, public: PublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
