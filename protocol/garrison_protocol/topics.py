"""Topics: built and parsed here and nowhere else (docs/protocol.md, "Topics")."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import is_device_id

ROOT = "garrison/v1"
REGISTRY_TIMESTAMP = f"{ROOT}/registry/timestamp"
ALL_UP_STATUS = f"{ROOT}/up/+/status"
MAX_TOPIC_LENGTH = 256


class Up(StrEnum):
    """What a board sends."""

    STATUS = "status"
    REPORT = "report"
    TELEMETRY = "telemetry"
    AUDIT = "audit"
    FETCH = "fetch"


class Down(StrEnum):
    """What a board receives."""

    DESIRED = "desired"
    RECEIPT = "receipt"
    CHUNK = "chunk"


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic of one board."""

    device: str
    kind: Up | Down


def up(device: str, kind: Up) -> str:
    """Return the topic on which ``device`` publishes ``kind``."""
    return f"{ROOT}/up/{device}/{kind.value}"


def down(device: str, kind: Down) -> str:
    """Return the topic on which ``device`` receives ``kind``."""
    return f"{ROOT}/down/{device}/{kind.value}"


def all_up(kind: Up) -> str:
    """Return the subscription for ``kind`` from every board."""
    return f"{ROOT}/up/+/{kind.value}"


def parse(topic: str) -> Topic:
    """Return the board and kind that ``topic`` names.

    Raises:
        InvalidError: ``topic.unknown`` for anything that ``up`` and ``down`` do not build.
    """
    if len(topic) <= MAX_TOPIC_LENGTH:
        match topic.split("/"):
            case ["garrison", "v1", "up", device, kind] if is_device_id(device) and kind in set(Up):
                return Topic(device, Up(kind))
            case ["garrison", "v1", "down", device, kind] if is_device_id(device) and kind in set(Down):
                return Topic(device, Down(kind))
    raise InvalidError("topic.unknown", f"no such topic: {topic[:MAX_TOPIC_LENGTH]!r}")
