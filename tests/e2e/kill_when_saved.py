"""Runs the real agent, and kills it with SIGKILL once a slot in a given state is committed, before its effects run.

usage: python -m tests.e2e.kill_when_saved STATE VERSION CONFIG
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from garrison_agent.adapters.database import Database
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.config import load_config
from garrison_agent.core.slot import Slot
from garrison_agent.wiring import run_agent


def main() -> int:
    """Run until the state comes; then there is no return."""
    state, version, config = sys.argv[1:]
    save, transaction = SlotStore.save, Database.transaction
    saved: list[Slot] = []

    def save_and_remember(self: SlotStore, slot: Slot) -> None:
        if slot.state.value == state and slot.package.version == version:
            saved.append(slot)
        save(self, slot)

    @contextmanager
    def commit_and_die(self: Database, *, spare: bool = False) -> Iterator[None]:
        with transaction(self, spare=spare):
            yield
        if saved and not self.connection.in_transaction:
            os.kill(os.getpid(), signal.SIGKILL)

    SlotStore.save = save_and_remember  # type: ignore[method-assign]
    Database.transaction = commit_and_die  # type: ignore[method-assign]
    return run_agent(load_config(Path(config)))


if __name__ == "__main__":
    sys.exit(main())
