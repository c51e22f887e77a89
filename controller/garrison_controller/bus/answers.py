"""What boards may fetch over the broker: the same as over ``/device/v1``, by the same services."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import anchors, refusals, service
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.sessions import Sessions
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.store import RegistryStore
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError, RefusedError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.anchor import NONCE_PATTERN
from garrison_protocol.messages.enrolment import NonceResponse, RenewRequest, RenewResponse
from garrison_protocol.messages.fetch import Fetch, FetchKind


class BoardAnswers:
    """See ``fetch.Answers``. Thread-safe; ``now`` returns aware UTC."""

    def __init__(
        self,
        config: ControllerConfig,
        database: Database,
        *,
        store: RegistryStore,
        blobs: BlobFolder,
        sessions: Sessions,
        device_ca: Authority,
        director: SigningKey,
        now: Callable[[], datetime],
    ) -> None:
        self._config, self._database = config, database
        self._store, self._blobs = store, blobs
        self._sessions, self._device_ca, self._director = sessions, device_ca, director
        self._now = now

    def file(self, fetch: Fetch) -> Path:
        """Return the file of metadata, a target, or a blob.

        Raises:
            NotFoundError: ``registry.metadata_not_found``, ``registry.target_not_found``, ``blob.not_found``.
        """
        if fetch.kind is FetchKind.METADATA:
            return self._store.metadata_path(fetch.name)
        assert fetch.sha256 is not None
        if fetch.kind is FetchKind.TARGET:
            return self._store.target_path(fetch.sha256, fetch.name)
        if self._blobs.size(fetch.sha256) is None:
            raise NotFoundError(
                "blob.not_found", f"no blob {fetch.sha256} is here", hint="it may belong to no published model"
            )
        return self._blobs.path(fetch.sha256)

    def document(self, fetch: Fetch) -> bytes:
        """Return an anchor, a nonce, or a certificate.

        Raises:
            InvalidError: ``fetch.malformed``.
            GarrisonError: as ``anchors.anchor`` and ``service.renew``; ``message.misaddressed``.
        """
        match fetch.kind:
            case FetchKind.ANCHOR:
                return self._anchor(fetch)
            case FetchKind.NONCE:
                now = self._now()
                return NonceResponse(nonce=self._sessions.nonce(), time=int(now.timestamp())).model_dump_json().encode()
            case FetchKind.CERTIFICATE:
                return self._certificate(fetch)
            case _:
                raise InvalidError("fetch.malformed", f"{fetch.kind.value} is a file")

    def _anchor(self, fetch: Fetch) -> bytes:
        if re.fullmatch(NONCE_PATTERN, fetch.name) is None:
            raise InvalidError("fetch.malformed", "an anchor is asked for by a nonce of 32 hex digits")
        with self._database.reading() as session:
            return anchors.anchor(session, fetch.device, fetch.name, self._director, self._now())

    def _certificate(self, fetch: Fetch) -> bytes:
        try:
            request = RenewRequest.model_validate_json(fetch.body)
        except ValidationError as error:
            raise InvalidError("fetch.malformed", "the body is no request for a certificate") from error
        if request.device != fetch.device:
            raise RefusedError("message.misaddressed", f"{fetch.device} asks for the certificate of {request.device}")
        devices, now = self._config.devices, self._now()
        try:
            with self._database.session() as session:
                renewed = service.renew(
                    session,
                    request,
                    self._sessions,
                    self._device_ca,
                    days=devices.certificate_days,
                    grace_days=devices.grace_days,
                    now=now,
                )
        except GarrisonError as error:
            if not error.retryable:
                with self._database.session() as session:
                    refusals.record(session, "device.renew", error, now)
            raise
        host, port = self._config.board_mqtt
        answer = RenewResponse(certificate_pem=renewed.certificate_pem, mqtt_host=host, mqtt_port=port)
        return answer.model_dump_json().encode()
