"""Enrolment: from the operator's one line to an identity that the fleet accepts (docs/protocol.md, "Enrolment").

The line pins what the board trusts: the server CA and the first TUF root, both by SHA-256. Private keys are made here
and never leave. Each file is durable before the next step, and ``device.json`` comes last, so a try that was cut off
anywhere is repeated with the same line and the same keys.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from garrison_agent.adapters.device_http import exchange, read_whole, refusal, request
from garrison_agent.identity import (
    DeviceRecord,
    Folders,
    Identity,
    create_keys,
    load_record,
    pinned_context,
    save_record,
)
from garrison_agent.registry.files import write_atomic
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, RefusedError
from garrison_protocol.messages.enrolment import (
    EnrolRequest,
    EnrolResponse,
    parse_enrolment,
    proof_bytes,
)


def enrol(state_dir: Path, text: str) -> Identity:
    """Return the board's new identity, stored below ``state_dir``; ``text`` is the enrolment string.

    Repeating it with the string that enrolled this board changes nothing.

    Raises:
        InvalidError: ``enrolment.malformed``.
        ConflictError: ``enrolment.already_enrolled`` with another string.
        RefusedError: ``enrolment.wrong_server_ca``, ``enrolment.wrong_root``, ``enrolment.wrong_certificate``.
        UnavailableError: ``controller.unreachable``.
        GarrisonError: What the controller says is wrong with the token, by its own code.
    """
    line = parse_enrolment(text)
    token_sha256 = sha256_hex(line.token.encode())
    record = load_record(state_dir)
    if record is not None:
        if record.token_sha256 == token_sha256:
            return Identity.load(state_dir)
        raise ConflictError(
            "enrolment.already_enrolled",
            f"this board is enrolled already, as {record.device} at {record.url}",
            hint=f"to give it another identity, stop the agent and move {Folders(state_dir).identity} away first",
        )
    folders = Folders(state_dir)
    server_ca = _fetch(line.url, _unverified(), "/device/v1/server-ca.pem")
    if sha256_hex(server_ca) != line.server_ca_sha256:
        raise _wrong("enrolment.wrong_server_ca", f"the server CA at {line.url} is not the one in the string")
    write_atomic(folders.server_ca, server_ca)
    trusted = pinned_context(folders.server_ca)
    root = _fetch(line.url, trusted, "/device/v1/metadata/1.root.json")
    if sha256_hex(root) != line.root_sha256:
        raise _wrong("enrolment.wrong_root", f"the TUF root at {line.url} is not the one in the string")
    write_atomic(folders.root, root)

    signing_key, tls_key_pem = create_keys(state_dir)
    csr_pem = _request_pem(tls_key_pem)
    answer = exchange(
        line.url,
        trusted,
        "/device/v1/enroll",
        EnrolResponse,
        EnrolRequest(
            token=line.token,
            csr_pem=csr_pem,
            identity=signing_key.public_hex,
            proof=signing_key.sign(proof_bytes(line.token, csr_pem)).hex(),
        ),
    )
    _check_certificate(answer, tls_key_pem)
    write_atomic(folders.tls_cert, answer.certificate_pem.encode(), mode=0o600)
    save_record(
        state_dir,
        DeviceRecord(
            device=answer.device,
            url=line.url,
            mqtt_host=answer.mqtt_host,
            mqtt_port=answer.mqtt_port,
            token_sha256=token_sha256,
        ),
    )
    return Identity.load(state_dir)


def _fetch(url: str, context: ssl.SSLContext, path: str) -> bytes:
    with request(url, context, "GET", path) as response:
        data = read_whole(response, url)
        if response.status != 200:
            raise refusal(response.status, data, path)
        return data


def _unverified() -> ssl.SSLContext:
    """Return TLS settings for the one request whose answer is checked by its digest instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _request_pem(tls_key_pem: bytes) -> str:
    """Return a CSR; the controller takes the key from it and decides name and extensions itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = serialization.load_pem_private_key(tls_key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RefusedError("key.wrong_type", "the TLS key is no elliptic curve key", hint="delete it and enrol again")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "garrison-board")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def _check_certificate(answer: EnrolResponse, tls_key_pem: bytes) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import NameOID

    key = serialization.load_pem_private_key(tls_key_pem, password=None)
    try:
        certificate = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
        names = [item.value for item in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except ValueError as error:
        raise _wrong("enrolment.wrong_certificate", "the controller sent no certificate") from error
    if certificate.public_key() != key.public_key() or names != [answer.device]:
        raise _wrong("enrolment.wrong_certificate", "the controller's certificate is not for this board's key and id")


def _wrong(code: str, message: str) -> RefusedError:
    return RefusedError(
        code,
        message,
        hint="do not go on: check the address, make a new string with `garrison device token create`, and find out "
        "who answered",
    )
