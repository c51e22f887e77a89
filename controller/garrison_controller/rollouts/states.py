"""States of rollouts, groups, and targets, in hawkBit's words where it has them. PURE."""

from __future__ import annotations

from enum import StrEnum


class RolloutStatus(StrEnum):
    """Where a rollout stands."""

    WAITING_FOR_APPROVAL = "WAITING_FOR_APPROVAL"
    APPROVAL_DENIED = "APPROVAL_DENIED"
    READY = "READY"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    STOPPED = "STOPPED"
    FINISHED = "FINISHED"

    @property
    def open(self) -> bool:
        """Tell whether the rollout has targets that it still decides about."""
        return self in {RolloutStatus.RUNNING, RolloutStatus.PAUSED}


class GroupStatus(StrEnum):
    """Where a group stands."""

    SCHEDULED = "SCHEDULED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    ERROR = "ERROR"


class TargetState(StrEnum):
    """The controller's verdict on one board of a rollout; the board's own word is its ``DeploymentState``."""

    SCHEDULED = "SCHEDULED"
    """Not handed out: its group has not begun, no slot is free, or the rollout was paused."""
    QUEUED = "QUEUED"
    """Handed out; the board has not begun."""
    IN_PROGRESS = "IN_PROGRESS"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    CANCELED = "CANCELED"

    @property
    def pending(self) -> bool:
        """Tell whether the board may still become successful without anyone's doing."""
        return self in {TargetState.SCHEDULED, TargetState.QUEUED, TargetState.IN_PROGRESS}

    @property
    def handed_out(self) -> bool:
        """Tell whether the board is, or may begin to be, at work on the change."""
        return self in {TargetState.QUEUED, TargetState.IN_PROGRESS}


class Decision(StrEnum):
    """What an approver decided."""

    APPROVE = "approve"
    DENY = "deny"
