"""A whole agent that other machines may use: applications are added by command, called over TLS, and measured."""

from __future__ import annotations

import json
import signal
import ssl
from collections.abc import Iterator
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from demo.processes import free_port
from garrison_agent.cli.main import main
from tests.fakes.pki import Authority
from tests.integration.agent_process import DEADLINE_S, AgentProcess

pytestmark = pytest.mark.integration


class Remote:
    """The agent as a machine of the network sees it."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder / "tls", "ca")
        issued = authority.issue("127.0.0.1", server=True)
        issued.key.chmod(0o600)
        self.context = ssl.create_default_context(cafile=str(authority.pem))
        self.port = free_port()
        self.agent = AgentProcess(folder)
        self.agent.enrol(folder)
        self.agent.install()
        text = self.agent.config.read_text()
        door = f'host = "0.0.0.0"\nport = {self.port}\ntls_certificate = "{issued.cert}"\ntls_key = "{issued.key}"\n'
        self.agent.config.write_text(text.replace('tcp = "off"\n', f'tcp = "keys"\n{door}'))

    def call(self, method: str, path: str, key: str, body: object = None) -> tuple[int, str]:
        connection = HTTPSConnection("127.0.0.1", self.port, timeout=DEADLINE_S, context=self.context)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"x-api-key": key})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def cli(self, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
        assert main([*words, "-o", "json", "--config", str(self.agent.config)]) == 0
        return json.loads(capsys.readouterr().out)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    made = Remote(tmp_path)
    yield made
    if made.agent.child is not None and made.agent.child.poll() is None:
        made.agent.end(signal.SIGKILL)


def test_an_application_of_another_machine(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    agent = remote.agent
    agent.start()
    agent.wait_for(lambda: bool(agent.alias()["loaded"]))
    assert remote.call("GET", "/v2/health/ready", "")[0] == 401
    key = remote.cli(capsys, "app", "add", "camera", "--models", "files", "--rate", "100")["key"]
    inputs = [{"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": [65] * 2048}]
    assert remote.call("POST", "/v2/models/files/infer", key, {"inputs": inputs})[0] == 200
    agent.wait_for(lambda: remote.cli(capsys, "app", "show", "camera")["requests"] == 1)
    status, page = remote.call("GET", "/metrics", key)
    assert status == 200
    labels = 'gen_ai_request_model="files",gen_ai_operation_name="infer"'
    assert f"gen_ai_server_request_duration_seconds_count{{{labels}}} 1\n" in page
    assert 'garrison_model_loaded{gen_ai_request_model="files",model_id="magika:1.0.0"} 1\n' in page
    assert agent.end(signal.SIGTERM) == 0
    agent.start()  # and so after a restart
    agent.wait_for(lambda: agent.ask("GET", "/v2/health/live")[0] == 200)
    assert remote.call("GET", "/v2/health/ready", key)[0] == 200
    remote.cli(capsys, "app", "remove", "camera")
    assert remote.call("GET", "/v2/health/ready", key)[0] == 401


def test_without_tls_it_does_not_start(remote: Remote) -> None:
    agent = remote.agent
    lines = [line for line in agent.config.read_text().splitlines() if not line.startswith("tls_")]
    agent.config.write_text("\n".join(lines))
    agent.start()
    assert agent.child is not None
    assert agent.child.wait(DEADLINE_S) == 2
    assert "needs api.tls_certificate and api.tls_key" in agent.log.read_text()
