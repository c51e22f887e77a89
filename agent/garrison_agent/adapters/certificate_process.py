"""``adapters.certificates`` in a short-lived process, for the agent that runs for months.

``cryptography.x509`` costs more than 3 MB, which a process that has once loaded it keeps. Commands, which end soon
anyway, call ``adapters.certificates`` directly. Keys pass through a pipe. Run as
``python -m garrison_agent.adapters.certificate_process``.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
from typing import Any

from garrison_agent.core.certificate import Validity
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import UnavailableError

TIMEOUT_S = 15.0
"""The owner thread waits for up to three of these: it must be heard of before its watchdog's minute is over."""
_NOTE = re.compile(rb"certificate ([0-9a-f]{64}) from (\d{1,11}) to (\d{1,11})\n")
"""The line that ``certificates.checked_pair`` puts before the PEM text (explanatory text, RFC 7468, section 2)."""


def new_request() -> tuple[bytes, str]:
    """Return a new P-256 key (PKCS#8 PEM) and a CSR for it.

    Raises:
        UnavailableError: ``certificate.process_failed``.
    """
    key_pem, csr_pem = _ask("new_request")
    return str(key_pem).encode(), str(csr_pem)


def checked_pair(certificate_pem: str, key_pem: bytes, device: str, cas_pem: str | None) -> bytes:
    """As ``certificates.checked_pair``; issued by one of ``cas_pem``, unless that is None.

    Raises:
        ValueError: As there, and as ``certificates.check_issuer``.
        UnavailableError: ``certificate.process_failed``.
    """
    return str(_ask("checked_pair", certificate_pem, key_pem.decode(), device, cas_pem)[0]).encode()


def read_certificate(pair_pem: bytes, cas_pem: str | None = None) -> tuple[str, Validity]:
    """As ``certificates.read_certificate``; issued by one of ``cas_pem``, unless that is None.

    Without ``cas_pem``, what this board noted when it checked the certificate is enough.

    Raises:
        ValueError: As there, and as ``certificates.check_issuer``.
        UnavailableError: ``certificate.process_failed``.
    """
    if cas_pem is None and (note := _NOTE.match(pair_pem)) and note[1].decode() == _first_sha256(pair_pem):
        return note[1].decode(), Validity(float(note[2]), float(note[3]))
    sha256, start_s, end_s = _ask("read_certificate", pair_pem.decode(errors="replace"), cas_pem)
    return str(sha256), Validity(float(str(start_s)), float(str(end_s)))


def _first_sha256(pair_pem: bytes) -> str:
    """Return the SHA-256 of the first certificate in ``pair_pem``: a note may head another than the one it is of."""
    end = b"-----END CERTIFICATE-----"
    block = b"-----BEGIN" + pair_pem.partition(b"-----BEGIN")[2].partition(end)[0] + end
    return sha256_hex(ssl.PEM_cert_to_DER_cert(block.decode(errors="replace")))


def _ask(operation: str, *arguments: str | None) -> list[object]:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "garrison_agent.adapters.certificate_process"],
            input=json.dumps([operation, *arguments]).encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UnavailableError(
            "certificate.process_failed",
            f"the process that reads certificates failed: {error}",
            hint="check free memory and the agent's installation (`garrison-agent doctor`)",
            retryable=True,
        ) from error
    if "refused" in answer:
        raise ValueError(answer["refused"])
    result: list[object] = answer["result"]
    return result


def main() -> int:
    """Answer one request from stdin; a refusal is an answer."""
    operation, *arguments = json.load(sys.stdin)
    try:
        json.dump({"result": _answer(operation, *arguments)}, sys.stdout)
    except ValueError as error:
        json.dump({"refused": str(error)}, sys.stdout)
    return 0


def _answer(operation: str, *arguments: Any) -> list[object]:
    from garrison_agent.adapters import certificates

    match operation, arguments:
        case "new_request", ():
            key_pem = certificates.new_key()
            return [key_pem.decode(), certificates.request_pem(key_pem)]
        case "checked_pair", (certificate_pem, key_pem_text, device, cas_pem):
            pair = certificates.checked_pair(certificate_pem, key_pem_text.encode(), device)
            if cas_pem is not None:
                certificates.check_issuer(pair, cas_pem)
            return [pair.decode()]
        case "read_certificate", (pair_pem, cas_pem):
            if cas_pem is not None:
                certificates.check_issuer(pair_pem.encode(), cas_pem)
            sha256, span = certificates.read_certificate(pair_pem.encode())
            return [sha256, span.start_s, span.end_s]
    raise AssertionError(operation)


if __name__ == "__main__":
    sys.exit(main())
