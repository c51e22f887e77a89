from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from sqlalchemy import select
from sqlalchemy.orm import Session

from garrison_controller.access import queries as access
from garrison_controller.db.base import Database
from garrison_controller.devices import queries, service
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.filter import parse_filter
from garrison_controller.devices.service import Admitted
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import Device, EnrolmentToken
from garrison_protocol.errors import ConflictError, InvalidError, RefusedError
from garrison_protocol.messages.enrolment import EnrolRequest
from tests.unit.devices.boards import Board

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("Garrison device CA", NOW)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.create_all()
    yield database
    database.close()


def new_token(session: Session, name: str = "edge-1", group: str = "/demo/", hours: int = 24) -> str:
    _, secret = service.create_token(session, "alice", name, group=group, labels={"site": "x"}, hours=hours, now=NOW)
    return secret


def enrol(session: Session, authority: Authority, request: EnrolRequest, now: datetime = NOW) -> Admitted:
    return service.enrol(session, request, authority, days=30, now=now)


def test_a_token_admits_one_board_under_its_name(database: Database, authority: Authority) -> None:
    board = Board()
    with database.session() as session:
        secret = new_token(session)
        admitted = enrol(session, authority, board.enrol_request(secret))
    assert admitted.device == "edge-1"
    certificate = x509.load_pem_x509_certificate(admitted.certificate_pem.encode())
    with database.reading() as session:
        device = queries.get(session, "edge-1")
        assert (device.group, device.labels, device.state) == ("/demo/", {"site": "x"}, "enrolled")
        assert device.identity_public == board.identity.public_hex
        assert device.cert_serial == f"{certificate.serial_number:x}"
        assert device.cert_not_after == certificate.not_valid_after_utc
        events = [(event.principal, event.action) for event in access.events(session)]
        assert events == [("alice", "device.token.create"), ("device:edge-1", "device.enrol")]


def test_only_the_hash_of_a_token_is_stored(database: Database) -> None:
    with database.session() as session:
        secret = new_token(session)
    with database.reading() as session:
        assert secret not in repr(vars(session.scalars(select(EnrolmentToken)).one()))


def test_a_used_token_is_refused_to_another_key(database: Database, authority: Authority) -> None:
    with database.session() as session:
        secret = new_token(session)
        enrol(session, authority, Board().enrol_request(secret))
        with pytest.raises(RefusedError, match=r"enrolment\.token_used") as caught:
            enrol(session, authority, Board().enrol_request(secret))
    assert caught.value.fields["device"] == "edge-1"


def test_a_lost_answer_can_be_asked_for_again_for_an_hour(database: Database, authority: Authority) -> None:
    board = Board()
    with database.session() as session:
        secret = new_token(session)
        first = enrol(session, authority, board.enrol_request(secret))
        again = enrol(session, authority, board.enrol_request(secret), NOW + timedelta(minutes=59))
        assert again.device == first.device
        assert again.certificate_pem != first.certificate_pem
        with pytest.raises(RefusedError, match=r"enrolment\.token_used"):
            enrol(session, authority, board.enrol_request(secret), NOW + timedelta(minutes=61))


def test_a_revoked_board_gets_nothing_from_its_old_token(database: Database, authority: Authority) -> None:
    board = Board()
    with database.session() as session:
        secret = new_token(session)
        enrol(session, authority, board.enrol_request(secret))
        service.revoke(session, "alice", "edge-1", "stolen", NOW)
        with pytest.raises(RefusedError, match=r"enrolment\.token_used"):
            enrol(session, authority, board.enrol_request(secret), NOW + timedelta(minutes=1))


def test_expired_unknown_and_unproven_requests_are_refused(database: Database, authority: Authority) -> None:
    board = Board()
    with database.session() as session:
        secret = new_token(session, hours=1)
        with pytest.raises(RefusedError, match=r"enrolment\.token_expired"):
            enrol(session, authority, board.enrol_request(secret), NOW + timedelta(hours=1))
        with pytest.raises(RefusedError, match=r"enrolment\.token_unknown"):
            enrol(session, authority, board.enrol_request("x" * 43))
        stolen = board.enrol_request(secret).model_copy(update={"csr_pem": Board().enrol_request(secret).csr_pem})
        with pytest.raises(RefusedError, match=r"enrolment\.bad_proof"):
            enrol(session, authority, stolen)
        assert enrol(session, authority, board.enrol_request(secret)).device == "edge-1"


def test_a_refused_csr_leaves_the_token_usable(database: Database, authority: Authority) -> None:
    board = Board()
    with database.session() as session:
        secret = new_token(session)
    with pytest.raises(RefusedError, match=r"enrolment\.csr_refused"), database.session() as session:
        enrol(session, authority, board.enrol_request(secret, csr_pem="nonsense"))
    with database.session() as session:
        assert enrol(session, authority, board.enrol_request(secret)).device == "edge-1"


def test_one_identity_key_is_one_board(database: Database, authority: Authority) -> None:
    board = Board()
    with database.session() as session:
        enrol(session, authority, board.enrol_request(new_token(session)))
        second = new_token(session, "edge-2")
        with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
            enrol(session, authority, board.enrol_request(second))


