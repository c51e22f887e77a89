"""What this board sends home on a stick: the very messages that it would publish, and what it asks the next one for.

Sending changes nothing: rows stay until a receipt covers them, and go again by any way.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from garrison_agent.adapters.database import Database
from garrison_agent.api.commands import ExportFile, ExportPage
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.anchor import Anchors
from garrison_agent.owner.certificate import Certificate
from garrison_agent.owner.uplink import Uplink
from garrison_protocol import bundle
from garrison_protocol.bundle import HomeRequest, Kind
from garrison_protocol.errors import GarrisonError, InvalidError
from garrison_protocol.messages.enrolment import RenewRequest, RenewResponse
from garrison_protocol.states import Stream

_log = logging.getLogger(__name__)

_NUMBER = "renewal.number"
_STREAMS = (Stream.AUDIT, Stream.TELEMETRY)


class Renewals(Protocol):
    """Makes requests for a certificate and takes answers; ``adapters.carried_renewal.CarriedRenewal`` is one."""

    def request(self, number: int) -> RenewRequest:
        """Return a request with this number. Raises GarrisonError."""
        ...

    def answered(self, answer: RenewResponse, device_ca: str, at: datetime) -> bool:
        """Store the certificate; False if it was not wanted. Raises GarrisonError."""
        ...


class BundleExport:
    """Hands out files page by page. Owner thread only."""

    def __init__(
        self,
        *,
        device: str,
        database: Database,
        journal: Journal,
        uplink: Uplink,
        anchors: Anchors,
        certificate: Certificate,
        renewals: Renewals,
        judge_at: Callable[[], datetime],
    ) -> None:
        self._device = device
        self._database = database
        self._journal = journal
        self._uplink = uplink
        self._anchors = anchors
        self._certificate = certificate
        self._renewals = renewals
        self._judge_at = judge_at

    def page(self, cursor: str) -> ExportPage:
        """Return the files at ``cursor``, and where to go on; an empty cursor begins.

        Raises:
            InvalidError: ``bundle.cursor_malformed``.
            InsufficientError: ``disk.full``.
        """
        if not cursor:
            return self._first()
        stream, after = _parse(cursor)
        found = self._uplink.sealed_batch(stream, after)
        if found is not None:
            batch, sealed = found
            path = bundle.batch_path(self._device, stream, batch.epoch, batch.first)
            following = f"{stream.value}:{batch.first + len(batch.rows) - 1}"
            return ExportPage(device=self._device, files=[_file(path, sealed)], next=following)
        following_stream = _STREAMS.index(stream) + 1
        if following_stream < len(_STREAMS):
            return ExportPage(device=self._device, files=[], next=self._begin(_STREAMS[following_stream]))
        return ExportPage(device=self._device, files=[], next=None)

    def _first(self) -> ExportPage:
        renew, refused = None, None
        if self._certificate.due:
            try:
                renew = self._renewal()
            except GarrisonError as error:  # the record goes home without it
                refused = error.code
                _log.error("no request for a certificate: %s. %s", error, error.hint)
        request = HomeRequest(nonce=self._anchors.carried_nonce(), renew=renew)
        heads = {name: head.seq - head.acked for name, head in self._journal.heads().items()}
        facts: dict[str, str | int | bool | None] = {"nonce": request.nonce, "renew": renew is not None, **heads}
        if refused is not None:
            facts["renew_error"] = refused
        self._journal.append(Stream.AUDIT, "bundle.exported", facts)
        status, report = self._uplink.sealed_state()
        files = [
            _file(bundle.home_path(self._device, Kind.STATUS), status),
            _file(bundle.home_path(self._device, Kind.REQUEST), request.model_dump_json(exclude_none=True).encode()),
        ]
        if report:
            files.append(_file(bundle.home_path(self._device, Kind.REPORT), report))
        return ExportPage(device=self._device, files=files, next=self._begin(_STREAMS[0]))

    def _renewal(self) -> RenewRequest:
        number = max(int(self._database.get(_NUMBER) or 0) + 1, int(self._judge_at().timestamp()))
        self._database.put(_NUMBER, str(number))
        return self._renewals.request(number)

    def _begin(self, stream: Stream) -> str:
        return f"{stream.value}:{self._journal.heads()[stream.value].acked}"


def _file(path: str, data: bytes) -> ExportFile:
    return ExportFile(path=path, data=base64.b64encode(data).decode())


def _parse(cursor: str) -> tuple[Stream, int]:
    stream, _, after = cursor.partition(":")
    if stream not in set(Stream) or not after.isdecimal() or len(after) > 16:
        raise InvalidError("bundle.cursor_malformed", f"{cursor[:64]!r} is no place in an export")
    return Stream(stream), int(after)
