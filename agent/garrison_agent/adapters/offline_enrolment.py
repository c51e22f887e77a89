"""Enrolment of a board without a network: a request is carried to an operator, a response back.

Whoever carries them is trusted for nothing: the response must hold the certificate for this board's own key, and the
person at the board compares the digest of the root. Source: docs/protocol.md, "Enrolment".
"""

from __future__ import annotations

import secrets
import ssl
from pathlib import Path

from pydantic import ValidationError

from garrison_agent.adapters.enrolment import enrolled_by, store, wrong
from garrison_agent.identity import DeviceRecord, Folders, Identity, create_keys, load_record
from garrison_agent.registry.files import write_atomic
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError
from garrison_protocol.messages.enrolment import OfflineRequest, OfflineResponse, proof_bytes


def make_request(state_dir: Path, name: str = "") -> OfflineRequest:
    """Return this board's request; again, it is the same, with the same keys and nonce.

    Raises:
        ConflictError: ``enrolment.already_enrolled``.
        GarrisonError: ``identity.damaged``; RefusedError ``key.readable_by_others``.
    """
    from garrison_agent.adapters.certificates import request_pem

    record = load_record(state_dir)
    if record is not None:
        raise ConflictError(
            "enrolment.already_enrolled",
            f"this board is enrolled already, as {record.device} at {record.url}",
            hint=f"to give it another identity, stop the agent and move {state_dir} away first",
        )
    before = _kept(state_dir)
    signing_key, tls_key_pem = create_keys(state_dir)
    if before is not None and before.identity == signing_key.public_hex and before.name == name:
        return before
    csr_pem = request_pem(tls_key_pem)
    request = OfflineRequest(
        name=name,
        csr_pem=csr_pem,
        identity=signing_key.public_hex,
        proof=signing_key.sign(proof_bytes("", csr_pem)).hex(),
        nonce=secrets.token_hex(16) if before is None else before.nonce,
    )
    write_atomic(Folders(state_dir).offline_request, request.model_dump_json(indent=2).encode() + b"\n", mode=0o600)
    return request


def read_response(data: bytes) -> OfflineResponse:
    """Return what an operator sent back; nothing of it is checked but its form.

    Raises:
        InvalidError: ``enrolment.response_malformed``.
    """
    try:
        return OfflineResponse.model_validate_json(data)
    except ValidationError as error:
        raise InvalidError(
            "enrolment.response_malformed",
            "this is no response to an offline enrolment",
            hint="carry the file that `garrison device enroll approve --request ... --out FILE` wrote",
        ) from error


def accept(state_dir: Path, data: bytes, root_sha256: str) -> Identity:
    """Return the identity that a response gives this board, stored; the same response again changes nothing.

    Raises:
        InvalidError: ``enrolment.response_malformed``.
        NotFoundError: ``enrolment.no_request``; this board has not asked.
        ConflictError: ``enrolment.already_enrolled``.
        RefusedError: ``enrolment.wrong_root``, ``enrolment.wrong_server_ca``, ``enrolment.wrong_certificate``.
    """
    response, mark = read_response(data), sha256_hex(data)
    if enrolled_by(state_dir, mark):
        return Identity.load(state_dir)
    if _kept(state_dir) is None:
        raise NotFoundError(
            "enrolment.no_request",
            "this board has made no offline request, or another folder holds it",
            hint="begin with: garrison-agent enroll --offline --out request.json",
        )
    root = response.root.encode()
    if sha256_hex(root) != root_sha256:
        raise wrong("enrolment.wrong_root", f"the response's root is {sha256_hex(root)}, not {root_sha256}")
    folders = Folders(state_dir)
    _check_server_ca(response.server_ca_pem)
    _, tls_key_pem = create_keys(state_dir)
    write_atomic(folders.root, root)
    write_atomic(folders.server_ca, response.server_ca_pem.encode())
    write_atomic(folders.anchor, response.anchor.encode())
    record = DeviceRecord(
        device=response.device,
        url=response.url,
        mqtt_host=response.mqtt_host,
        mqtt_port=response.mqtt_port,
        token_sha256=mark,
    )
    store(state_dir, record, response.certificate_pem, tls_key_pem)
    return Identity.load(state_dir)


def _kept(state_dir: Path) -> OfflineRequest | None:
    """Return the request that was made before; an unreadable one counts as none."""
    try:
        return OfflineRequest.model_validate_json(Folders(state_dir).offline_request.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _check_server_ca(pem: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise wrong("enrolment.wrong_server_ca", f"the response's server CA is no certificate: {error}") from error
