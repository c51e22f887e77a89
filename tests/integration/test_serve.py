"""The controller as a process: created, started, asked, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.controllers import DEADLINE_S, environment, wait_until

pytestmark = pytest.mark.integration


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


class Host:
    """A machine with a controller's configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.config = folder / "controller.toml"
        self.config.write_text(
            f'state_dir = "state"\npublic_url = "https://127.0.0.1:{self.port}"\n'
            f"[http]\nport = {self.port}\n[mqtt]\nport = {free_port()}\n[rollouts]\ntick_s = 0.5\n"
        )
        self.environment = environment(
            f"https://127.0.0.1:{self.port}", "", folder / "state" / "pki" / "server-ca.pem", folder
        )

    def garrison(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "garrison_controller", *words, "--config", str(self.config)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=self.environment,
        )

    def json(self, *words: str) -> dict[str, str]:
        done = self.garrison(*words, "-o", "json")
        assert done.returncode == 0, done.stderr
        document: dict[str, str] = json.loads(done.stdout)
        return document


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_from_nothing_to_a_controller_that_answers_and_ends_cleanly(host: Host) -> None:
    before = host.garrison("serve", "run")
    assert (before.returncode, "garrison serve init" in before.stderr) == (4, True)
    assert Path(host.json("serve", "init", "--unencrypted-keys")["online"]).is_file()
    again = host.garrison("serve", "init", "--unencrypted-keys")
    assert (again.returncode, "holds keys already" in again.stderr) == (5, True)
    token = host.json("access", "bootstrap", "alice")["token"]
    second = host.garrison("access", "bootstrap", "mallory")
    assert second.returncode == 5

    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(host.folder / "notify"))
    notify.settimeout(DEADLINE_S)
    log = (host.folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "garrison_controller", "serve", "run", "--config", str(host.config)],
        env=host.environment | {"NOTIFY_SOCKET": str(host.folder / "notify")},
        stderr=log,
    )
    try:
        assert notify.recv(64) == b"READY=1"
        assert host.json("serve", "status")["status"] == "ok"
        who = subprocess.run(
            [sys.executable, "-m", "garrison_controller", "access", "whoami", "-o", "json"],
            capture_output=True,
            check=True,
            timeout=60,
            env=host.environment | {"GARRISON_TOKEN": token},
        )
        assert json.loads(who.stdout)["name"] == "alice"
        taken = host.garrison("serve", "run")
        assert (taken.returncode, "cannot listen" in taken.stderr) == (8, True)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert notify.recv(64) == b"STOPPING=1"
    finally:
        process.kill()
        process.wait()
        log.close()
        notify.close()
    text = (host.folder / "log").read_text()
    assert "Traceback" not in text, text
    down = host.garrison("serve", "status")
    assert (down.returncode, "hint:" in down.stderr) == (8, True)


def test_a_killed_controller_starts_again(host: Host) -> None:
    """And writes the revocation list: it may have been killed between a revocation's commit and the file."""
    host.json("serve", "init", "--unencrypted-keys")
    revocations = host.folder / "state" / "pki" / "device-ca.crl"
    for _ in range(2):
        revocations.unlink()
        process = subprocess.Popen(
            [sys.executable, "-m", "garrison_controller", "serve", "run", "--config", str(host.config)],
            env=host.environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: is_open(host.port), "the controller")
            wait_until(revocations.is_file, "the revocation list")
        finally:
            process.kill()
            process.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_renewed_certificates_are_written(host: Host) -> None:
    host.json("serve", "init", "--unencrypted-keys")
    before = (host.folder / "state" / "pki" / "server.pem").read_bytes()
    host.json("serve", "renew")
    assert (host.folder / "state" / "pki" / "server.pem").read_bytes() != before
    files = host.garrison("broker", "config", "mosquitto", "--out", str(host.folder / "broker"))
    assert "mosquitto -c" in files.stdout
