"""Attacks on who is who: enrolment tokens, certificate requests, renewal, replacement, and the broker's door.

The controller is behind real TLS, the broker a real Mosquitto with exactly what ``garrison broker config mosquitto``
writes. ``door.standing`` is everything in the controller's database but its evidence.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from garrison_controller.devices import pki, requests
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.tables import Device
from garrison_protocol.messages.enrolment import RenewRequest, proof_bytes, renewal_bytes
from tests.attacks.door import Door, alive, device_ca, now, open_door
from tests.fakes.broker import MosquittoBroker
from tests.integration.controllers import wait_until
from tests.unit.devices.boards import Board, csr

pytestmark = pytest.mark.integration
ENROLL, CERTIFICATE, SESSION = "/device/v1/enroll", "/device/v1/certificate", "/device/v1/session"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("door")) as door:
        yield door


@pytest.fixture(scope="module")
def broker(door: Door) -> Iterator[MosquittoBroker]:
    with door.broker() as broker:
        yield broker


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of its own for each test."""
    return f"edge-{abs(hash(request.node.name)) % 10**12}"


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


# Strangers.


@pytest.mark.parametrize("authorization", ["", "Bearer garrison_of-no-use", "Basic eDp4"])
def test_a_strangers_body_that_fills_the_controllers_memory(door: Door, authorization: str) -> None:
    """A stranger sends 16 MiB of small JSON objects to operators' endpoints; parsed, they would take 400 MiB."""
    headers = {"content-type": "application/json"} | ({"authorization": authorization} if authorization else {})
    body = b"[" + b"{}," * 100_000 + b"{}]"
    before = door.standing()
    with door.served.board_http() as http:
        for path in ("/api/v1/rollouts", "/api/v1/enrolment/offline", ENROLL):
            assert code(http.post(path, content=body, headers=headers)) == (413, "request.too_large")
        token = {"authorization": f"Bearer {door.served.admin_token}"}
        answer = http.post("/api/v1/rollouts", content=body, headers=headers | token)
        assert answer.status_code in {403, 422}  # heard out
    assert door.standing() == before


# Tokens.


def test_guessing_an_enrolment_token(door: Door) -> None:
    """A stranger tries tokens that were never made, and one that was, with a digit changed."""
    real = door.token(name="edge-guessed")
    before = door.standing()
    for guess in (secrets.token_urlsafe(32), real[:-1] + ("A" if real[-1] != "A" else "B"), "x"):
        assert code(door.post(ENROLL, Board().enrol_request(guess))) == (403, "enrolment.token_unknown")
    assert door.standing() == before


def test_using_a_token_twice(door: Door, name: str) -> None:
    """A thief enrols with a token that its board has used already."""
    token = door.token(name=name)
    door.enrol(Board(), token)
    before = door.standing()
    assert code(door.post(ENROLL, Board().enrol_request(token))) == (403, "enrolment.token_used")
    assert door.standing() == before
    assert (f"device:{name}", "device.enrol", "enrolment.token_used") in door.refused()


def test_racing_for_a_token(door: Door, name: str) -> None:
    """Many thieves use one stolen token at the very same moment."""
    token = door.token(name=name)
    asked = [Board().enrol_request(token) for _ in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda request: door.post(ENROLL, request), asked))
    assert sorted(answer.status_code for answer in answers) == [200, *[403] * 7]


def test_more_boards_than_a_batch_has(door: Door) -> None:
    """A token for three boards is copied to ten, which all enrol at once."""
    token = door.token(prefix="batch-", uses=3)
    asked = [Board().enrol_request(token) for _ in range(10)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda request: door.post(ENROLL, request), asked))
    admitted = sorted(answer.json()["device"] for answer in answers if answer.status_code == 200)
    assert admitted == ["batch-1", "batch-2", "batch-3"]
    assert {code(answer) for answer in answers if answer.status_code != 200} == {(403, "enrolment.token_used")}


