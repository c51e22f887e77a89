"""A controller's bus that is killed right after it committed a batch, before its receipt and its acknowledgement.

Arguments: a JSON document with what ``bus_of`` needs.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from garrison_controller.bus.ingest import Ingest, Outgoing
from garrison_controller.bus.service import Bus
from garrison_controller.db.base import Database
from garrison_protocol.keys import SigningKey


def bus_of(document: dict[str, Any]) -> Bus:
    tls = ssl.create_default_context(cafile=document["ca"])
    tls.load_cert_chain(document["cert"], document["key"])
    return Bus(
        Database(document["database"]),
        host="127.0.0.1",
        port=document["port"],
        identity="controller-1",
        tls=tls,
        protocol=document["protocol"],
        keepalive_s=30,
        director=SigningKey.load(Path(document["director"])),
        receipt_key=SigningKey.load(Path(document["receipt"])),
        now=lambda: datetime.now(UTC),
    )


def main() -> None:
    commit = Ingest.handle

    def commit_and_die(self: Ingest, topic: str, payload: bytes) -> Outgoing:
        outgoing = commit(self, topic, payload)
        if topic.endswith("/audit"):
            os.kill(os.getpid(), signal.SIGKILL)
        return outgoing

    setattr(Ingest, "handle", commit_and_die)  # noqa: B010 -- the type checker refuses to assign a method
    bus_of(json.loads(sys.argv[1])).start()
    signal.pause()


if __name__ == "__main__":
    main()
