"""Attacks on who a board is and whom it believes to be its fleet: in TLS, at enrolment, and at the renewal."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_agent.adapters import enrolment
from garrison_agent.adapters.mqtt import MqttLink
from garrison_agent.adapters.offline_enrolment import accept, make_request
from garrison_agent.adapters.renewal import HttpCarrier, MqttCarrier, Renewal
from garrison_agent.identity import Folders, Identity
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, RefusedError, UnavailableError
from garrison_protocol.messages.enrolment import RenewRequest
from garrison_protocol.messages.fetch import FetchKind
from tests.attacks import standing
from tests.fakes.broker import MosquittoBroker, tls_config
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import Authority, FleetPki, Issued
from tests.integration.test_mqtt_link import until
from tests.unit.adapters.test_enrolment_forms import ROOT, respond
from tests.unit.loop.rig import Rig

DAY = timedelta(days=1)


def now() -> datetime:
    return datetime.now(UTC)


enrol = partial(enrolment.enrol, judge_at=now)


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return FleetPki(tmp_path / "pki")


@pytest.fixture
def api(pki: FleetPki) -> Iterator[DeviceApi]:
    """The board's own controller."""
    with DeviceApi(pki) as api:
        yield api


@pytest.fixture
def identity(api: DeviceApi, tmp_path: Path) -> Identity:
    """An enrolled board."""
    return enrol(tmp_path / "board", api.line())


@contextmanager
def refused(folder: Path, code: str, *without: str) -> Iterator[None]:
    """Expect that the block is refused with ``code``, and that no file below ``folder`` changes."""
    before = standing.files(folder, *without)
    with pytest.raises(GarrisonError) as caught:
        yield
    assert caught.value.code == code
    assert standing.files(folder, *without) == before


def over_https(identity: Identity, url: str, judge_at: Callable[[], datetime] = now) -> Renewal:
    return Renewal(identity, [HttpCarrier(url, lambda: identity.server_context(judge_at))], str)


def failing_links_reason(identity: Identity, port: int, judge_at: Callable[[], datetime] = now) -> str:
    """Return why a board's link cannot connect to a broker, after three tries without anything sent."""
    tries: list[int] = []

    def will() -> bytes:
        tries.append(1)
        return b"will"

    link = MqttLink(
        address=lambda: ("127.0.0.1", port),
        device=identity.device,
        tls=lambda: identity.mqtt_context(judge_at),
        protocol="5",
        keepalive_s=30,
        reconnect_max_s=0.1,
        will=will,
        on_connected=lambda: pytest.fail("it connected"),
        on_disconnected=lambda _: None,
        on_message=lambda *_: pytest.fail("it took a message"),
    )
    link.start()
    until(lambda: len(tries) >= 3)
    link.stop()
    return link.last_error or ""


# --- whoever answers in place of controller and broker ---------------------------------------------------------------


def old(pki: FleetPki) -> Issued:
    return pki.server_ca.issue("old", server=True, days=-1)


def foreign(pki: FleetPki) -> Issued:
    return Authority(pki.server_ca.folder / "foreign", "server-ca").issue("server", server=True)


def boards(pki: FleetPki) -> Issued:
    return pki.device_ca.issue("edge-2", server=True)


def wrongly_named(pki: FleetPki) -> Issued:
    return pki.server_ca.issue("edge-2")


SERVERS = pytest.mark.parametrize(
    ("show", "reason"),
    [
        pytest.param(old, "the server's certificate expired on", id="expired"),
        pytest.param(foreign, "CERTIFICATE_VERIFY_FAILED", id="foreign CA"),
        pytest.param(boards, "CERTIFICATE_VERIFY_FAILED", id="a board's CA"),
        pytest.param(wrongly_named, "CERTIFICATE_VERIFY_FAILED", id="no server's"),
    ],
)


@SERVERS
def test_false_controller(identity: Identity, pki: FleetPki, show: Callable[[FleetPki], Issued], reason: str) -> None:
    """A stolen, expired key, a foreign CA, or another board plays the controller to a board."""
    with DeviceApi(pki, server=show(pki)) as impostor:
        with refused(identity.state_dir, "controller.unreachable"):
            over_https(identity, impostor.url).renew()
        source = HttpSource(HttpsOpener(impostor.url, identity.server_ca_path))
        with pytest.raises(UnavailableError, match=reason):
            source.metadata("timestamp.json", 1000)
        assert impostor.requests == []  # it was told nothing, not even what the board wants


@pytest.mark.integration
@SERVERS
def test_false_broker(
    identity: Identity, pki: FleetPki, tmp_path: Path, show: Callable[[FleetPki], Issued], reason: str
) -> None:
    """A stolen, expired key, a foreign CA, or another board plays the broker to a board."""
    pki.server = show(pki)
    folder = tmp_path / "broker"
    with MosquittoBroker(folder, tls_config(pki, folder)) as broker:
        assert reason in failing_links_reason(identity, broker.port)
    assert identity.device not in broker.log.read_text(errors="replace")  # it never learned who knocked