def test_a_batch_token_takes_no_name_outside_its_prefix(door: Door) -> None:
    """A board of a batch asks for another board's name, for the controller's, and for one with a wildcard."""
    door.admitted("prized")
    token = door.token(prefix="lot-", uses=5)
    for wish, given in (("prized", "lot-1"), ("controller-1", "lot-2"), ("lot-+", "lot-3"), ("lot-#", "lot-4")):
        answer = door.post(ENROLL, Board().enrol_request(token, name=wish))
        assert answer.json()["device"] == given


def test_a_token_that_was_ended(door: Door, name: str) -> None:
    """A thief uses a token that an operator has revoked, and one that a newer one replaced."""
    older = door.token(name=name)
    newer = door.token(name=name)
    tokens = door.operator.get("/api/v1/enrolment/tokens")["tokens"]
    (listed,) = [one for one in tokens if (one["state"], one["name"]) == ("open", name)]
    door.operator.delete(f"/api/v1/enrolment/tokens/{listed['id']}")
    before = door.standing()
    for token in (older, newer):
        assert code(door.post(ENROLL, Board().enrol_request(token))) == (403, "enrolment.token_revoked")
    assert door.standing() == before


def test_replaying_an_enrolment_with_another_csr(door: Door, name: str) -> None:
    """Someone who overheard an enrolment puts in a certificate request of their own."""
    token, board = door.token(name=name), Board()
    request, other = board.enrol_request(token), door.token(name=f"{name}-b")
    before = door.standing()
    stolen = request.model_copy(update={"csr_pem": csr(Board().tls)})
    assert code(door.post(ENROLL, stolen)) == (403, "enrolment.bad_proof")
    elsewhere = request.model_copy(update={"token": other})
    assert code(door.post(ENROLL, elsewhere)) == (403, "enrolment.bad_proof")
    assert door.standing() == before


def test_one_identity_under_two_names(door: Door, name: str) -> None:
    """An admitted board uses a second token to get a second name for the same key."""
    board, _ = door.admitted(name)
    token = door.token(name=f"{name}-b")
    before = door.standing()
    assert code(door.post(ENROLL, board.enrol_request(token))) == (403, "enrolment.identity_taken")
    assert door.standing() == before


# Certificate requests.


def hostile_csr(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a CSR that asks for everything: another name, a CA, a server, every host."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in ("controller-1", "edge-2")])
    alternative = x509.SubjectAlternativeName([x509.DNSName("*"), x509.UniformResourceIdentifier("garrison:device:#")])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.KeyUsage(True, True, True, True, True, True, True, False, False), critical=True)
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


