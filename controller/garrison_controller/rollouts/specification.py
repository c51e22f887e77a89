"""What an operator asks for, checked; how boards fall into groups; and the digest an approval is bound to. PURE."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from garrison_controller.access.rules import FLEET
from garrison_controller.devices.filter import DeviceFacts, holds, parse_filter
from garrison_protocol.canonical import canonical_json, sha256_hex
from garrison_protocol.ids import Name, Version
from garrison_protocol.messages.desired import GateLimits

MAX_GROUPS = 100
DAY_S = 86_400


class GroupSpec(BaseModel):
    """One group: the boards that ``filter`` means, or ``percent`` of all the rollout's boards (rounded up)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    filter: str | None = Field(default=None, max_length=512)
    percent: int | None = Field(default=None, ge=1, le=100)

    @model_validator(mode="after")
    def _one_selection(self) -> GroupSpec:
        if (self.filter is None) == (self.percent is None):
            raise ValueError("a group needs either a filter or a percentage")
        return self


class RolloutSpec(BaseModel):
    """What ``POST /api/v1/rollouts`` takes. Times are seconds, thresholds percent of a group's boards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    model: Name
    version: Version
    alias: Name | None = None
    """None: the package's own alias."""
    scope: str = Field(default=FLEET, max_length=256)
    target_filter: str = Field(default="*", max_length=512)
    groups: tuple[GroupSpec, ...] = Field(default=(GroupSpec(name="all", filter="*"),), min_length=1)
    soak_s: float = Field(default=300, ge=0, le=30 * DAY_S, allow_inf_nan=False)
    limits: GateLimits = GateLimits()
    success_threshold: int = Field(default=100, ge=1, le=100)
    error_threshold: int = Field(default=0, ge=0, le=100)
    min_executed: int = Field(default=1, ge=1, le=1_000_000)
    queued_timeout_s: int = Field(default=DAY_S, ge=1, le=366 * DAY_S)
    in_progress_timeout_s: int = Field(default=2 * 3600, ge=1, le=366 * DAY_S)
    max_unavailable: int | None = Field(default=None, ge=1, le=1_000_000)
    start_on_approval: bool = True

    @model_validator(mode="after")
    def _groups_make_sense(self) -> RolloutSpec:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError("two groups share one name")
        if len(names) > MAX_GROUPS:
            raise ValueError(f"more than {MAX_GROUPS} groups")
        if sum(group.percent or 0 for group in self.groups) > 100:
            raise ValueError("the groups' percentages exceed 100")
        return self


@dataclass(frozen=True, slots=True)
class Placement:
    """Which boards fall into which group, in the groups' order, and which fall into none."""

    groups: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]


def place(rollout: str, groups: Sequence[GroupSpec], devices: Sequence[DeviceFacts]) -> Placement:
    """Return the placement of ``devices``, each in the first group that takes it.

    Percentages refer to all ``devices``. Which boards they take follows from the rollout's id, so that a preview
    equals what happens, and the first group is not the same boards every time.
    """
    left = sorted(devices, key=lambda device: hashlib.sha256(f"{rollout}:{device.name}".encode()).digest())
    placed: list[tuple[str, ...]] = []
    for group in groups:
        if group.percent is not None:
            taken = left[: -(-group.percent * len(devices) // 100)]
        else:
            terms = parse_filter(group.filter or "")
            taken = [device for device in left if holds(device, terms)]
        names = {device.name for device in taken}
        left = [device for device in left if device.name not in names]
        placed.append(tuple(sorted(names)))
    return Placement(tuple(placed), tuple(sorted(device.name for device in left)))


def digest(facts: Mapping[str, object], groups: Sequence[GroupSpec]) -> str:
    """Return the SHA-256 of the canonical JSON of a rollout's immutable facts. Floats are hashed as their text."""
    document = {
        "schema": "garrison-rollout/v1",
        **{key: _exact(value) for key, value in facts.items()},
        "groups": [{"name": group.name, "filter": group.filter, "percent": group.percent} for group in groups],
    }
    return sha256_hex(canonical_json(document))


def _exact(value: object) -> object:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: _exact(item) for key, item in value.items()}
    return value
