"""``garrison-agent import`` and ``export`` over the real socket: the agent asks, the command reads the stick to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_agent.api.carrier import Carrier, ImportProgress, ImportResult
from garrison_agent.api.commands import BeginImport, Command, GetExport
from garrison_agent.api.server import LocalApi
from garrison_agent.cli.main import main
from garrison_agent.registry.bundle_source import BundleSource, read_whole
from garrison_protocol import bundle
from garrison_protocol.bundle import Kind
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError
from garrison_protocol.states import Stream
from garrison_protocol.stick import Stick
from tests.fakes.local_owner import LocalOwner

pytestmark = pytest.mark.integration

BLOB = bytes(range(256)) * 20_000
RESULT = ImportResult(device="edge-1", fleet="demo", created=1, valid_until=2, items=[], aliases=[])


class Owner:
    """An agent's owner that reads a blob from whatever is imported, and exports three files."""

    def __init__(self) -> None:
        self.read = b""
        self.error: GarrisonError | None = None
        self.jobs: list[threading.Thread] = []

    def answer(self, command: Command) -> object:
        match command:
            case BeginImport():
                carrier = Carrier()
                job = threading.Thread(target=self._job, args=(carrier,))
                self.jobs.append(job)
                job.start()
                return carrier
            case GetExport(""):
                return self._page(bundle.home_path("edge-1", Kind.STATUS), "audit:0")
            case GetExport("audit:0"):
                return self._page(bundle.batch_path("edge-1", Stream.AUDIT, "0" * 16, 1), None)
        raise AssertionError(command)

    @staticmethod
    def _page(path: str, following: str | None) -> object:
        data = base64.b64encode(path.encode()).decode()
        return {"device": "edge-1", "files": [{"path": path, "data": data}], "next": following}

    def _job(self, carrier: Carrier) -> None:
        try:
            read_whole(carrier, bundle.HEAD, 1000)
            carrier.progress = ImportProgress(phase="fetching", done=1, total=2)
            for piece in BundleSource(carrier).blob(sha256_hex(BLOB), 0):
                self.read += piece
        except GarrisonError as error:
            self.error = error
            carrier.end(error)
        else:
            carrier.end(RESULT)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    owner = Owner()
    local = LocalOwner(answer=owner.answer)
    (tmp_path / "agent.toml").write_text(f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}"\n')
    api = LocalApi(
        host="127.0.0.1",
        port=0,
        tcp_open=False,
        socket=tmp_path / "agent.sock",
        table=local.read,
        command=local.post,
    )
    api.start()
    yield owner
    api.stop()
    for job in owner.jobs:
        job.join()


def run(tmp_path: Path, *words: str) -> int:
    return main([*words, "--config", str(tmp_path / "agent.toml"), "-o", "json"])


def test_the_command_reads_to_the_agent_what_it_asks_for(
    owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stick(tmp_path) as stick:
        stick.write(bundle.HEAD, [b"{}"])
        stick.write(bundle.blob_path(sha256_hex(BLOB)), [BLOB])
    assert run(tmp_path, "import", str(tmp_path)) == 0
    assert owner.read == BLOB
    assert json.loads(capsys.readouterr().out) == {**RESULT, "waited": []}


def test_what_the_agent_refuses_is_the_commands_error(
    owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stick(tmp_path) as stick:
        stick.write(bundle.HEAD, [b"{}"])
    assert run(tmp_path, "import", str(tmp_path)) == 4
    assert owner.error is not None
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "source.not_found"


def test_a_folder_that_is_none_is_said_before_the_agent_is_asked(
    owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "import", str(tmp_path / "nowhere")) == 4
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "bundle.folder_missing"
    assert owner.jobs == []


def test_an_export_replaces_the_one_before(owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stick = tmp_path / "stick"
    old, other = bundle.batch_path("edge-1", Stream.AUDIT, "f" * 16, 1), bundle.home_path("edge-2", Kind.STATUS)
    stick.mkdir()
    with Stick(stick) as opened:
        opened.write(old, [b"old"])
        opened.write(other, [b"other"])
    assert run(tmp_path, "export", str(stick)) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 2
    files = {str(path.relative_to(stick)) for path in stick.rglob("*") if path.is_file()}
    assert files == {
        other,
        bundle.home_path("edge-1", Kind.STATUS),
        bundle.batch_path("edge-1", Stream.AUDIT, "0" * 16, 1),
    }
