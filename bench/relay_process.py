"""``python -m bench.relay_process ALIAS WORKER SOCKET PORT``: the agent's server in front of one worker, alone."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from garrison_agent.api.server import LocalApi
from tests.fakes.local_owner import LocalOwner, make_route


def main() -> None:
    """Serve until SIGTERM."""
    alias, worker, socket, port = sys.argv[1:]
    owner = LocalOwner(make_route(alias, socket=Path(worker)))
    api = LocalApi(
        host="127.0.0.1",
        port=int(port),
        tcp_open=True,
        socket=Path(socket),
        table=owner.read,
        command=owner.post,
    )
    api.start()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print("ready", flush=True)
    ended.wait()
    api.stop()


if __name__ == "__main__":
    main()
