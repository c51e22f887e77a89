"""Renewal of a board's TLS certificate (docs/protocol.md, "Renewal").

A CSR for a new key, signed by the identity key over a nonce: it proves who asks whether or not the old certificate
still holds, and needs no client certificate. It goes over HTTPS (server-only TLS), and where that does not get
through, over the broker, as long as the old certificate opens that. The broker is trusted with nothing: it sees the
CSR and could answer it itself, so what comes over it must be issued by a device CA of ``fleet.json``, and its word on
where the broker is does not count.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

from garrison_agent.adapters import certificate_process
from garrison_agent.adapters.device_http import exchange, parsed
from garrison_agent.core.certificate import Validity
from garrison_agent.identity import Identity, load_record, save_pair, save_record
from garrison_protocol.errors import GarrisonError, RefusedError, UnavailableError
from garrison_protocol.messages.enrolment import NonceResponse, RenewRequest, RenewResponse, renewal_bytes
from garrison_protocol.messages.fetch import FetchKind


class Carrier(Protocol):
    """A way to the controller. Raises GarrisonError: UnavailableError where another way is worth a try."""

    @property
    def authentic(self) -> bool:
        """Whether what comes this way certainly comes from the controller."""
        ...

    def nonce(self) -> str:
        """Return a nonce to sign, good for one request soon."""
        ...

    def renew(self, request: RenewRequest) -> RenewResponse:
        """Return the controller's answer."""
        ...


class HttpCarrier:
    """Over HTTPS; ``context`` gives TLS settings for each request."""

    authentic = True

    def __init__(self, url: str, context: Callable[[], ssl.SSLContext]) -> None:
        self._url = url
        self._context = context

    def nonce(self) -> str:
        """See ``Carrier.nonce``."""
        return exchange(self._url, self._context(), "/device/v1/nonce", NonceResponse).nonce

    def renew(self, request: RenewRequest) -> RenewResponse:
        """See ``Carrier.renew``."""
        return exchange(self._url, self._context(), "/device/v1/certificate", RenewResponse, request)


class Ask(Protocol):
    """Asks the controller for small bytes over the broker; UnavailableError while there is no connection."""

    def __call__(self, kind: FetchKind, name: str, body: str) -> bytes:
        """Return the whole answer."""
        ...


class MqttCarrier:
    """Over the broker: fetches of the kinds ``nonce`` and ``certificate``."""

    authentic = False

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def nonce(self) -> str:
        """See ``Carrier.nonce``."""
        return parsed(NonceResponse, self._ask(FetchKind.NONCE, "", ""), "the controller, over the broker,").nonce

    def renew(self, request: RenewRequest) -> RenewResponse:
        """See ``Carrier.renew``."""
        text = self._ask(FetchKind.CERTIFICATE, "", request.model_dump_json())
        return parsed(RenewResponse, text, "the controller, over the broker,")


class Renewal:
    """Gets and stores certificates; every call blocks. One thread at a time calls ``renew``."""

    def __init__(self, identity: Identity, carriers: Sequence[Carrier], device_cas: Callable[[], str]) -> None:
        """``carriers`` are tried in order; ``device_cas`` are those of the verified ``fleet.json`` (PEM, or empty)."""
        self._identity = identity
        self._carriers = carriers
        self._device_cas = device_cas

    def renew(self) -> None:
        """Replace the stored certificate by a new one for a new key, and the broker's address by what it is now.

        Raises:
            UnavailableError: No way to the controller is open; the first one's error. ``renewal.unverifiable``.
            RefusedError: ``renewal.wrong_certificate``.
            GarrisonError: What the controller says is wrong, by its own code; ``disk.full``, ``disk.failed``.
        """
        failures: list[GarrisonError] = []
        for carrier in self._carriers:
            try:
                self._renew_over(carrier)
                return
            except GarrisonError as error:
                failures.append(error)
                if carrier.authentic and not isinstance(error, UnavailableError):
                    break
        raise next((error for error in failures if not isinstance(error, UnavailableError)), failures[0])

    def read(self, device_cas: str = "") -> tuple[str, Validity] | None:
        """Return the stored pair's SHA-256 and its span; None: there is none that can be used.

        Nor can one that is by none of ``device_cas`` (PEM; empty: any will do).

        Raises:
            UnavailableError: ``certificate.process_failed``.
        """
        pair = self._identity.folders.tls_pair
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(pair)  # also tells whether the key fits
            return certificate_process.read_certificate(pair.read_bytes(), device_cas or None)
        except (OSError, ValueError):
            return None

    def _renew_over(self, carrier: Carrier) -> None:
        if not (carrier.authentic or self._device_cas()):
            raise UnavailableError(
                "renewal.unverifiable",
                "a renewal over the broker needs the fleet's device CA, and no fleet.json has come yet",
                hint="let the board fetch the registry's metadata once; it tries again by itself",
                retryable=True,
            )
        device = self._identity.device
        key_pem, csr_pem = certificate_process.new_request()
        nonce = carrier.nonce()
        proof = self._identity.signing_key.sign(renewal_bytes(device, nonce, csr_pem)).hex()
        answer = carrier.renew(RenewRequest(device=device, nonce=nonce, csr_pem=csr_pem, proof=proof))
        try:
            cas = None if carrier.authentic else self._device_cas()
            pair = certificate_process.checked_pair(answer.certificate_pem, key_pem, device, cas)
        except ValueError as error:
            raise RefusedError(
                "renewal.wrong_certificate",
                f"the controller's answer to a renewal cannot be used: {error}",
                hint="find out who answers at the controller's address; the old certificate stays",
            ) from error
        record = load_record(self._identity.state_dir) if carrier.authentic else None
        if record is not None and (record.mqtt_host, record.mqtt_port) != (answer.mqtt_host, answer.mqtt_port):
            # Before the pair: if it ends in between, the renewal is still due and comes here again.
            moved = record.model_copy(update={"mqtt_host": answer.mqtt_host, "mqtt_port": answer.mqtt_port})
            save_record(self._identity.state_dir, moved)
        save_pair(self._identity.state_dir, pair)
