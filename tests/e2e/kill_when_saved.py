"""Runs the real agent, and kills it with SIGKILL right after it has saved a slot in a given state.

usage: python -m tests.e2e.kill_when_saved STATE VERSION CONFIG
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from garrison_agent.adapters.slots import SlotStore
from garrison_agent.config import load_config
from garrison_agent.core.slot import Slot
from garrison_agent.wiring import run_agent


def main() -> int:
    """Run until the state comes; then there is no return."""
    state, version, config = sys.argv[1:]
    save = SlotStore.save

    def save_and_die(self: SlotStore, slot: Slot) -> None:
        save(self, slot)
        if slot.state.value == state and slot.package.version == version:
            connection = self._database.connection
            if connection.in_transaction:
                connection.commit()  # dying after the commit is the case in question
            os.kill(os.getpid(), signal.SIGKILL)

    SlotStore.save = save_and_die  # type: ignore[method-assign]
    return run_agent(load_config(Path(config)))


if __name__ == "__main__":
    sys.exit(main())
