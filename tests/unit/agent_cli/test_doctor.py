from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from garrison_agent.api.commands import Check
from garrison_agent.cli.doctor import examine
from garrison_agent.cli.main import main
from tests.unit.agent_cli.conftest import Serve

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def enrol(state: Path, *, start: datetime = NOW - DAY, end: datetime = NOW + 90 * DAY) -> Path:
    """Lay out an identity as enrolment does."""
    folder = state / "identity"
    folder.mkdir()
    (folder / "device.json").write_text("{}")
    (folder / "identity.key").write_bytes(b"secret")
    (folder / "identity.key").chmod(0o600)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge-1")])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(start)
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.pem").chmod(0o600)
    return folder


def check(config: Path, name: str) -> Check:
    return next(each for each in examine(config, NOW.timestamp()) if each["name"] == name)


def test_a_healthy_board(serve: Serve, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enrol(config.parent / "state", start=datetime.now(UTC) - DAY, end=datetime.now(UTC) + 90 * DAY)
    serve(lambda command: [Check(name="broker", outcome="warn", detail="not connected", fix="check the network")])
    assert main(["doctor", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "fail" not in out
    assert "warn  broker" in out
    assert "fix: check the network" in out
    assert main(["doctor", "-o", "json", "--config", str(config)]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert {"config", "disk", "clock", "certificate", "agent", "broker"} <= {each["name"] for each in checks}


def test_a_new_board_with_the_agent_down(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", str(config)]) == 1
    out = capsys.readouterr().out
    assert "this board is not enrolled" in out
    assert "garrison-agent enroll" in out
    assert "the agent is not running" in out


def test_every_finding_says_what_to_do(config: Path) -> None:
    for each in examine(config, NOW.timestamp()):
        assert bool(each["fix"]) == (each["outcome"] != "ok"), each


def test_a_configuration_that_is_wrong_is_the_only_finding(config: Path) -> None:
    config.write_text("state_dri = 1")
    findings = list(examine(config, 0))
    assert [(each["name"], each["outcome"]) for each in findings] == [("config", "fail")]
    assert "state_dri" in findings[0]["detail"]


def test_keys_that_others_can_read(config: Path) -> None:
    folder = enrol(config.parent / "state")
    (folder / "tls.pem").chmod(0o640)
    finding = check(config, "tls.pem")
    assert (finding["outcome"], finding["fix"]) == ("fail", f"chmod 600 {folder / 'tls.pem'}")
    (folder / "identity.key").unlink()
    assert check(config, "identity.key")["outcome"] == "fail"


@pytest.mark.parametrize(
    ("start", "end", "name", "outcome"),
    [
        (NOW - DAY, NOW + 90 * DAY, "certificate", "ok"),
        (NOW - 21 * DAY, NOW + 9 * DAY, "certificate", "ok"),
        (NOW - 26 * DAY, NOW + 4 * DAY, "certificate", "warn"),
        (NOW - 2 * DAY, NOW - DAY, "certificate", "fail"),
        (NOW + DAY, NOW + 90 * DAY, "clock", "fail"),
    ],
)
def test_certificates_and_clocks(config: Path, start: datetime, end: datetime, name: str, outcome: str) -> None:
    enrol(config.parent / "state", start=start, end=end)
    assert check(config, name)["outcome"] == outcome


def test_a_certificate_that_is_none(config: Path) -> None:
    folder = enrol(config.parent / "state")
    (folder / "tls.pem").write_text("nonsense")
    assert check(config, "certificate")["outcome"] == "fail"
    (folder / "tls.pem").unlink()
    assert check(config, "certificate")["outcome"] == "fail"


def test_a_disk_below_the_reserve(config: Path) -> None:
    with config.open("a") as file:
        file.write("[limits]\ndisk_reserve_mb = 999999999\n")
    finding = check(config, "disk")
    assert finding["outcome"] == "fail"
    assert "cache remove" in finding["fix"]


def test_folders_that_are_missing(config: Path) -> None:
    (config.parent / "run").rmdir()
    assert "when the agent starts" in check(config, "runtime folder")["detail"]
    shutil.rmtree(config.parent / "state")
    assert check(config, "state folder")["outcome"] == "fail"
