"""A message's way into the database: topic, signature, content, one transaction (docs/protocol.md, "Receiving").

Free of MQTT. Every message is answered by committing or refusing it; both may be acknowledged to the broker. What
must be published is returned, for after the commit: a controller killed in between loses nothing, since the board
sends again and gets the same answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from garrison_controller.audit import streams
from garrison_controller.bus import refusals, reports, status
from garrison_controller.db.base import Database
from garrison_controller.devices.tables import ENROLLED, Device
from garrison_protocol import envelope, keys, topics
from garrison_protocol.errors import GarrisonError, InvalidError, RefusedError
from garrison_protocol.messages.base import encode, parse_message
from garrison_protocol.messages.fetch import FETCH_KIND
from garrison_protocol.messages.report import REPORT_KIND, STATUS_KIND, Report, Status
from garrison_protocol.messages.streams import AUDIT_KIND, RECEIPT_KIND, TELEMETRY_KIND, Batch, Receipt
from garrison_protocol.states import Stream
from garrison_protocol.topics import Down, Topic, Up

_LOG = logging.getLogger(__name__)
_KINDS = {
    Up.STATUS: STATUS_KIND,
    Up.REPORT: REPORT_KIND,
    Up.AUDIT: AUDIT_KIND,
    Up.TELEMETRY: TELEMETRY_KIND,
    Up.FETCH: FETCH_KIND,
}
_STREAMS = {Up.AUDIT: Stream.AUDIT, Up.TELEMETRY: Stream.TELEMETRY}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What to do once the message is committed: publish these, and look for desired state to publish."""

    messages: tuple[tuple[str, bytes], ...] = ()
    desired_changed: bool = False
    refused: GarrisonError | None = None
    """Why the message was refused, for whoever brought it; a board is not told."""


class Ingest:
    """Commits boards' messages. Used by one thread at a time; ``now`` returns aware UTC."""

    def __init__(
        self,
        database: Database,
        *,
        director: keys.SigningKey,
        receipt_key: keys.SigningKey,
        now: Callable[[], datetime],
        carried: bool = False,
    ) -> None:
        """``carried``: messages come by stick, and say nothing about whether the board is there now."""
        self._database = database
        self._director = director
        self._receipt_key = receipt_key
        self._now = now
        self._carried = carried

    def handle(self, topic: str, payload: bytes) -> Outgoing:
        """Commit one message, or refuse and count it; return what follows.

        Raises:
            UnavailableError: ``database.busy``; nothing was committed, and the message must be handled again.
            OperationalError: The database cannot be reached; likewise.
        """
        sender = ""
        try:
            place = topics.parse(topic)
            if not isinstance(place.kind, Up):
                raise InvalidError("topic.unknown", f"no board sends on {topic!r}")
            with self._database.session() as session:
                device = session.get(Device, place.device)
                if device is None:
                    raise RefusedError("device.unknown", f"no board {place.device} is enrolled", device=place.device)
                sender = device.id
                presence = device.online, device.last_seen_at
                outgoing = self._commit(session, device, place, payload)
                if self._carried:
                    device.online, device.last_seen_at = presence
                return outgoing
        except GarrisonError as error:
            if error.retryable:
                raise
            self._refuse(sender, error.code, error.message)
            return Outgoing(refused=error)
        except OperationalError:
            raise
        except Exception as error:  # noqa: BLE001 -- one board's message must neither stop the others' nor come back
            # for ever. Nothing is lost by going on: rows without a receipt stay on the board, the rest comes again.
            _LOG.exception("a message on %s could not be handled", topic)
            failed = GarrisonError("message.handler_failed", f"{type(error).__name__} on {topic}")
            self._refuse(sender, failed.code, failed.message)
            return Outgoing(refused=failed)

    def _commit(self, session: Session, device: Device, place: Topic, payload: bytes) -> Outgoing:
        if device.state != ENROLLED:
            raise RefusedError("device.revoked", f"board {device.id} is revoked", device=device.id)
        identity = device.identity_public
        opened = envelope.unseal(payload, lambda signer: identity if signer == keys.key_id(identity) else None)
        assert isinstance(place.kind, Up)
        if opened.kind != _KINDS[place.kind]:
            raise RefusedError(
                "message.misplaced", f"a {opened.kind[:40]} message on the topic of {place.kind}", device=device.id
            )
        now = self._now()
        match place.kind:
            case Up.STATUS:
                message = parse_message(Status, opened.body, device=device.id)
                return Outgoing(desired_changed=status.record(session, device, message, now))
            case Up.REPORT:
                report = parse_message(Report, opened.body, device=device.id)
                return Outgoing(desired_changed=reports.record(session, device, report, self._director, now))
            case Up.AUDIT | Up.TELEMETRY:
                batch = parse_message(Batch, opened.body, device=device.id)
                if batch.stream is not _STREAMS[place.kind]:
                    raise RefusedError("message.misplaced", f"{batch.stream} rows on the topic of {place.kind}")
                device.last_seen_at = now
                receipt = self._seal(streams.append(session, batch, now), now)
                return Outgoing(((topics.down(device.id, Down.RECEIPT), receipt),))
            case Up.FETCH:
                raise InvalidError("topic.unexpected", "this controller answers no fetches", device=device.id)

    def _seal(self, receipt: Receipt, now: datetime) -> bytes:
        stamped = receipt.model_copy(update={"sent_at": int(now.timestamp() * 1000)})
        return envelope.seal(RECEIPT_KIND, encode(stamped), self._receipt_key)

    def _refuse(self, sender: str, code: str, message: str) -> None:
        with self._database.session() as session:
            refusals.count(session, sender, code, message, self._now())
