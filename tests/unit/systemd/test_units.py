from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from garrison_controller.devices.pki import REVOCATION_LIST

UNITS = Path(__file__).resolve().parents[3] / "systemd"
AGENT, CONTROLLER = "garrison-agent.service", "garrison-controller.service"
both_units = pytest.mark.parametrize("name", [AGENT, CONTROLLER])


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


def settings(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@both_units
def test_systemd_understands_every_line(tmp_path: Path, name: str) -> None:
    # What the unit starts is not installed here, and `verify` asks for it; everything else is checked as it stands.
    copy = tmp_path / name
    text, replaced = re.subn(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", (UNITS / name).read_text())
    copy.write_text(text)
    assert replaced == 1
    result = run("systemd-analyze", "verify", str(copy))
    assert (result.returncode, result.stdout) == (0, "")  # an unknown key is a line of output, not a failure


@both_units
def test_exposure_is_at_most_two(name: str) -> None:
    result = run("systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNITS / name))
    assert result.returncode == 0, result.stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", result.stdout)
    assert exposure is not None
    assert float(exposure[1]) <= 2.0


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (AGENT, "/usr/lib/garrison/venv/bin/garrison-agent run --config /etc/garrison/agent.toml"),
        (CONTROLLER, "/usr/lib/garrison/venv/bin/garrison serve run --config /etc/garrison/controller.toml"),
    ],
)
def test_units_start_what_is_installed_and_wait_until_it_is_ready(name: str, command: str) -> None:
    unit = settings(name)
    assert unit["ExecStart"] == [command]
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert "Requires" not in unit  # weak dependencies only: a rollback must be able to run without a network


def test_what_the_agent_was_seen_to_need_stays_allowed() -> None:
    unit = settings(AGENT)
    assert "ProcSubset" not in unit
    assert "PrivateUsers" not in unit
    assert "ORT_DISABLE_TELEMETRY=1" in unit["Environment"]
    assert unit["WatchdogSec"] == ["60"]


def test_the_controllers_passphrase_is_a_credential_that_may_be_missing() -> None:
    # A name without a path: systemd looks into /etc/credstore, and starts the unit if there is nothing.
    assert settings(CONTROLLER)["LoadCredential"] == ["garrison-passphrase"]


def test_a_new_revocation_list_reloads_the_broker(tmp_path: Path) -> None:
    path, service = "garrison-broker-reload.path", "garrison-broker-reload.service"
    for name in (path, service):
        (tmp_path / name).write_text((UNITS / name).read_text())
    result = run("systemd-analyze", "verify", str(tmp_path / path))
    assert (result.returncode, result.stdout) == (0, "")
    watched = Path(settings(path)["PathChanged"][0])
    assert watched.name == REVOCATION_LIST
    assert watched.parents[1].name == settings(CONTROLLER)["StateDirectory"][0]
    assert settings(service)["ExecStart"] == ["/usr/bin/systemctl try-reload-or-restart mosquitto.service"]


def test_users_of_the_units_are_declared(tmp_path: Path) -> None:
    result = run("systemd-sysusers", "--dry-run", f"--root={tmp_path}", str(UNITS / "garrison.sysusers.conf"))
    assert result.returncode == 0, result.stdout
    for name in (AGENT, CONTROLLER):
        (user,) = settings(name)["User"]
        assert f"Creating user '{user}'" in result.stdout
        assert f" {user} {user} " in (UNITS / "garrison.tmpfiles.conf").read_text()