def test_clock_set_back_to_revive_an_expired_server(identity: Identity, pki: FleetPki, tmp_path: Path) -> None:
    """An NTP server or a dead battery sets the board's clock back into the life of a stolen, expired server key."""
    pki.server_ca = Authority(tmp_path / "old", "server-ca", begin=now() - 90 * DAY)
    ended = pki.server_ca.issue("ended", server=True, begin=now() - 60 * DAY)
    identity.server_ca_path.write_bytes(pki.server_ca.pem.read_bytes())
    floor, clock = now(), now() - 45 * DAY
    with DeviceApi(pki, server=ended) as impostor:
        with pytest.raises(RefusedError):
            over_https(identity, impostor.url, lambda: clock).renew()
        assert impostor.requests  # a board that believed its clock would talk to it
        impostor.requests.clear()
        with refused(identity.state_dir, "controller.unreachable"):
            over_https(identity, impostor.url, lambda: max(floor, clock)).renew()
        assert impostor.requests == []


# --- at the renewal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param({"issue_for": "edge-2"}, id="another board's"),
        pytest.param({"issue_for_other_key": True}, id="another key's"),
        pytest.param({"issue_for": "controller-1"}, id="the controller's"),
    ],
)
def test_renewal_answered_with_a_foreign_certificate(
    api: DeviceApi, identity: Identity, attack: dict[str, object]
) -> None:
    """A renewal is answered with another board's certificate, the controller's, or one for another key."""
    for name, value in attack.items():
        setattr(api, name, value)
    with refused(identity.state_dir, "renewal.wrong_certificate"):
        over_https(identity, api.url).renew()
    identity.mqtt_context(now)


def test_renewal_forged_by_the_broker(identity: Identity, pki: FleetPki, tmp_path: Path) -> None:
    """The broker sees the request for a renewal and answers it from a CA of its own, with a broker of its own."""
    mallory = Authority(tmp_path / "mallory", "device-ca")

    asked: list[FetchKind] = []

    def ask(kind: FetchKind, name: str, body: str) -> bytes:
        asked.append(kind)
        if kind is FetchKind.NONCE:
            return json.dumps({"nonce": "n", "time": 0}).encode()
        public_key = x509.load_pem_x509_csr(RenewRequest.model_validate_json(body).csr_pem.encode()).public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        certificate = mallory.sign(identity.device, public_key)  # the right name and the right key
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        return json.dumps({"certificate_pem": pem, "mqtt_host": "mallory.example", "mqtt_port": 1}).encode()

    with refused(identity.state_dir, "renewal.wrong_certificate"):
        Renewal(identity, [MqttCarrier(ask)], pki.device_ca.pem.read_text).renew()
    with refused(identity.state_dir, "renewal.unverifiable"):  # a board without fleet.json does not even ask
        asked.clear()
        Renewal(identity, [MqttCarrier(ask)], str).renew()
    assert asked == []
    assert identity.broker() == ("127.0.0.1", 8883)


@pytest.mark.parametrize("damage", [("a003020102", "a003020126"), ("06072a8648ce3d0201", "06072a8648ce3d0209")])
def test_renewal_answered_with_a_certificate_of_an_unknown_kind(
    identity: Identity, pki: FleetPki, damage: tuple[str, str]
) -> None:
    """The broker answers a renewal with a certificate of a version, or a kind of key, that no library knows."""
    der = pki.issue(identity.device).certificate.public_bytes(serialization.Encoding.DER)
    before, after = map(bytes.fromhex, damage)
    text = base64.encodebytes(der.replace(before, after)).decode()
    pem = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"

    def ask(kind: FetchKind, name: str, body: str) -> bytes:
        nonce, answer = {"nonce": "n", "time": 0}, {"certificate_pem": pem, "mqtt_host": "x", "mqtt_port": 1}
        return json.dumps(nonce if kind is FetchKind.NONCE else answer).encode()

    with refused(identity.state_dir, "renewal.wrong_certificate"):
        Renewal(identity, [MqttCarrier(ask)], pki.device_ca.pem.read_text).renew()


def test_renewal_refused_for_ever_is_recorded(tmp_path: Path) -> None:
    """Whoever controls the controller refuses renewals, so that the board drops out of the fleet unnoticed."""
    rig = Rig(tmp_path / "rig")
    rig.renew.error = RefusedError("renewal.wrong_certificate", "for another key")
    rig.clock.forward(25 * 86400)
    rig.restart()
    rig.forward(3600)
    assert rig.renew.tries >= 1
    assert [facts["code"] for facts in rig.headers("certificate.refused")] == ["renewal.wrong_certificate"]
    assert rig.parts.certificate.check()["outcome"] == "warn"
    assert rig.link.reconnects == 0
    rig.database.close()


