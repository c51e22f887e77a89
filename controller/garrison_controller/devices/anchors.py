"""Anchors: what the controller says now to one board's nonce (docs/protocol.md, "Anchor").

Runs inside the caller's transaction and only reads.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.audit.tables import StreamState
from garrison_controller.devices.service import enrolled_device
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts.tables import DesiredState
from garrison_protocol import envelope
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.anchor import ANCHOR_KIND, Anchor, Committed
from garrison_protocol.messages.base import encode
from garrison_protocol.states import Stream

_EVER = datetime.min.replace(tzinfo=UTC)


def anchor(session: Session, device_id: str, nonce: str, director: SigningKey, now: datetime) -> bytes:
    """Return the signed anchor (an envelope) of an admitted board for ``nonce``, 32 hex digits.

    It tells only of streams that the board's present identity opened: a replacement has lost nothing of the earlier.

    Raises:
        RefusedError: ``device.unknown`` or ``device.revoked``.
    """
    device = enrolled_device(session, device_id)
    desired = session.get(DesiredState, device_id)
    newest = {
        stream: Committed(epoch=state.epoch, seq=state.up_to, hash=state.hash)
        for stream, state in newest_streams(session, device, with_rows=True).items()
    }
    message = Anchor(
        device=device_id,
        sent_at=int(now.timestamp() * 1000),
        nonce=nonce,
        time=int(now.timestamp()),
        desired_counter=desired.counter if desired is not None else 0,
        streams=newest,
    )
    return envelope.seal(ANCHOR_KIND, encode(message), director)


def newest_streams(session: Session, device: Device, *, with_rows: bool = False) -> dict[str, StreamState]:
    """Return where each stream stands in the newest epoch that the board's present identity opened, by its name.

    ``with_rows`` passes over epochs that a status has named, but of which no row has come. However many epochs a board
    has opened, few are read: anybody may ask for its anchor.
    """
    found = {}
    for stream in Stream:
        state = session.scalar(
            select(StreamState)
            .where(
                StreamState.device_id == device.id,
                StreamState.stream == stream.value,
                StreamState.opened_at >= (device.identity_since or _EVER),
                StreamState.up_to >= int(with_rows),
            )
            .order_by(StreamState.opened_at.desc(), StreamState.received_at.desc())
            .limit(1)
        )
        if state is not None:
            found[stream.value] = state
    return found
