"""What stands in the owner's queue. Everything that is not the owner thread only ever posts one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from garrison_agent.api.carrier import Carrier
from garrison_agent.api.commands import Command
from garrison_agent.core import slot
from garrison_agent.registry.trust import Refresh
from garrison_agent.runtimes.status import WorkerEvent
from garrison_protocol.bundle import Head, Kind
from garrison_protocol.errors import GarrisonError

if TYPE_CHECKING:  # an idle board does without
    from garrison_agent.api.cache_check import FileCheck


class Tick(StrEnum):
    """Periodic timers, and one-off ones of the owner itself."""

    SAMPLE = "sample"
    HEARTBEAT = "heartbeat"
    REFRESH = "refresh"
    THIN = "thin"
    WATCHDOG = "watchdog"
    PUMP = "pump"
    SOAK = "soak"
    SEGMENT = "segment"
    CERTIFICATE = "certificate"
    ANCHOR = "anchor"
    REPEAT = "repeat"
    IDLE = "idle"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class SlotEvent:
    """An event of one alias's deployment, from a job or a timer."""

    alias: str
    event: slot.Event


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """A worker's status, by the generation that ``owner.workers`` gave it."""

    generation: int
    event: WorkerEvent


@dataclass(frozen=True, slots=True)
class HealthSeen:
    """What a worker said of itself when it was asked; None: nothing in time."""

    generation: int
    health: Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a download or repair so far. Not saved: the files on disk are the truth."""

    alias: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class CacheChecked:
    """A check of installed files has ended; ``files`` is what was found until then."""

    files: tuple[FileCheck, ...]


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted the connection; subscriptions are on their way."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection to the broker ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the broker; nothing of it is verified."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class NumbersLow:
    """The link has used up most of its connection numbers."""


@dataclass(frozen=True, slots=True)
class MetadataChecked:
    """A verification ended: ``view`` is what may be believed now; ``error`` is why it is not what was asked for."""

    view: Refresh | None
    error: GarrisonError | None


@dataclass(frozen=True, slots=True)
class AnchorAnswered:
    """What a carrier brought for this board's nonce, an envelope that is not opened yet, or why there is nothing."""

    envelope: bytes | None
    error: GarrisonError | None


@dataclass(frozen=True, slots=True)
class CertificateTried:
    """A renewal of the board's certificate ended; None: the new one is stored."""

    error: GarrisonError | None


@dataclass(frozen=True, slots=True)
class BundleRead:
    """The small files of a bundle, unverified, by their kinds; or why they could not be read."""

    carrier: Carrier
    head: Head | None
    files: Mapping[Kind, bytes]
    error: GarrisonError | None


@dataclass(frozen=True, slots=True)
class Asked:
    """A command of the local API; the owner sets ``answer`` once."""

    command: Command
    answer: Future[object]


@dataclass(frozen=True, slots=True)
class Stop:
    """End in order. ``reason`` goes into the audit log."""

    reason: str


@dataclass(frozen=True, slots=True)
class Bug:
    """A thread met an exception that nobody expects; it ends the process."""

    error: BaseException


OwnerEvent = (
    SlotEvent
    | WorkerSaid
    | HealthSeen
    | Progress
    | Connected
    | Disconnected
    | Message
    | NumbersLow
    | MetadataChecked
    | AnchorAnswered
    | CertificateTried
    | BundleRead
    | CacheChecked
    | Asked
    | Tick
    | Stop
    | Bug
)

Post = Callable[[OwnerEvent], None]
"""Puts an event into the queue; callable from any thread, never blocks."""
