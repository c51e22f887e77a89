"""Renewal of the TLS certificate by stick: the key waits here until a bundle brings the certificate for it.

Between request and answer lie weeks, and the stick may be lost on either way, so the same key asks again and again
until it is answered. Source: docs/protocol.md, "Bundles".
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from garrison_agent.adapters import certificate_process
from garrison_agent.identity import Identity, save_pair
from garrison_agent.registry.files import disk_errors, sync_folder, write_atomic
from garrison_protocol.errors import RefusedError
from garrison_protocol.keys import refuse_if_readable_by_others
from garrison_protocol.messages.enrolment import RenewRequest, RenewResponse, renewal_bytes

_KEY = "carried.key"
_REQUEST = "carried.csr"


class CarriedRenewal:
    """Makes requests and takes answers; each may start a process (``certificate_process``). One thread at a time."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def request(self, number: int) -> RenewRequest:
        """Return a request with the number ``number`` (above every earlier one) for the key that waits, or a new one.

        Raises:
            RefusedError: ``key.readable_by_others``.
            UnavailableError: ``disk.failed``, ``certificate.process_failed``.
            InsufficientError: ``disk.full``.
        """
        with disk_errors(self._path(_KEY)):
            csr_pem = self._csr()
        device, nonce = self._identity.device, f"stick:{number}"
        proof = self._identity.signing_key.sign(renewal_bytes(device, nonce, csr_pem)).hex()
        return RenewRequest(device=device, nonce=nonce, csr_pem=csr_pem, proof=proof)

    def answered(self, answer: RenewResponse, device_ca: str, at: datetime) -> bool:
        """Store the certificate for the key that waits; False if none does, it has ended at ``at``, or ours ends later.

        Nobody signed the answer as a whole. So only the certificate is taken from it, and only one by an authority in
        ``device_ca``, PEM of the verified ``fleet.json``; where the broker is, a stick does not say.

        Raises:
            RefusedError: ``renewal.wrong_certificate``; the key goes on waiting.
            GarrisonError: ``disk.full``, ``disk.failed``.
        """
        if not self._path(_KEY).exists():
            return False
        with disk_errors(self._path(_KEY)):
            key_pem = self._path(_KEY).read_bytes()
        try:
            pair = certificate_process.checked_pair(answer.certificate_pem, key_pem, self._identity.device, device_ca)
        except ValueError as error:
            raise RefusedError(
                "renewal.wrong_certificate",
                f"the certificate on the stick cannot be used: {error}",
                hint="take the board's newest export home and export again; the old certificate stays",
            ) from error
        span = certificate_process.read_certificate(pair)[1]
        wanted = not span.ended(at.timestamp()) and not self._have_later(span.end_s, device_ca)
        if wanted:
            save_pair(self._identity.state_dir, pair)
        with disk_errors(self._path(_KEY)):  # without a use for it, none for its key: the next request makes another
            for name in (_REQUEST, _KEY):
                self._path(name).unlink(missing_ok=True)
            sync_folder(self._identity.folders.identity)
        return wanted

    def _have_later(self, end_s: float, device_ca: str) -> bool:
        """Tell whether the board's own certificate, by one of ``device_ca``, ends after ``end_s``."""
        try:
            pair = self._identity.folders.tls_pair.read_bytes()
            if certificate_process.read_certificate(pair)[1].end_s <= end_s:
                return False
            certificate_process.read_certificate(pair, device_ca)
        except (OSError, ValueError):
            return False
        return True

    def _csr(self) -> str:
        """Return the request for the key that waits; signatures differ, so the text is kept with the key."""
        key, request = self._path(_KEY), self._path(_REQUEST)
        if not (request.exists() and key.exists()):
            key.unlink(missing_ok=True)
            request.unlink(missing_ok=True)
            key_pem, csr_pem = certificate_process.new_request()
            write_atomic(key, key_pem, mode=0o600)
            write_atomic(request, csr_pem.encode(), mode=0o600)  # half of one would be sent for ever
        refuse_if_readable_by_others(key)
        return request.read_text()

    def _path(self, name: str) -> Path:
        return self._identity.folders.identity / name
