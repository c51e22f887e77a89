from __future__ import annotations

import ssl
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from garrison_agent.adapters import enrolment
from garrison_agent.adapters.device_http import call
from garrison_agent.adapters.renewal import Carrier, HttpCarrier, MqttCarrier, Renewal
from garrison_agent.identity import Folders, Identity, tidy
from garrison_protocol.errors import GarrisonError, RefusedError, UnavailableError
from garrison_protocol.messages.enrolment import RenewRequest
from garrison_protocol.messages.fetch import FetchKind
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki


def now() -> datetime:
    return datetime.now(UTC)


enrol = partial(enrolment.enrol, judge_at=now)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[DeviceApi]:
    with DeviceApi(FleetPki(tmp_path / "pki")) as api:
        yield api


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def identity(api: DeviceApi, state: Path) -> Identity:
    return enrol(state, api.line())


def over_http(identity: Identity) -> HttpCarrier:
    return HttpCarrier(identity.url, lambda: identity.server_context(now))


def renewing(identity: Identity, *carriers: Carrier, device_cas: str = "(some)") -> Renewal:
    return Renewal(identity, carriers, lambda: device_cas)


class Broker:
    """What the client of fetches would ask over the broker, asked of the fake controller directly."""

    def __init__(self, identity: Identity, *, connected: bool = True) -> None:
        self.identity = identity
        self.connected = connected
        self.asked: list[FetchKind] = []

    def ask(self, kind: FetchKind, name: str, body: str) -> bytes:
        if not self.connected:
            raise UnavailableError("source.offline", "no connection", retryable=True)
        self.asked.append(kind)
        context = self.identity.server_context(now)
        if kind is FetchKind.NONCE:
            return call(self.identity.url, context, "/device/v1/nonce")[1]
        request = RenewRequest.model_validate_json(body)
        return call(self.identity.url, context, "/device/v1/certificate", request)[1]


def test_a_renewal_brings_a_new_key_that_fits_and_keeps_the_identity(api: DeviceApi, identity: Identity) -> None:
    pair = identity.folders.tls_pair
    before = pair.read_bytes()
    renewal = renewing(identity, over_http(identity))
    known = renewal.read()
    assert known is not None
    renewal.renew()
    after = pair.read_bytes()
    assert before.split(b"-----BEGIN PRIVATE")[1] != after.split(b"-----BEGIN PRIVATE")[1]
    fresh = renewal.read()
    assert fresh is not None
    assert fresh[0] != known[0]
    assert stat.S_IMODE(pair.stat().st_mode) == 0o600
    assert Identity.load(identity.state_dir).signing_key.public_hex == api.identities["edge-1"]
    identity.mqtt_context(now)


def test_months_after_its_end_a_certificate_is_still_renewed(api: DeviceApi, state: Path) -> None:
    api.days = -200
    identity = enrol(state, api.line())
    renewal = renewing(identity, over_http(identity))
    old = renewal.read()
    assert old is not None
    assert old[1].ended(now().timestamp())
    api.days = 30
    renewal.renew()
    new = renewal.read()
    assert new is not None
    assert not new[1].ended(now().timestamp())


def test_the_broker_may_have_moved(api: DeviceApi, identity: Identity) -> None:
    api.broker = ("new-broker.example", 8884)
    renewing(identity, over_http(identity)).renew()
    assert identity.broker() == ("new-broker.example", 8884)
    assert Identity.load(identity.state_dir).mqtt_host == "new-broker.example"


def test_over_the_broker_where_https_does_not_get_through(api: DeviceApi, identity: Identity) -> None:
    broker = Broker(identity)
    api.broker = ("elsewhere.example", 1)
    cas = api.pki.server_ca.pem.read_text() + api.pki.device_ca.pem.read_text()  # one is new, one on its way out
    closed = HttpCarrier("https://127.0.0.1:1", lambda: identity.server_context(now))
    before = identity.folders.tls_pair.read_bytes()
    renewing(identity, closed, MqttCarrier(broker.ask), device_cas=cas).renew()
    assert broker.asked == [FetchKind.NONCE, FetchKind.CERTIFICATE]
    assert identity.folders.tls_pair.read_bytes() != before
    assert identity.broker() == ("127.0.0.1", 8883)  # a broker's word on where the broker is does not count