# --- at enrolment ----------------------------------------------------------------------------------------------------


def test_enrolment_answered_by_a_wrong_controller(api: DeviceApi, tmp_path: Path) -> None:
    """Somebody answers at the controller's address, with a CA of their own, or with a copy of the right one."""
    state = tmp_path / "new"
    with DeviceApi(FleetPki(tmp_path / "impostor")) as impostor:
        with pytest.raises(RefusedError) as caught:
            enrol(state, api.line(url=impostor.url))
        assert caught.value.code == "enrolment.wrong_server_ca"
        impostor.server_ca = api.server_ca  # it is public
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            enrol(state, api.line(url=impostor.url))
        assert not any("enroll" in line for line in impostor.requests)  # the token was not given away
    assert not Folders(state).identity.exists()
    assert enrol(state, api.line()).device == "edge-1"


def test_enrolment_with_another_fleets_root(api: DeviceApi, tmp_path: Path) -> None:
    """The controller, or who holds its server key, shows a new board a TUF root that the operator does not know."""
    state = tmp_path / "new"
    api.root = b'{"signed": {"_type": "root", "version": 1}, "evil": true}'
    with pytest.raises(RefusedError) as caught:
        enrol(state, api.line(root_sha256=sha256_hex(ROOT)))
    assert caught.value.code == "enrolment.wrong_root"
    assert api.used == {}
    assert not Folders(state).root.exists()


def test_enrolment_with_a_certificate_for_another_key(api: DeviceApi, tmp_path: Path) -> None:
    """The answer to an enrolment holds a certificate whose key somebody else has."""
    state = tmp_path / "new"
    api.issue_for_other_key = True
    with pytest.raises(RefusedError) as caught:
        enrol(state, api.line())
    assert caught.value.code == "enrolment.wrong_certificate"
    assert not Folders(state).record.exists()


def test_invitation_that_carries_a_board_into_another_fleet(api: DeviceApi, identity: Identity, tmp_path: Path) -> None:
    """An enrolled board is handed the line of another fleet."""
    with DeviceApi(FleetPki(tmp_path / "other")) as other:
        for line in (other.line("a-one-time-token-2"), other.line("")):
            with refused(identity.state_dir, "enrolment.already_enrolled"):
                enrol(identity.state_dir, line)
        assert other.requests == []


def test_offline_response_exchanged_on_the_way(pki: FleetPki, tmp_path: Path) -> None:
    """Whoever carries the stick puts in the response of another fleet, or of another board."""
    state, other = tmp_path / "new", tmp_path / "other"
    request = make_request(state)
    for data, code in (
        (respond(FleetPki(tmp_path / "mallory"), request, root='{"evil": 1}'), "enrolment.wrong_root"),
        (respond(pki, make_request(other)), "enrolment.wrong_certificate"),
    ):
        with refused(state, code, "registry"):  # what is pinned counts only once there is a record
            accept(state, data, sha256_hex(ROOT))
    assert not Folders(state).record.exists()
    assert accept(state, respond(pki, request), sha256_hex(ROOT)).device == "edge-5"


# --- on the board ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["identity.key", "tls.pem"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_private_keys_that_others_may_read(identity: Identity, name: str, mode: int) -> None:
    """Private keys of a board are readable, or even writable, for other users."""
    (identity.folders.identity / name).chmod(mode)
    with refused(identity.state_dir, "key.readable_by_others"):
        Identity.load(identity.state_dir)


def test_pair_opened_to_others_while_the_agent_runs(identity: Identity) -> None:
    """Somebody makes the TLS key readable after the agent has started; the next connection refuses it."""
    identity.folders.tls_pair.chmod(0o644)
    with refused(identity.state_dir, "key.readable_by_others"):
        identity.mqtt_context(now)


@pytest.mark.integration
def test_copied_certificate_without_its_key(identity: Identity, pki: FleetPki, tmp_path: Path) -> None:
    """A board's certificate, which is public, is put beside another key to connect as that board."""
    victim = pki.issue("edge-2").cert.read_bytes()
    stolen = tmp_path / "thief"
    shutil.copytree(identity.state_dir, stolen)
    pair = Folders(stolen).tls_pair
    pair.write_bytes(victim + b"-----BEGIN PRIVATE" + pair.read_bytes().split(b"-----BEGIN PRIVATE")[1])
    thief = Identity.load(stolen)
    with pytest.raises(GarrisonError) as caught:
        thief.mqtt_context(now)
    assert caught.value.code == "identity.damaged"
    assert over_https(thief, thief.url).read() is None
