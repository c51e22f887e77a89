"""Status and report: level-triggered, only the latest matters (docs/protocol.md, "Status", "Report")."""

from __future__ import annotations

from pydantic import Field

from garrison_protocol.ids import Name, Sha256
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.base import Message, Part
from garrison_protocol.states import DeploymentState, Freshness

STATUS_KIND = "status"
REPORT_KIND = "report"


class Head(Part):
    """The newest row of a stream on the board."""

    epoch: str
    seq: int = Field(ge=0)
    hash: str
    acked: int = Field(default=0, ge=0)


class RegistryView(Part):
    """Which registry metadata the board trusts."""

    freshness: Freshness = Freshness.NONE
    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0


class Status(Message):
    """Birth, heartbeat, and (as the Last Will, signed before connecting) death. Retained.

    ``connection`` counts the board's connections; a death counts only for the current one.
    """

    connection: int = Field(ge=0)
    online: bool
    agent_version: str = ""
    desired_counter: int = Field(default=0, ge=0)
    desired_sha256: Sha256 | None = None
    heads: dict[str, Head] = Field(default_factory=dict)
    registry: RegistryView = RegistryView()


class EvaluationSummary(Part):
    """The gate's result on this board."""

    cases_sha256: Sha256
    cases: int
    passed: int
    accuracy: float
    tokens_per_s: float | None = None
    ttft_ms: float | None = None
    rss_mb: float | None = None


class AliasReport(Part):
    """One alias: the deployment under way or ended last, and what serves."""

    alias: Name
    package: PackageRef
    rollout: str
    state: DeploymentState
    step: int = Field(ge=0)
    """Counts state changes of the alias on this board; the controller ignores lower ones."""
    variant: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    progress_bytes: int = 0
    total_bytes: int = 0
    serving: PackageRef | None = None
    loaded: bool = False
    lease_expired: bool = False
    """The serving package's lease has run out; whether it still answers is its manifest's decision."""
    evaluation: EvaluationSummary | None = None


class Inventory(Part):
    """What the board is."""

    architecture: str = ""
    os: str = ""
    cpu_count: int = 0
    cpu_features: tuple[str, ...] = ()
    memory_mb: int = 0
    disk_free_mb: int = 0
    engines: tuple[str, ...] = ()


class Report(Message):
    """Reported state. ``revision`` grows with every report of the board, across restarts."""

    revision: int = Field(ge=1)
    epoch: str = Field(default="", max_length=16)
    """The audit epoch of the store that counts ``revision``; one of an earlier store is ignored."""
    aliases: tuple[AliasReport, ...] = ()
    inventory: Inventory = Inventory()
    refused: dict[str, int] = Field(default_factory=dict)
    """Counts of refused messages by code since the board's store began."""
