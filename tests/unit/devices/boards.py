"""What a board does to enrol, for tests."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.enrolment import (
    EnrolRequest,
    OfflineRequest,
    RenewRequest,
    SessionRequest,
    key_fingerprint,
    proof_bytes,
    renewal_bytes,
    session_bytes,
)

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def csr(key: Key, name: str = "whatever", *, asks_to_be_ca: bool = False) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if asks_to_be_ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()


class Board:
    """A board's two keys."""

    def __init__(self) -> None:
        self.identity = SigningKey.generate()
        self.tls = ec.generate_private_key(ec.SECP256R1())

    @property
    def fingerprint(self) -> str:
        return key_fingerprint(self.identity.public_hex)

    def enrol_request(self, token: str = "", *, name: str = "", **changes: str) -> EnrolRequest:
        csr_pem = changes.get("csr_pem") or csr(self.tls)
        proof = changes.get("proof") or self.identity.sign(proof_bytes(token, csr_pem)).hex()
        return EnrolRequest(token=token, name=name, csr_pem=csr_pem, identity=self.identity.public_hex, proof=proof)

    def offline_request(self, name: str = "", nonce: str = "0" * 32) -> OfflineRequest:
        csr_pem = csr(self.tls)
        proof = self.identity.sign(proof_bytes("", csr_pem)).hex()
        return OfflineRequest(name=name, csr_pem=csr_pem, identity=self.identity.public_hex, proof=proof, nonce=nonce)

    def session_request(self, device: str, nonce: str) -> SessionRequest:
        proof = self.identity.sign(session_bytes(device, nonce)).hex()
        return SessionRequest(device=device, nonce=nonce, proof=proof)

    def renew_request(self, device: str, nonce: str, csr_pem: str = "") -> RenewRequest:
        """Ask for a certificate for a new TLS key, as boards do."""
        if not csr_pem:
            self.tls = ec.generate_private_key(ec.SECP256R1())
            csr_pem = csr(self.tls)
        proof = self.identity.sign(renewal_bytes(device, nonce, csr_pem)).hex()
        return RenewRequest(device=device, nonce=nonce, csr_pem=csr_pem, proof=proof)
