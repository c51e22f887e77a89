"""A board's status: presence, and whether it has the desired state that it should have.

Runs inside the caller's transaction.
"""

from __future__ import annotations

import json
from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.audit import streams
from garrison_controller.audit.alarms import raise_alarm
from garrison_controller.audit.tables import ReportState, StreamState
from garrison_controller.devices.tables import Device
from garrison_controller.rollouts import desired
from garrison_controller.rollouts.tables import DesiredState
from garrison_protocol.errors import InvalidError
from garrison_protocol.messages.report import Status
from garrison_protocol.states import Stream

MAX_CONNECTION = 2**31 - 1
MAX_COUNTER = 2**53
_EPOCH_LENGTH = 16


def record(session: Session, device: Device, status: Status, now: datetime) -> bool:
    """Record ``status`` and return whether the board's desired state has to be published again.

    A death counts only for the current connection; what an older connection says is ignored, unless it shows that the
    board's store, and with it its count of connections, began anew. What an earlier store said is ignored then.

    Raises:
        InvalidError: ``message.out_of_range``.
    """
    if status.connection > MAX_CONNECTION or status.desired_counter > MAX_COUNTER:
        raise InvalidError("message.out_of_range", f"a status of connection {status.connection}")
    if _is_of_earlier_store(session, device, status):
        return False
    anew = status.online and _opens_store(session, device, status, now)
    if status.connection < device.connection and not anew:
        return False
    device.connection, device.online = status.connection, status.online
    if not status.online:
        return False
    device.last_seen_at = now
    device.agent_version = status.agent_version.replace("\x00", "")[:64]
    device.status = json.loads(status.model_dump_json())
    _check_heads(session, device.id, status, now)
    return _compare_desired(session, device.id, status, now)


def _is_of_earlier_store(session: Session, device: Device, status: Status) -> bool:
    """Tell whether the status names an audit epoch that another has replaced: its connection numbers are of then."""
    head = status.heads.get(Stream.AUDIT)
    report = session.get(ReportState, device.id)
    if head is None or report is None or report.epoch in ("", head.epoch) or not _is_epoch(head.epoch):
        return False
    return session.get(StreamState, (device.id, Stream.AUDIT.value, head.epoch)) is not None


def _opens_store(session: Session, device: Device, status: Status, now: datetime) -> bool:
    """Tell whether the status names an audit epoch that was never heard of, while another one was; and note it."""
    head = status.heads.get(Stream.AUDIT)
    if head is None or not _is_epoch(head.epoch):
        return False
    if session.get(StreamState, (device.id, Stream.AUDIT.value, head.epoch)) is not None:
        return False
    streams.open_epoch(session, device.id, Stream.AUDIT, head.epoch, now)
    return True


def _check_heads(session: Session, device: str, status: Status, now: datetime) -> None:
    for stream in Stream:
        head = status.heads.get(stream.value)
        if head is None or not _is_epoch(head.epoch) or not 1 <= head.seq <= streams.MAX_SEQUENCE:
            continue
        if streams.contradicts(session, device, stream, head):
            raise_alarm(
                session,
                device,
                "stream.fork",
                subject=f"{stream.value}/{head.epoch}/{head.seq}",
                message=f"{device} signs another {stream.value} row {head.seq} of epoch {head.epoch} than it sent",
                now=now,
                detail={"stream": stream.value, "epoch": head.epoch, "seq": head.seq},
            )


def _compare_desired(session: Session, device: str, status: Status, now: datetime) -> bool:
    ours = session.get(DesiredState, device)
    counter, digest = (0, "") if ours is None else (ours.counter, ours.sha256)
    if status.desired_counter > counter:
        # The controller was restored from a backup, or someone else holds the director key. The board is left as it
        # is: the next change gets a counter above its own, and nothing rolls it back in silence.
        if ours is None or status.desired_counter > ours.counter_floor:
            raise_alarm(
                session,
                device,
                "desired.ahead",
                subject=str(status.desired_counter),
                message=f"{device} follows desired state {status.desired_counter}; the newest known here is {counter}",
                now=now,
                detail={"board": status.desired_counter, "controller": counter},
            )
            desired.raise_floor(session, device, status.desired_counter)
        return False
    if ours is None or counter == 0:
        return False
    if status.desired_counter == counter and status.desired_sha256 not in {None, digest}:
        raise_alarm(
            session,
            device,
            "desired.fork",
            subject=str(counter),
            message=f"{device} follows another desired state {counter} than the one signed here",
            now=now,
            detail={"counter": counter, "board_sha256": status.desired_sha256, "controller_sha256": digest},
        )
        return False
    if status.desired_counter < counter:
        ours.published_at = None
        return True
    return False


def _is_epoch(text: str) -> bool:
    return len(text) == _EPOCH_LENGTH and all(letter in "0123456789abcdef" for letter in text)