def test_a_refusal_over_the_broker_is_not_final(identity: Identity) -> None:
    def ask(kind: FetchKind, name: str, body: str) -> bytes:
        raise RefusedError("device.revoked", "says the broker", retryable=True)

    before = identity.folders.tls_pair.read_bytes()
    renewing(identity, MqttCarrier(ask), over_http(identity)).renew()
    assert identity.folders.tls_pair.read_bytes() != before


def test_https_is_asked_first_and_its_refusal_is_final(api: DeviceApi, identity: Identity) -> None:
    broker = Broker(identity)
    renewal = renewing(identity, over_http(identity), MqttCarrier(broker.ask))
    renewal.renew()
    api.refusal = (403, "renewal.grace_over")
    with pytest.raises(RefusedError, match=r"renewal\.grace_over"):
        renewal.renew()
    assert broker.asked == []


def test_without_any_way_it_is_https_that_is_blamed(identity: Identity) -> None:
    closed = HttpCarrier("https://127.0.0.1:1", lambda: identity.server_context(now))
    before = identity.folders.tls_pair.read_bytes()
    with pytest.raises(UnavailableError, match=r"controller\.unreachable"):
        renewing(identity, closed, MqttCarrier(Broker(identity, connected=False).ask)).renew()
    assert identity.folders.tls_pair.read_bytes() == before


def test_nonsense_over_the_broker_is_no_answer(identity: Identity) -> None:
    def ask(kind: FetchKind, name: str, body: str) -> bytes:
        return b"<html>"

    with pytest.raises(GarrisonError, match=r"controller\.bad_answer"):
        renewing(identity, MqttCarrier(ask)).renew()


@pytest.mark.parametrize(
    "damage",
    [
        lambda pair: pair.unlink(),
        lambda pair: pair.write_text("nonsense"),
        lambda pair: pair.write_bytes(pair.read_bytes().split(b"-----BEGIN PRIVATE")[0]),
        lambda pair: pair.write_bytes(b"\0" * pair.stat().st_size),
    ],
)
def test_a_damaged_pair_is_none_and_a_renewal_heals_it(identity: Identity, damage: Callable[[Path], None]) -> None:
    damage(identity.folders.tls_pair)
    renewal = renewing(Identity.load(identity.state_dir), over_http(identity))
    assert renewal.read() is None
    with pytest.raises(GarrisonError, match=r"identity\.damaged"):
        identity.mqtt_context(now)
    renewal.renew()
    assert renewal.read() is not None
    identity.mqtt_context(now)


def test_a_key_that_does_not_fit_is_no_pair(identity: Identity, tmp_path: Path) -> None:
    other = FleetPki(tmp_path / "other").issue("edge-1")
    certificate = identity.folders.tls_pair.read_bytes().split(b"-----BEGIN PRIVATE")[0]
    identity.folders.tls_pair.write_bytes(certificate + other.key.read_bytes())
    assert renewing(identity).read() is None
    with pytest.raises(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(identity.folders.tls_pair)


def test_a_note_that_heads_another_certificate_is_not_believed(identity: Identity) -> None:
    renewal, pair = renewing(identity, over_http(identity)), identity.folders.tls_pair
    renewal.renew()
    note, _, first = pair.read_bytes().partition(b"\n")
    known = renewal.read()
    assert known is not None
    pair.write_bytes(note.replace(known[0].encode(), b"ab" * 32) + b"\n" + first)
    assert renewal.read() == known


def test_what_a_cut_off_write_left_is_removed(identity: Identity) -> None:
    folders = Folders(identity.state_dir)
    (folders.identity / ".tls.pem.abc.tmp").write_bytes(b"a private key")
    folders.tls_key.write_bytes(b"another")
    tidy(identity.state_dir)
    assert {path.name for path in folders.identity.iterdir()} == {"identity.key", "tls.pem", "device.json"}
