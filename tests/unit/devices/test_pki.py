from __future__ import annotations

import json
import os
import pwd
import ssl
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from garrison_controller.config import ControllerConfig, HttpConfig, MqttConfig
from garrison_controller.devices import broker, pki
from garrison_controller.devices.keyring import ONLINE_KEYS
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> ControllerConfig:
    return ControllerConfig(
        state_dir=tmp_path / "state",
        public_url="https://fleet.example:8443",
        http=HttpConfig(names=("10.0.0.7",)),
        mqtt=MqttConfig(host="127.0.0.1", port=8884, public_host="broker.example", public_port=8883),
    )


def test_initialise_makes_everything_once(config: ControllerConfig) -> None:
    online = pki.initialise(config, NOW)
    document = json.loads(online.read_text())
    assert set(document) == {*ONLINE_KEYS, "device_ca", "server_ca"}
    keys = pki.load_online_keys(config)
    assert keys.director.public_hex == document["director"]
    assert pki.load_authority(config, pki.DEVICE_CA).pem == document["device_ca"]
    assert pki.load_authority(config, pki.SERVER_CA).pem == document["server_ca"]
    with pytest.raises(ConflictError, match=r"controller\.initialised"):
        pki.initialise(config, NOW)
    assert json.loads(online.read_text()) == document
    online.unlink()  # or an earlier try was cut off: the keys may be the only ones there are
    with pytest.raises(ConflictError) as caught:
        pki.initialise(config, NOW)
    assert "online.json" in caught.value.hint


def test_private_files_are_private(config: ControllerConfig) -> None:
    pki.initialise(config, NOW)
    keys = [*config.keys_dir.glob("*.key"), *config.pki_dir.glob("*.key")]
    assert len(keys) == 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700


def test_the_server_certificate_names_controller_and_broker(config: ControllerConfig) -> None:
    pki.initialise(config, NOW)
    certificate = x509.load_pem_x509_certificate((config.pki_dir / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fleet.example", "broker.example"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "10.0.0.7"]


def test_renewed_certificates_fit_their_keys(config: ControllerConfig) -> None:
    pki.initialise(config, NOW)
    before = (config.pki_dir / "server.pem").read_bytes()
    pki.issue_own(config, pki.load_authority(config, "device-ca"), pki.load_authority(config, "server-ca"), NOW)
    assert (config.pki_dir / "server.pem").read_bytes() != before
    for name in ("server", "controller"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.pki_dir / f"{name}.pem", config.pki_dir / f"{name}.key")


def test_nothing_runs_before_init(config: ControllerConfig) -> None:
    with pytest.raises(NotFoundError, match=r"controller\.not_initialised"):
        pki.load_online_keys(config)


def test_the_broker_gives_each_board_its_own_topics_only(config: ControllerConfig, tmp_path: Path) -> None:
    pki.initialise(config, NOW)
    conf, acl = broker.write_broker_config(config, tmp_path / "broker")
    rules = [line for line in acl.read_text().splitlines() if line and not line.startswith("#")]
    assert rules == [
        "user controller-1",
        "topic readwrite garrison/v1/#",
        "pattern write garrison/v1/up/%u/#",
        "pattern read garrison/v1/down/%u/#",
        "pattern read garrison/v1/registry/#",
    ]
    settings = dict(
        line.split(" ", maxsplit=1) for line in conf.read_text().splitlines() if line and not line.startswith("#")
    )
    owner = pwd.getpwuid(os.geteuid()).pw_name
    assert settings.get("user") == (None if os.geteuid() == 0 else owner)
    assert settings["listener"] == "8884 127.0.0.1"
    assert settings["require_certificate"] == settings["use_identity_as_username"] == "true"
    assert settings["use_username_as_clientid"] == "true"
    assert settings["allow_anonymous"] == "false"
    assert settings["max_packet_size"] == "1048576"
    for name in ("cafile", "certfile", "keyfile", "crlfile", "acl_file"):
        assert Path(settings[name]).is_file()


def test_the_broker_becomes_the_account_that_may_read_the_keys(config: ControllerConfig) -> None:
    text = broker.conf_text(config, Path("/acl"), Path("/data"), "garrison")
    assert "\nuser garrison\n" in text
    with pytest.raises(InvalidError, match=r"broker\.path_unusable"):
        broker.conf_text(config, Path("/a\nallow_anonymous true"), Path("/data"), "")
