"""Every path of the local API, asked over TCP by who may not manage the board: nothing but models' answers comes of it.

The paths are those that the code registers, so that a new one is asked, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from garrison_agent.api.commands import (
    AddApp,
    BeginImport,
    CheckCache,
    Command,
    GetExport,
    ListApps,
    LoadModel,
    RemoveApp,
    RemoveFromCache,
    SetKeepAlive,
    ShowApp,
    UnloadModel,
)
from garrison_agent.core.applications import Application, ApplicationTable, key_digest
from garrison_protocol.errors import ConflictError
from garrison_protocol.states import Engine
from tests.fakes.local_owner import LocalOwner, make_route
from tests.fakes.route_list import served
from tests.integration.surfaces import DEADLINE_S, serving

pytestmark = pytest.mark.integration

GUARDED = {AddApp, BeginImport, CheckCache, GetExport, ListApps, RemoveApp, RemoveFromCache, ShowApp, UnloadModel}
"""What changes the board, or tells of its applications and its outbox."""
ASKED_BY_REQUESTS = {LoadModel, SetKeepAlive}
"""What a request to a model brings about by itself."""
INFERENCE = re.compile(
    r"/v1/(chat/)?[a-z]+(/tokenizer/encode/count)?|/api/[a-z]+|/v2/models/[^/]+(/versions/[^/]+)?(/infer)?"
)
TABLE = ApplicationTable(
    (
        Application("camera", key_digest("gsk_camera"), 0),
        Application("console", key_digest("gsk_console"), 0, admin=True),
    )
)


class Board:
    """The local API before an owner that refuses whatever it is asked, but writes it down."""

    def __init__(self, folder: Path) -> None:
        tensors = make_route("files", name="magika", engine=Engine.ONNXRUNTIME)
        self.owner = LocalOwner(make_route(), tensors, answer=lambda command: ConflictError("a.b", "no"))
        self.api = serving(self.owner, folder / "agent.sock", lambda: TABLE)

    def walk(self, url: str, key: str | None) -> Iterator[tuple[str, str, list[Command]]]:
        """Ask for every path; yield method, path, and what reached the owner."""
        host = urlsplit(url)
        assert host.hostname is not None
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        for route in served():
            name = "files" if route.path.startswith("/v2") else "chat"
            path = re.sub(
                r"\{version\}", "1.0.0", re.sub(r"\{(name|device|digest|id|session|cursor)\}", name, route.path)
            )
            body = f'{{"name": "{name}"}}' if path == "/garrison/v1/apps" else '{"model": "chat", "prompt": "hello"}'
            for method in route.methods:
                self.owner.commands.clear()
                connection = HTTPConnection(host.hostname, host.port, timeout=DEADLINE_S)
                try:
                    connection.request(method, path, body if method == "POST" else None, headers)
                    connection.getresponse().read()
                finally:
                    connection.close()
                yield method, path, list(self.owner.commands)


@pytest.mark.parametrize("key", [None, "gsk_camera"])
def test_nothing_but_requests_to_models_has_an_effect(tmp_path: Path, key: str | None) -> None:
    board = Board(tmp_path)
    with board.api as api:
        for method, path, commands in board.walk(api.endpoints[0], key):
            kinds = {type(command) for command in commands}
            assert not kinds & GUARDED, (method, path, commands)
            if not INFERENCE.fullmatch(path):
                assert not kinds & ASKED_BY_REQUESTS, (method, path, commands)


def test_the_same_walk_with_an_admin_key_reaches_all_of_it(tmp_path: Path) -> None:
    board, kinds = Board(tmp_path), set()
    with board.api as api:
        for _, path, commands in board.walk(api.endpoints[0], "gsk_console"):
            found = {type(command) for command in commands}
            kinds |= found if not INFERENCE.fullmatch(path) else found & GUARDED
    assert kinds >= GUARDED | {LoadModel}
