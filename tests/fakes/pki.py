"""A small fleet PKI for tests: a device CA, a server CA, and certificates from both, as the controller makes them."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_HOUR = datetime.timedelta(hours=1)
_TEN_YEARS = datetime.timedelta(days=3650)


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key as PEM files."""

    certificate: x509.Certificate
    cert: Path
    key: Path


class Authority:
    """A P-256 certificate authority writing PEM files into ``folder``."""

    def __init__(self, folder: Path, name: str, *, begin: datetime.datetime | None = None) -> None:
        """``begin`` is when the CA becomes valid, by default an hour ago; it lasts ten years."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        begin = begin or _now() - _HOUR
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + _TEN_YEARS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_ca_usage(), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = folder / f"{name}.pem"
        self.pem.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        self.crl = folder / f"{name}.crl"
        self._revoked: list[int] = []
        self._write_crl()

    def issue(
        self, cn: str, *, server: bool = False, days: float = 30, begin: datetime.datetime | None = None
    ) -> Issued:
        """Return a new key and certificate for ``cn``; a negative ``days`` gives one that has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.sign(cn, key.public_key(), server=server, days=days, begin=begin)
        paths = self.folder / f"{cn}.pem", self.folder / f"{cn}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        os.chmod(paths[1], 0o600)
        return Issued(certificate, *paths)

    def sign(
        self,
        cn: str,
        public_key: ec.EllipticCurvePublicKey,
        *,
        server: bool = False,
        days: float = 30,
        begin: datetime.datetime | None = None,
    ) -> x509.Certificate:
        """Return a certificate for a key that the caller holds (what a CSR asks for), for ``days`` from ``begin``."""
        end = (begin or _now()) + datetime.timedelta(days=days)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"urn:garrison:device:{cn}")]
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        if server:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            usage = ExtendedKeyUsageOID.SERVER_AUTH
        return (
            x509.CertificateBuilder()
            .subject_name(_name(cn))
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin or min(_now(), end) - _HOUR)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def revoke(self, certificate: x509.Certificate) -> None:
        """Put ``certificate`` on the list in ``self.crl``."""
        self._revoked.append(certificate.serial_number)
        self._write_crl()

    def _write_crl(self) -> None:
        now = _now()
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - _HOUR).next_update(now + _TEN_YEARS)
        for serial in self._revoked:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _HOUR).build()
            builder = builder.add_revoked_certificate(revoked)
        self.crl.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


class FleetPki:
    """Both authorities of a fleet and a server certificate for ``localhost`` and 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.device_ca = Authority(folder, "device-ca")
        self.server_ca = Authority(folder, "server-ca")
        self.server = self.server_ca.issue("server", server=True)

    def issue(self, cn: str, *, days: float = 30) -> Issued:
        """Return a client certificate for a board or a controller."""
        return self.device_ca.issue(cn, days=days)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(cn: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])


def _ca_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
