from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from garrison_controller.devices.ca import Authority, csr_public_key
from garrison_controller.devices.keyring import KeyStore
from garrison_protocol.errors import RefusedError
from tests.unit.devices.boards import csr

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("Garrison device CA", NOW)


def test_a_csr_decides_nothing_but_the_key(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.issue_device("edge-1", csr(key, "controller-1", asks_to_be_ca=True), 30, NOW)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["edge-1"]
    assert certificate.public_key() == key.public_key()
    extensions = certificate.extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    alternative = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.UniformResourceIdentifier) == ["garrison:device:edge-1"]
    assert certificate.not_valid_after_utc == NOW + timedelta(days=30) == issued.not_after
    assert issued.serial == f"{certificate.serial_number:x}"


def test_the_chain_holds_for_clients_only_and_only_under_its_own_authority(authority: Authority) -> None:
    issued = authority.issue_device("edge-1", csr(ec.generate_private_key(ec.SECP256R1())), 30, NOW)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())

    def verify(trusted: Authority, at: datetime) -> None:
        policy = PolicyBuilder().store(Store([trusted.certificate])).time(at.replace(tzinfo=None))
        policy.build_client_verifier().verify(certificate, [])

    verify(authority, NOW)
    with pytest.raises(VerificationError):
        verify(authority, NOW + timedelta(days=31))
    with pytest.raises(VerificationError):
        verify(Authority.create("another", NOW), NOW)


def test_ed25519_keys_get_certificates_too(authority: Authority) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    issued = authority.issue_device("edge-1", csr(key), 30, NOW)
    assert x509.load_pem_x509_certificate(issued.pem.encode()).public_key() == key.public_key()


def test_other_keys_are_refused() -> None:
    for key in (ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256K1())):
        with pytest.raises(RefusedError, match=r"enrolment\.csr_refused"):
            csr_public_key(csr(key))


def test_an_rsa_key_is_refused() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(RefusedError, match=r"enrolment\.csr_refused"):
        csr_public_key(request.public_bytes(serialization.Encoding.PEM).decode())


@pytest.mark.parametrize(
    "text", ["", "not pem", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match=r"enrolment\.csr_refused"):
        csr_public_key(text)


def test_a_request_not_signed_by_its_key_is_refused() -> None:
    good = x509.load_pem_x509_csr(csr(ec.generate_private_key(ec.SECP256R1())).encode())
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    place = der.find(b"whatever")
    der[place] ^= 1
    damaged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(RefusedError, match=r"enrolment\.csr_refused"):
        csr_public_key(damaged)


def test_the_revocation_list_names_serials_and_practically_never_ends(authority: Authority) -> None:
    issued = authority.issue_device("edge-1", csr(ec.generate_private_key(ec.SECP256R1())), 30, NOW)
    revoked = x509.load_pem_x509_crl(authority.revocation_list([(issued.serial, NOW)], NOW))
    assert [f"{entry.serial_number:x}" for entry in revoked] == [issued.serial]
    assert revoked.next_update_utc is not None
    assert revoked.next_update_utc - NOW > timedelta(days=3600)
    public = authority.certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert revoked.is_signature_valid(public)


def test_an_authority_comes_back_from_its_files(authority: Authority, tmp_path: Path) -> None:
    key, certificate = tmp_path / "ca.key", tmp_path / "ca.pem"
    key.write_bytes(authority.key_pem(b"correct horse battery"))
    certificate.write_text(authority.pem)
    key.chmod(0o644)
    store = KeyStore(tmp_path, b"correct horse battery")
    with pytest.raises(RefusedError, match=r"key\.readable_by_others"):
        store.load("ca")
    key.chmod(0o600)
    assert Authority.of(store.load("ca"), certificate).pem == authority.pem
    with pytest.raises(RefusedError, match=r"key\.wrong_type"):
        Authority.of(ec.generate_private_key(ec.SECP256R1()), certificate)
