"""Renews a board's certificate, and is killed by SIGKILL before the N-th operation on the disk.

usage: python -m tests.unit.adapters.renewing_process STATE N      (prints the number of operations if it survives)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from garrison_agent.adapters.renewal import HttpCarrier, Renewal
from garrison_agent.identity import Identity

OPERATIONS = ("open", "fdopen", "fchmod", "fsync", "replace", "rename", "close", "unlink")


def main() -> int:
    """Renew once."""
    state, last = Path(sys.argv[1]), int(sys.argv[2])
    identity = Identity.load(state)
    renewal = Renewal(
        identity, [HttpCarrier(identity.url, lambda: identity.server_context(lambda: datetime.now(UTC)))], str
    )
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **named)

        return run

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    renewal.renew()
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
