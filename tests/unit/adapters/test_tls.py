"""Servers whose certificates are valid at other times than the system's clock shows."""

from __future__ import annotations

import gc
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from garrison_agent.adapters.device_http import exchange
from garrison_agent.tls import JudgedSocket, PinnedContext, pinned_context
from garrison_protocol.errors import UnavailableError
from garrison_protocol.messages.enrolment import NonceResponse
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import Authority, FleetPki

SOON = datetime.now(UTC) + timedelta(days=4 * 365)
"""The real time, seen from a board whose clock lies four years back."""
DAY = timedelta(days=1)


def at(moment: datetime) -> Callable[[], datetime]:
    return lambda: moment


def ask(api: DeviceApi, ca: Path, moment: datetime) -> str:
    return exchange(api.url, pinned_context(ca, at(moment)), "/device/v1/nonce", NonceResponse).nonce


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    pki = FleetPki(tmp_path / "pki")
    pki.server_ca = Authority(tmp_path / "later", "server-ca", begin=SOON - DAY)
    return pki


@pytest.fixture
def later(pki: FleetPki) -> Iterator[DeviceApi]:
    """A server whose certificate the system's clock takes for one of the future."""
    with DeviceApi(pki, server=pki.server_ca.issue("server", server=True, begin=SOON - DAY)) as api:
        yield api


def test_a_clock_that_is_years_behind_does_not_matter(later: DeviceApi, pki: FleetPki) -> None:
    assert ask(later, pki.server_ca.pem, SOON) == "nonce-1"


def test_openssl_alone_would_have_refused(later: DeviceApi, pki: FleetPki) -> None:
    context = ssl.create_default_context(cafile=str(pki.server_ca.pem))
    with pytest.raises(UnavailableError, match="not yet valid"):
        exchange(later.url, context, "/device/v1/nonce", NonceResponse)


def test_a_floor_older_than_the_fleet_does_not_matter_either(later: DeviceApi, pki: FleetPki) -> None:
    assert ask(later, pki.server_ca.pem, SOON - timedelta(days=900))


def test_after_its_end_nothing_is_sent(later: DeviceApi, pki: FleetPki) -> None:
    with pytest.raises(UnavailableError, match="the server's certificate expired on"):
        ask(later, pki.server_ca.pem, SOON + 30 * DAY)
    assert later.requests == []


def test_an_expired_certificate_is_refused_by_a_right_clock(tmp_path: Path) -> None:
    pki = FleetPki(tmp_path)
    with (
        DeviceApi(pki, server=pki.server_ca.issue("old", server=True, days=-1)) as api,
        pytest.raises(UnavailableError, match="the server's certificate expired on"),
    ):
        ask(api, pki.server_ca.pem, datetime.now(UTC))


def test_an_expired_ca_is_refused_though_its_server_is_not(tmp_path: Path) -> None:
    pki = FleetPki(tmp_path)
    pki.server_ca = Authority(tmp_path / "old", "server-ca", begin=datetime.now(UTC) - timedelta(days=4000))
    with (
        DeviceApi(pki, server=pki.server_ca.issue("server", server=True)) as api,
        pytest.raises(UnavailableError, match="the pinned server CA expired on"),
    ):
        ask(api, pki.server_ca.pem, datetime.now(UTC))


def test_one_of_two_pinned_cas_is_enough(later: DeviceApi, pki: FleetPki, tmp_path: Path) -> None:
    old = Authority(tmp_path / "old", "server-ca", begin=SOON - timedelta(days=4000))
    both = tmp_path / "both.pem"
    both.write_bytes(old.pem.read_bytes() + pki.server_ca.pem.read_bytes())
    assert ask(later, both, SOON)


def test_names_and_chains_are_still_openssls(later: DeviceApi, pki: FleetPki, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(later, pki.device_ca.pem, SOON)
    context = pinned_context(pki.server_ca.pem, at(SOON))
    host, port = later.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"),
    ):
        context.wrap_socket(plain, server_hostname="elsewhere.example")


def test_a_failed_handshake_leaves_no_socket_behind(later: DeviceApi, pki: FleetPki) -> None:
    context = pinned_context(pki.server_ca.pem, at(SOON + 90 * DAY))
    host, port = later.url.removeprefix("https://").split(":")
    plain = socket.create_connection((host, int(port)))
    wrapped = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    assert isinstance(wrapped, JudgedSocket)
    with pytest.raises(ssl.SSLCertVerificationError):
        wrapped.do_handshake()
    assert wrapped.fileno() == -1
    del wrapped, plain
    gc.collect()  # warnings are errors


def test_a_peer_without_a_certificate_is_refused(pki: FleetPki) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="no certificate"):
        pinned_context(pki.server_ca.pem, at(SOON)).judge({})


def test_the_settings_are_no_weaker_than_the_systems(pki: FleetPki) -> None:
    ours = pinned_context(pki.server_ca.pem, at(SOON))
    assert isinstance(ours, PinnedContext)
    assert (ours.check_hostname, ours.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert ours.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert len(ours.get_ca_certs()) == 1