def test_a_csr_that_asks_for_more(door: Door, name: str) -> None:
    """A board's certificate request names the controller and wants to be an authority and a server."""
    board = Board()
    answer = door.post(ENROLL, board.enrol_request(door.token(name=name), csr_pem=hostile_csr(board.tls)))
    renewed = door.post(CERTIFICATE, board.renew_request(name, door.nonce(), hostile_csr(board.tls)))
    for pem in (answer.json()["certificate_pem"], renewed.json()["certificate_pem"]):
        certificate = x509.load_pem_x509_certificate(pem.encode())
        names = [attribute.value for attribute in certificate.subject]
        assert names == [name]
        extension = certificate.extensions.get_extension_for_class
        assert not extension(x509.BasicConstraints).value.ca
        assert list(extension(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert not extension(x509.KeyUsage).value.key_cert_sign
        uris = extension(x509.SubjectAlternativeName).value
        assert [one.value for one in uris] == [f"garrison:device:{name}"]


def weak_csrs() -> dict[str, str]:
    weak = rsa.generate_private_key(65537, 1024)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    pem = serialization.Encoding.PEM
    other = csr(ec.generate_private_key(ec.SECP256R1()))
    return {
        "weak RSA": builder.sign(weak, hashes.SHA256()).public_bytes(pem).decode(),
        "another curve": csr(ec.generate_private_key(ec.SECP224R1())),
        "no request": "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        "nothing": "",
        "cut": other[: len(other) // 2],
    }


@pytest.mark.parametrize("kind", list(weak_csrs()))
def test_a_csr_that_proves_nothing(door: Door, kind: str) -> None:
    """A certificate request is broken, or its key is too weak or of another kind."""
    token, board = door.token(name=f"weak-{list(weak_csrs()).index(kind)}"), Board()
    before = door.standing()
    weak = weak_csrs()[kind]
    proof = board.identity.sign(proof_bytes(token, weak)).hex()
    request = board.enrol_request(token).model_copy(update={"csr_pem": weak, "proof": proof})
    assert code(door.post(ENROLL, request)) == (403, "enrolment.csr_refused")
    assert door.standing() == before
    door.enrol(board, token)  # the token was not spent on it


# Invitations and carried requests.


def test_slipping_in_under_anothers_fingerprint(door: Door, name: str) -> None:
    """A stranger asks beside an awaited board, under the same name, and hopes to be approved in its place."""
    awaited, stranger = Board(), Board()
    for board in (awaited, stranger):
        assert door.post(ENROLL, board.enrol_request(name=name)).status_code == 202
    door.operator.post(f"/api/v1/enrolment/requests/{awaited.fingerprint}/approve", {})
    assert door.post(ENROLL, stranger.enrol_request(name=name)).status_code == 202
    assert door.post(ENROLL, awaited.enrol_request()).json()["device"] == name
    with pytest.raises(Exception, match=r"device\.name_taken"):
        door.operator.post(f"/api/v1/enrolment/requests/{stranger.fingerprint}/approve", {})
    with pytest.raises(Exception, match=r"enrolment\.request_not_found"):
        door.operator.post(f"/api/v1/enrolment/requests/{stranger.fingerprint[:9]}/approve", {"name": "edge-x"})


def test_filling_the_queue_of_requests(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger fills the queue with keys of its own, so that an awaited board is dropped from it."""
    awaited = Board()
    assert door.post(ENROLL, awaited.enrol_request(name="awaited")).status_code == 202
    waiting = len(door.operator.get("/api/v1/enrolment/requests")["requests"])
    monkeypatch.setattr(requests, "MAX_PENDING", waiting + 3)
    answers = [door.post(ENROLL, Board().enrol_request()) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [202, 202, 202, 503, 503]
    assert code(answers[-1]) == (503, "enrolment.queue_full")
    assert door.post(ENROLL, awaited.enrol_request()).status_code == 202
    door.operator.post(f"/api/v1/enrolment/requests/{awaited.fingerprint}/approve", {})
    assert door.post(ENROLL, awaited.enrol_request()).json()["device"] == "awaited"


def test_a_carried_request_that_was_changed(door: Door) -> None:
    """Someone exchanges key or certificate request in a file on its way to the operator."""
    honest, thief = Board().offline_request("carried"), Board().offline_request("carried")
    before = door.standing()
    for changes in ({"identity": thief.identity}, {"csr_pem": thief.csr_pem}, {"proof": thief.proof}):
        forged = honest.model_copy(update=changes).model_dump()
        with pytest.raises(Exception, match=r"enrolment\.bad_proof"):
            door.operator.post("/api/v1/enrolment/offline", {"group": "/demo/", "request": forged})
    assert door.standing() == before


# Renewal and replacement.


def test_renewing_anothers_certificate(door: Door, name: str) -> None:
    """An admitted board, and a stranger, ask for a certificate in another board's name."""
    door.admitted(name)
    neighbour, _ = door.admitted(f"{name}-b")
    before = door.standing()
    for attacker in (neighbour, Board()):
        answer = door.post(CERTIFICATE, attacker.renew_request(name, door.nonce()))
        assert code(answer) == (403, "renewal.bad_proof")
    assert door.standing() == before


def test_replaying_a_renewal(door: Door, name: str) -> None:
    """Someone who overheard a renewal sends it again, as it was and with a certificate request of their own."""
    board, _ = door.admitted(name)
    request = board.renew_request(name, door.nonce())
    assert door.post(CERTIFICATE, request).status_code == 200
    before = door.standing()
    assert code(door.post(CERTIFICATE, request)) == (401, "session.nonce_invalid")
    mine = request.model_copy(update={"csr_pem": csr(Board().tls), "nonce": door.nonce()})
    assert code(door.post(CERTIFICATE, mine)) == (403, "renewal.bad_proof")
    invented = f"nonce.{int(now().timestamp()) + 300}.00.{'A' * 43}"
    forged = board.identity.sign(renewal_bytes(name, invented, request.csr_pem)).hex()
    again = RenewRequest(device=name, nonce=invented, csr_pem=request.csr_pem, proof=forged)
    assert code(door.post(CERTIFICATE, again)) == (401, "session.nonce_invalid")
    assert door.standing() == before


def test_a_revoked_board_renews(door: Door, name: str) -> None:
    """A stolen board that was revoked asks for a new certificate, a session, and an anchor."""
    board, _ = door.admitted(name)
    door.revoke(name)
    before = door.standing()
    assert code(door.post(CERTIFICATE, board.renew_request(name, door.nonce()))) == (403, "device.revoked")
    assert code(door.post(SESSION, board.session_request(name, door.nonce()))) == (403, "device.revoked")
    assert code(door.get("/device/v1/anchor", device=name, nonce="0" * 32)) == (403, "device.revoked")
    assert door.standing() == before
    assert (f"device:{name}", "device.renew", "device.revoked") in door.refused()


def test_renewing_after_the_grace_time(door: Door, name: str) -> None:
    """A board's disk is found years later, and its key asks for a new certificate."""
    board, _ = door.admitted(name)
    with door.served.controller.database.session() as session:
        long_ago = now() - timedelta(days=door.config.devices.grace_days, minutes=1)
        session.get_one(Device, name).cert_not_after = long_ago
    before = door.standing()
    assert code(door.post(CERTIFICATE, board.renew_request(name, door.nonce()))) == (403, "renewal.grace_over")
    assert door.standing() == before


def test_a_replaced_board_comes_back(door: Door, name: str) -> None:
    """A board that was replaced, and then is stolen, renews, opens sessions, goes on with one, and enrols anew."""
    old, _ = door.admitted(name)
    bearer = door.post(SESSION, old.session_request(name, door.nonce())).json()["token"]
    door.enrol(Board(), door.rotation(name))
    token = door.token(name=f"{name}-b")
    before = door.standing()
    assert code(door.post(CERTIFICATE, old.renew_request(name, door.nonce()))) == (403, "renewal.bad_proof")
    assert code(door.post(SESSION, old.session_request(name, door.nonce()))) == (403, "session.bad_proof")
    with door.served.board_http(bearer) as http:
        assert code(http.get(f"/device/v1/blobs/{'0' * 64}")) == (401, "session.expired")
    assert code(door.post(ENROLL, old.enrol_request(token))) == (403, "enrolment.identity_retired")
    assert door.standing() == before


def test_taking_over_a_name_without_leave(door: Door, name: str) -> None:
    """A scoped device-admin lets a board of its own take over the name of a board elsewhere."""
    door.admitted(name)
    with door.served.principal(f"eve-{name}", "device-admin", scope="/eu/") as eve:
        before = door.standing()
        with pytest.raises(Exception, match=r"access\.denied"):
            eve.post(f"/api/v1/devices/{name}/rotate", {})
        with pytest.raises(Exception, match=r"access\.denied"):
            eve.post("/api/v1/enrolment/tokens", {"name": f"{name}-c", "group": "/demo/"})
        assert door.standing() == before


# The broker's door.


@pytest.mark.usefixtures("broker")
def test_connecting_without_a_certificate(door: Door) -> None:
    """A stranger connects to the broker with no certificate at all."""
    assert door.refuses(None, Board().tls, "edge-1")


@pytest.mark.usefixtures("broker")
@pytest.mark.parametrize("issuer", ["self-made", "server CA", "a board"])
def test_connecting_with_a_foreign_certificate(door: Door, name: str, issuer: str) -> None:
    """A stranger's certificate has a board's name, but is its own, of the server CA, or signed by a board's key."""
    board, certificate = door.admitted(name)
    assert not door.refuses(certificate, board.tls, name)
    key = ec.generate_private_key(ec.SECP256R1())
    match issuer:
        case "self-made":
            authority = Authority.create("Garrison device CA", now())
        case "server CA":
            authority = pki.load_authority(door.config, pki.SERVER_CA)
        case _:
            authority = Authority(board.tls, x509.load_pem_x509_certificate(certificate.encode()))
    forged = authority.issue_client(name, key.public_key(), 30, now()).pem
    assert door.refuses(forged, key, name)
    assert door.refuses(forged + certificate, key, name)


@pytest.mark.usefixtures("broker")
def test_connecting_with_an_expired_certificate(door: Door, name: str) -> None:
    """A board connects with a certificate of its own that has ended."""
    board, _ = door.admitted(name)
    ended = device_ca(door).issue_client(name, board.tls.public_key(), 30, now() - timedelta(days=31)).pem
    assert door.refuses(ended, board.tls, name)


@pytest.mark.usefixtures("broker")
def test_connecting_with_a_server_certificate(door: Door) -> None:
    """Someone who got at the broker's own key and certificate connects with them as a client."""
    certificate = (door.config.pki_dir / "server.pem").read_text()
    key = serialization.load_pem_private_key((door.config.pki_dir / "server.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert door.refuses(certificate, key, "controller-1")


def test_a_revoked_certificate_at_the_broker(door: Door, name: str, broker: MosquittoBroker) -> None:
    """A revoked board connects again, with its first certificate and with one that it had renewed."""
    board, first = door.admitted(name)
    first_key = board.tls
    renewed = door.post(CERTIFICATE, board.renew_request(name, door.nonce())).json()["certificate_pem"]
    assert not door.refuses(first, first_key, name)
    assert not door.refuses(renewed, board.tls, name)
    door.revoke(name)
    broker.reload()
    wait_until(lambda: door.refuses(first, first_key, name), "the broker to read the list")
    assert door.refuses(renewed, board.tls, name)


def test_a_replaced_board_at_the_broker(door: Door, name: str, broker: MosquittoBroker) -> None:
    """A board that was replaced keeps its connection and tries to push the new one off the broker."""
    old, old_certificate = door.admitted(name)
    held = door.knock(old_certificate, old.tls, name)
    assert held is not None
    new = Board()
    new_certificate = door.enrol(new, door.rotation(name))
    broker.reload()
    wait_until(lambda: door.refuses(old_certificate, old.tls, name), "the broker to read the list")
    connection = door.knock(new_certificate, new.tls, name)
    assert connection is not None
    assert not alive(held)  # the new board took its place
    assert door.refuses(old_certificate, old.tls, name)
    assert alive(connection)
    for one in (held, connection):
        one.close()


@pytest.mark.usefixtures("broker")
def test_taking_anothers_client_id(door: Door, name: str) -> None:
    """A board connects under another's client id, to end that one's connection and to take its queue."""
    board, certificate = door.admitted(name)
    attacker, its_certificate = door.admitted(f"{name}-b")
    victim = door.knock(certificate, board.tls, name)
    assert victim is not None
    intruder = door.knock(its_certificate, attacker.tls, name)
    assert intruder is not None
    assert alive(victim)
    assert alive(intruder)  # as itself
    victim.close()
    intruder.close()
