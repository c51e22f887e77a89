"""A step in the making: what one event changes, asks for, and leaves in the audit log. Pure."""

from __future__ import annotations

from dataclasses import replace

from garrison_agent.core.slot import Effect, Phase, Record, Slot, Step
from garrison_protocol.manifest import PackageRef
from garrison_protocol.states import DeploymentState

MAX_FACT_CHARS = 1000
"""Others wrote some of them (an engine's message, a controller's); an audit entry has a bound."""


class Draft:
    """Collects a step. ``slot`` is replaced, never changed in place."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._effects: list[Effect] = []
        self._records: list[Record] = []

    def enter(self, state: DeploymentState) -> None:
        """Change the deployment's state, which counts as a step and is an audit entry."""
        wait = self.slot.wait if state is DeploymentState.WAITING else None
        self.slot = replace(self.slot, state=state, step=self.slot.step + 1, wait=wait)
        slot = self.slot
        self.note(
            f"deployment.{state.value.lower()}",
            slot.package,
            rollout=slot.rollout,
            step=slot.step,
            attempt=slot.attempt,
            variant=slot.variant,
            reason=wait.value if wait else None,
            code=slot.error_code,
        )

    def turn(self, phase: Phase) -> None:
        """Change where the serving worker stands; earlier restart timers and repairs no longer count."""
        self.slot = replace(self.slot, phase=phase, turn=self.slot.turn + 1)

    def run(self, *effects: Effect) -> None:
        """Ask for effects, in order, after the slot is saved."""
        self._effects.extend(effects)

    def note(self, kind: str, package: PackageRef | None, **facts: str | int | bool | None) -> None:
        """Leave an audit entry about this alias; facts that are None are left out."""
        about: dict[str, str | int | bool | None] = {"alias": self.slot.alias}
        if package is not None:
            about |= {"model": package.id, "manifest": package.manifest_sha256}
        for name, value in facts.items():
            if value is not None:
                about[name] = value[:MAX_FACT_CHARS] if isinstance(value, str) else value
        self._records.append(Record(kind, about))

    def done(self) -> Step:
        """Return the step."""
        return Step(self.slot, tuple(self._effects), tuple(self._records))
