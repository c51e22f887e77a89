"""The local API in front of a stand-in worker, for the tests of one surface each."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from garrison_agent.api.server import LocalApi
from garrison_agent.core.applications import ApplicationTable
from garrison_agent.runtimes.gate import UnixConnection
from tests.fakes.local_owner import LocalOwner

DEADLINE_S = 20.0


@contextmanager
def serving(
    owner: LocalOwner, socket: Path, applications: Callable[[], ApplicationTable] = ApplicationTable
) -> Iterator[LocalApi]:
    """Run the local API of ``owner`` on a free port and on ``socket``."""
    api = LocalApi(
        host="127.0.0.1",
        port=0,
        tcp_open=True,
        socket=socket,
        table=owner.read,
        command=owner.post,
        applications=applications,
    )
    api.start()
    try:
        yield api
    finally:
        api.stop()


def call(api: LocalApi | Path, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Return status and JSON (or bytes) of one request over TCP, or through the unix socket of that path."""
    connection: http.client.HTTPConnection
    if isinstance(api, Path):
        connection = UnixConnection(api, DEADLINE_S)
    else:
        url = urlsplit(api.endpoints[0])
        assert url.hostname is not None
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=DEADLINE_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode())
        response = connection.getresponse()
        data = response.read()
        if response.headers.get("content-type") == "application/json":
            return response.status, json.loads(data)
        return response.status, data
    finally:
        connection.close()
