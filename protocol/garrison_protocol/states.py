"""Enumerations on the wire. Values are only ever added."""

from __future__ import annotations

from enum import StrEnum


class DeploymentState(StrEnum):
    """Where a board stands in bringing one package into service under one alias (docs/protocol.md, "Deployment")."""

    ASSIGNED = "ASSIGNED"
    WAITING = "WAITING"
    DOWNLOADING = "DOWNLOADING"
    VERIFYING = "VERIFYING"
    STAGED = "STAGED"
    LOADING = "LOADING"
    EVALUATING = "EVALUATING"
    SOAKING = "SOAKING"
    ACTIVE = "ACTIVE"
    REPAIRING = "REPAIRING"
    FAILED = "FAILED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"
    DOWN = "DOWN"
    REJECTED = "REJECTED"
    SUPERSEDED = "SUPERSEDED"
    REMOVED = "REMOVED"

    @property
    def terminal(self) -> bool:
        """Tell whether a deployment ends here (ACTIVE counts: it succeeded)."""
        return self in _TERMINAL

    @property
    def failed(self) -> bool:
        """Tell whether the deployment ended without the new model in service."""
        return self in _FAILED


_FAILED = frozenset(
    {
        DeploymentState.FAILED,
        DeploymentState.ROLLED_BACK,
        DeploymentState.DOWN,
        DeploymentState.REJECTED,
    }
)
_TERMINAL = _FAILED | {DeploymentState.ACTIVE, DeploymentState.SUPERSEDED, DeploymentState.REMOVED}

BEFORE_LOADING = frozenset(
    {
        DeploymentState.ASSIGNED,
        DeploymentState.WAITING,
        DeploymentState.DOWNLOADING,
        DeploymentState.VERIFYING,
        DeploymentState.STAGED,
    }
)
"""States in which the old model never stopped, so a deployment can be dropped without a trace in service."""


class WaitReason(StrEnum):
    """Why a deployment stands in WAITING."""

    WINDOW = "window"
    DISK = "disk"
    BUSY = "busy"
    NETWORK = "network"
    METADATA_STALE = "metadata_stale"


class Freshness(StrEnum):
    """How fresh a board's registry metadata is; expiry never stops a running model."""

    FRESH = "FRESH"
    STALE = "STALE"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    NONE = "NONE"


class Engine(StrEnum):
    """The native runtime that a variant needs."""

    LLAMA_CPP = "llama.cpp"
    ONNXRUNTIME = "onnxruntime"


class DeviceType(StrEnum):
    """Foundry Local's device types."""

    CPU = "CPU"
    GPU = "GPU"
    NPU = "NPU"


class KeyPurpose(StrEnum):
    """What ``fleet.json`` lets a key sign."""

    DIRECTOR = "director"
    RECEIPT = "receipt"
    LOG = "log"
    WITNESS = "witness"


class Stream(StrEnum):
    """Upward streams of numbered rows, kept on the board until a signed receipt covers them."""

    AUDIT = "audit"
    TELEMETRY = "telemetry"
