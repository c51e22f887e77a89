"""What boards sent home on a stick: the very messages of MQTT, through the very same code, and what came of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.audit.tables import ReportState, StreamState
from garrison_controller.bus.ingest import Ingest, Outgoing
from garrison_controller.db.base import Database
from garrison_controller.devices.tables import Device
from garrison_protocol import envelope, topics
from garrison_protocol.errors import GarrisonError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.topics import Up


class Outcome(StrEnum):
    """What a message brought."""

    NEW = "new"
    REPEATED = "repeated"
    GAP = "gap"
    """Rows before it never arrived; they are asked for with the next receipt."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of one message, and whether desired state has to be published again."""

    outcome: Outcome
    error: GarrisonError | None = None
    desired_changed: bool = False


class Home:
    """Takes carried messages in. One thread at a time for each board."""

    def __init__(self, database: Database, *, director: SigningKey, receipt: SigningKey, now: datetime) -> None:
        self._database = database
        self._ingest = Ingest(database, director=director, receipt_key=receipt, now=lambda: now, carried=True)
        self._receipt = receipt

    def take(self, device_id: str, kind: Up, payload: bytes) -> Taken:
        """Commit one message of a board, or refuse and count it.

        A stick says nothing about presence: whether the board is online, and when it was seen, stay as they were.

        Raises:
            UnavailableError: ``database.busy``.
        """
        with self._database.reading() as session:
            before = _marks(session, device_id)
        outgoing = self._ingest.handle(topics.up(device_id, kind), payload)
        if outgoing.refused is not None:
            return Taken(Outcome.REFUSED, outgoing.refused)
        with self._database.reading() as session:
            after = _marks(session, device_id)
        outcome = Outcome.NEW if before != after else Outcome.GAP if self._asks_again(outgoing) else Outcome.REPEATED
        return Taken(outcome, desired_changed=outgoing.desired_changed)

    def _asks_again(self, outgoing: Outgoing) -> bool:
        public = self._receipt.public_hex
        opened = (envelope.unseal(sealed, lambda _signer: public) for _, sealed in outgoing.messages)
        return any(Receipt.model_validate_json(one.body).resend for one in opened)


def _marks(session: Session, device_id: str) -> tuple[object, ...]:
    """Return everything by which a message shows that it was news."""
    device, report = session.get(Device, device_id), session.get(ReportState, device_id)
    streams = session.execute(
        select(StreamState.stream, StreamState.epoch, StreamState.up_to)
        .where(StreamState.device_id == device_id)
        .order_by(StreamState.stream, StreamState.epoch)
    )
    return (
        None if device is None else (device.connection, device.status, device.agent_version),
        None if report is None else (report.epoch, report.revision),
        [tuple(row) for row in streams],
    )
