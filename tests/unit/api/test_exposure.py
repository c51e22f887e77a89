"""The agent's configuration refuses a local API that other machines could reach unprotected."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from garrison_agent.api.tls_server import server_context
from garrison_agent.config import AgentConfig, load_config
from garrison_protocol.errors import InvalidError, RefusedError
from tests.fakes.pki import Authority

TLS = 'tls_certificate = "/c.pem"\ntls_key = "/k.pem"\n'


def load(folder: Path, api: str) -> AgentConfig:
    path = folder / "agent.toml"
    path.write_text(f"[api]\n{api}")
    return load_config(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_nothing(tmp_path: Path, host: str) -> None:
    assert load(tmp_path, f'host = "{host}"\n').api.tls is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "board.example", ""])
@pytest.mark.parametrize(
    ("rest", "names"),
    [
        ("", ["api.tcp", "api.tls_certificate"]),
        ('tcp = "keys"\n', ["api.tls_certificate and api.tls_key"]),
        (TLS, ['api.tcp = "keys"']),
    ],
)
def test_beyond_loopback_needs_keys_and_tls(tmp_path: Path, host: str, rest: str, names: list[str]) -> None:
    with pytest.raises(InvalidError) as caught:
        load(tmp_path, f'host = "{host}"\n{rest}')
    assert caught.value.code == "config.invalid"
    assert host in caught.value.message
    for name in names:
        assert name in caught.value.message


def test_with_both_it_is_allowed_and_without_tcp_the_host_means_nothing(tmp_path: Path) -> None:
    config = load(tmp_path, f'host = "0.0.0.0"\ntcp = "keys"\nnames = ["board.example"]\n{TLS}')
    assert config.api.tls == (Path("/c.pem"), Path("/k.pem"))
    assert load(tmp_path, 'host = "0.0.0.0"\ntcp = "off"\n').api.tcp == "off"


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="belong together"):
        load(tmp_path, 'tls_key = "/k.pem"\n')


def test_what_cannot_be_served_with(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    one, other = authority.issue("127.0.0.1", server=True), authority.issue("10.0.0.1", server=True)
    assert server_context(one.cert, one.key).minimum_version is ssl.TLSVersion.TLSv1_2
    for certificate, key in ((one.cert, other.key), (one.key, one.cert), (tmp_path / "none.pem", one.key)):
        key.chmod(0o600)
        with pytest.raises(InvalidError, match=r"api\.tls_unusable"):
            server_context(certificate, key)
    one.key.chmod(0o640)
    with pytest.raises(RefusedError, match=r"key\.readable_by_others"):
        server_context(one.cert, one.key)
