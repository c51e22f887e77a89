"""Enrolment: from the operator's one line to an identity that the fleet accepts (docs/protocol.md, "Enrolment").

The line pins what the board trusts: the server CA and the first TUF root, both by SHA-256. Private keys are made here
and never leave. Each file is durable before the next step, and ``device.json`` comes last, so a try that was cut off
anywhere is repeated with the same line and the same keys.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from garrison_agent.adapters.device_http import call, parsed, read_whole, refusal, request
from garrison_agent.identity import (
    DeviceRecord,
    Folders,
    Identity,
    create_keys,
    load_record,
    save_pair,
    save_record,
    tidy,
)
from garrison_agent.registry.files import write_atomic
from garrison_agent.tls import JudgeAt, pinned_context, unpinned_context
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, RefusedError, UnavailableError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.enrolment import (
    EnrolmentString,
    EnrolPending,
    EnrolRequest,
    EnrolResponse,
    key_fingerprint,
    parse_enrolment,
    proof_bytes,
)

ENROL = "/device/v1/enroll"


@dataclass(frozen=True, slots=True)
class Waiting:
    """An operator has not approved this board yet; ``error`` is why the controller could not be asked this time."""

    url: str
    fingerprint: str
    name: str
    error: UnavailableError | None = None


Wait = Callable[[Waiting], None]
"""Called after each try of a board without a token: returns when to try again, raises to give up."""


def give_up(waiting: Waiting) -> None:
    """Do not wait.

    Raises:
        UnavailableError: ``enrolment.pending``.
    """
    raise UnavailableError(
        "enrolment.pending",
        f"an operator has to approve this board; its fingerprint is {waiting.fingerprint}",
        hint=f"on a computer that is logged in: garrison device enroll approve {waiting.fingerprint}; then run the "
        "same command here again (keys and fingerprint stay the same)",
        retryable=True,
        fingerprint=waiting.fingerprint,
        url=waiting.url,
    )


def enrol(state_dir: Path, text: str, *, judge_at: JudgeAt, name: str = "", wait: Wait = give_up) -> Identity:
    """Return the board's new identity, stored below ``state_dir``; ``text`` is the enrolment string.

    ``name`` is what the board would like to be called. Repeating it with the string that enrolled this board changes
    nothing.

    Raises:
        InvalidError: ``enrolment.malformed``.
        ConflictError: ``enrolment.already_enrolled`` with another string.
        RefusedError: ``enrolment.wrong_server_ca``, ``enrolment.wrong_root``, ``enrolment.wrong_certificate``.
        UnavailableError: ``controller.unreachable``; what ``wait`` raises.
        GarrisonError: What the controller says is wrong with the token, by its own code.
    """
    line = parse_enrolment(text)
    mark = sha256_hex((line.token or line.encode()).encode())
    if enrolled_by(state_dir, mark):
        return Identity.load(state_dir)
    folders = Folders(state_dir)
    server_ca = _fetch(line.url, unpinned_context(), "/device/v1/server-ca.pem")
    if sha256_hex(server_ca) != line.server_ca_sha256:
        raise wrong("enrolment.wrong_server_ca", f"the server CA at {line.url} is not the one in the string")
    write_atomic(folders.server_ca, server_ca)
    trusted = pinned_context(folders.server_ca, judge_at)
    root = _fetch(line.url, trusted, "/device/v1/metadata/1.root.json")
    if sha256_hex(root) != line.root_sha256:
        raise wrong("enrolment.wrong_root", f"the TUF root at {line.url} is not the one in the string")
    write_atomic(folders.root, root)

    signing_key, tls_key_pem = create_keys(state_dir)
    answer = _admission(line, trusted, _request(line.token, name, signing_key, tls_key_pem), wait)
    store(
        state_dir,
        DeviceRecord(
            device=answer.device,
            url=line.url,
            mqtt_host=answer.mqtt_host,
            mqtt_port=answer.mqtt_port,
            token_sha256=mark,
        ),
        answer.certificate_pem,
        tls_key_pem,
    )
    return Identity.load(state_dir)


def enrolled_by(state_dir: Path, mark: str) -> bool:
    """Tell whether just this enrolment made this board's identity; False: it has none.

    Raises:
        ConflictError: ``enrolment.already_enrolled`` by another one.
        GarrisonError: ``identity.damaged``.
    """
    record = load_record(state_dir)
    if record is None:
        return False
    if record.token_sha256 == mark:
        return True
    raise ConflictError(
        "enrolment.already_enrolled",
        f"this board is enrolled already, as {record.device} at {record.url}",
        hint=f"to give it another identity, stop the agent and move {state_dir} away first",
    )


def store(state_dir: Path, record: DeviceRecord, certificate_pem: str, tls_key_pem: bytes) -> None:
    """Check the certificate and make this board's identity durable; the record comes last.

    Raises:
        RefusedError: ``enrolment.wrong_certificate``.
    """
    from garrison_agent.adapters.certificates import checked_pair

    try:
        pair = checked_pair(certificate_pem, tls_key_pem, record.device)
    except ValueError as error:
        raise wrong("enrolment.wrong_certificate", f"the controller's certificate cannot be used: {error}") from error
    save_pair(state_dir, pair)
    save_record(state_dir, record)
    tidy(state_dir)


def wrong(code: str, message: str) -> RefusedError:
    """Return what a board says that does not trust who answers."""
    return RefusedError(
        code,
        message,
        hint="do not go on: check the address, make a new string with `garrison device token create`, and find out "
        "who answered",
    )


def _request(token: str, name: str, signing_key: SigningKey, tls_key_pem: bytes) -> EnrolRequest:
    from garrison_agent.adapters.certificates import request_pem

    csr_pem = request_pem(tls_key_pem)
    return EnrolRequest(
        token=token,
        name=name,
        csr_pem=csr_pem,
        identity=signing_key.public_hex,
        proof=signing_key.sign(proof_bytes(token, csr_pem)).hex(),
    )


def _admission(line: EnrolmentString, trusted: ssl.SSLContext, asked: EnrolRequest, wait: Wait) -> EnrolResponse:
    """Ask until the controller admits the board; only one without a token may have to wait."""
    where, fingerprint, asked_before = line.url + ENROL, key_fingerprint(asked.identity), False
    while True:
        try:
            status, text = call(line.url, trusted, ENROL, asked)
        except UnavailableError as error:
            if not asked_before:
                raise
            wait(Waiting(line.url, fingerprint, asked.name, error))
            continue
        if status != 202 or line.token:
            return parsed(EnrolResponse, text, where)
        pending = parsed(EnrolPending, text, where)
        asked_before = True
        wait(Waiting(line.url, fingerprint, pending.name or asked.name))


def _fetch(url: str, context: ssl.SSLContext, path: str) -> bytes:
    with request(url, context, "GET", path) as response:
        data = read_whole(response, url)
        if response.status != 200:
            raise refusal(response.status, data, path)
        return data