def test_a_newer_token_ends_the_older_one(database: Database, authority: Authority) -> None:
    with database.session() as session:
        older, newer = new_token(session), new_token(session)
        with pytest.raises(RefusedError, match=r"enrolment\.token_unknown"):
            enrol(session, authority, Board().enrol_request(older))
        enrol(session, authority, Board().enrol_request(newer))


def test_a_name_stays_with_its_first_board(database: Database, authority: Authority) -> None:
    with database.session() as session:
        enrol(session, authority, Board().enrol_request(new_token(session)))
        service.revoke(session, "alice", "edge-1", "", NOW)
        with pytest.raises(ConflictError, match=r"device\.name_taken"):
            new_token(session)


@pytest.mark.parametrize("name", ["controller-1", "controllerx", "Edge", "a/b", "a+", "#", "", "-x", "x" * 64])
def test_names_that_are_no_boards_are_refused(database: Database, name: str) -> None:
    with database.session() as session, pytest.raises(InvalidError, match=r"device\.name_malformed"):
        new_token(session, name)


@pytest.mark.parametrize(
    "labels", [{"": "x"}, {"a": "x" * 65}, {"a,b": "x"}, {"a": "b*"}, {str(n): "x" for n in range(33)}]
)
def test_labels_that_filters_could_not_name_are_refused(database: Database, labels: dict[str, str]) -> None:
    with database.session() as session, pytest.raises(InvalidError, match=r"device\.labels_malformed"):
        service.create_token(session, "alice", "edge-1", group="/", labels=labels, hours=1, now=NOW)


def test_a_session_needs_the_identity_key_and_a_fresh_nonce(database: Database, authority: Authority) -> None:
    sessions, board = Sessions(NOW.timestamp), Board()
    with database.session() as session:
        enrol(session, authority, board.enrol_request(new_token(session)))
        request = board.session_request("edge-1", sessions.nonce())
        with pytest.raises(RefusedError, match=r"session\.bad_proof"):
            service.open_session(session, Board().session_request("edge-1", request.nonce), sessions)
        bearer = service.open_session(session, request, sessions)
        assert service.session_device(session, sessions, bearer) == "edge-1"
        with pytest.raises(Exception, match=r"session\.nonce_invalid"):
            service.open_session(session, request, sessions)
        with pytest.raises(RefusedError, match=r"device\.unknown"):
            service.open_session(session, board.session_request("edge-9", sessions.nonce()), sessions)


def test_a_revoked_board_is_refused_at_once(database: Database, authority: Authority) -> None:
    sessions, board = Sessions(NOW.timestamp), Board()
    with database.session() as session:
        enrol(session, authority, board.enrol_request(new_token(session)))
        bearer = service.open_session(session, board.session_request("edge-1", sessions.nonce()), sessions)
        service.revoke(session, "alice", "edge-1", "stolen", NOW)
        service.revoke(session, "alice", "edge-1", "again", NOW)
        with pytest.raises(RefusedError, match=r"device\.revoked"):
            service.session_device(session, sessions, bearer)
        with pytest.raises(RefusedError, match=r"device\.revoked"):
            service.open_session(session, board.session_request("edge-1", sessions.nonce()), sessions)
        serial = queries.get(session, "edge-1").cert_serial
        assert queries.revoked_certificates(session, NOW) == [(serial, NOW)]
        assert queries.revoked_certificates(session, NOW + timedelta(days=31)) == []
        actions = [event.action for event in access.events(session)]
        assert actions.count("device.revoke") == 1


def test_lists_hold_what_filter_and_scopes_allow(database: Database, authority: Authority) -> None:
    with database.session() as session:
        for name, group in (("edge-1", "/eu/a/"), ("edge-2", "/eu/b/"), ("edge-3", "/us/"), ("edge-4", "/eu/a/")):
            enrol(session, authority, Board().enrol_request(new_token(session, name, group)))

    def names(text: str, *scopes: str, after: str = "", limit: int = 10) -> tuple[list[str], bool]:
        with database.reading() as session:
            found, more = queries.page(session, parse_filter(text), scopes, after=after, limit=limit)
            return [device.id for device in found], more

    assert names("", "/") == (["edge-1", "edge-2", "edge-3", "edge-4"], False)
    assert names("", "/eu/") == (["edge-1", "edge-2", "edge-4"], False)
    assert names("group=/eu/a/", "/eu/", "/us/") == (["edge-1", "edge-4"], False)
    assert names("", "/", limit=2) == (["edge-1", "edge-2"], True)
    assert names("", "/", after="edge-2", limit=2) == (["edge-3", "edge-4"], False)
    assert names("name=edge-9", "/") == ([], False)


def test_every_table_keeps_time_zones(database: Database, authority: Authority) -> None:
    with database.session() as session:
        enrol(session, authority, Board().enrol_request(new_token(session)))
    with database.reading() as session:
        assert session.get_one(Device, "edge-1").enrolled_at == NOW
