"""Desired state: what one board should run, the whole of it (docs/protocol.md, "Desired state")."""

from __future__ import annotations

from pydantic import Field

from garrison_protocol.ids import Name
from garrison_protocol.manifest import PackageRef
from garrison_protocol.messages.base import Message, Part

KIND = "desired"
MAX_ALIASES = 64


class GateLimits(Part):
    """Speed and memory limits of a rollout, on top of the manifest's quality thresholds. None: no limit."""

    min_tokens_per_s: float | None = Field(default=None, allow_inf_nan=False)
    max_ttft_ms: float | None = Field(default=None, allow_inf_nan=False)
    max_rss_mb: float | None = Field(default=None, allow_inf_nan=False)


class DesiredAlias(Part):
    """One alias and the package that should serve it. ``rollout`` names one attempt: a new id is a new attempt."""

    alias: Name
    package: PackageRef
    rollout: str = Field(min_length=1, max_length=64)
    soak_s: float = Field(default=300, ge=0, allow_inf_nan=False)
    start_by: int | None = None
    """Unix seconds after which a board does not begin; None: no limit."""
    limits: GateLimits = GateLimits()
    loaded: bool = True


class Desired(Message):
    """The highest counter wins; it does not expire. Retained on ``down/<device>/desired``, signed by the director."""

    counter: int = Field(ge=1, lt=2**53)
    aliases: tuple[DesiredAlias, ...] = Field(max_length=MAX_ALIASES)
