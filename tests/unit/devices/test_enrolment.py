from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from cryptography import x509
from sqlalchemy import select

from garrison_controller.devices import queries, tokens
from garrison_controller.devices.enrolment import Admitted
from garrison_controller.devices.service import RENEWALS_A_DAY
from garrison_controller.devices.tables import Device, EnrolmentToken, TokenUse
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, RefusedError
from garrison_protocol.messages.enrolment import EnrolRequest
from tests.unit.devices.boards import Board
from tests.unit.devices.site import Site


def test_a_token_admits_one_board_under_its_name(site: Site) -> None:
    board = Board()
    admitted = site.enrol(board.enrol_request(site.token(), name="something-else"))
    assert admitted.device == "edge-1"
    certificate = x509.load_pem_x509_certificate(admitted.certificate_pem.encode())
    with site.database.reading() as session:
        device = queries.get(session, "edge-1")
        assert (device.group, device.labels, device.state) == ("/demo/", {"site": "x"}, "enrolled")
        assert device.identity_public == board.identity.public_hex
        assert device.cert_serial == f"{certificate.serial_number:x}"
        assert device.cert_not_after == certificate.not_valid_after_utc
    assert site.events() == [
        ("alice", "device.token.create", "edge-1"),
        ("device:edge-1", "device.enrol", "edge-1"),
    ]


def test_only_the_hash_of_a_token_is_stored(site: Site) -> None:
    secret = site.token()
    with site.database.reading() as session:
        assert secret not in repr(vars(session.scalars(select(EnrolmentToken)).one()))


def test_a_used_token_is_refused_to_another_key(site: Site) -> None:
    secret = site.token()
    site.enrol(Board().enrol_request(secret))
    with pytest.raises(RefusedError, match=r"enrolment\.token_used") as caught:
        site.enrol(Board().enrol_request(secret))
    assert caught.value.fields["device"] == "edge-1"


def test_a_lost_answer_can_be_asked_for_again_for_an_hour(site: Site) -> None:
    board, secret = Board(), site.token()
    first = site.enrol(board.enrol_request(secret))
    site.later(minutes=59)
    again = site.enrol(board.enrol_request(secret))
    assert again.device == first.device
    assert again.certificate_pem != first.certificate_pem
    site.later(minutes=2)
    with pytest.raises(RefusedError, match=r"enrolment\.token_used"):
        site.enrol(board.enrol_request(secret))


def test_a_board_that_asks_for_its_answer_again_and_again_gets_few_certificates(site: Site) -> None:
    invited = Board()
    request = Board().enrol_request(site.token())
    for _ in range(RENEWALS_A_DAY):
        site.enrol(request)
    with pytest.raises(RefusedError, match=r"renewal\.too_often"):
        site.enrol(request)
    site.ask(invited, "edge-2")
    site.approve(invited)
    for _ in range(RENEWALS_A_DAY):
        site.ask(invited)
    with pytest.raises(RefusedError, match=r"renewal\.too_often"):
        site.ask(invited)


def test_a_revoked_board_gets_nothing_from_its_old_token(site: Site) -> None:
    board, secret = Board(), site.token()
    site.enrol(board.enrol_request(secret))
    site.revoke()
    with pytest.raises(RefusedError, match=r"enrolment\.token_used"):
        site.enrol(board.enrol_request(secret))


def test_expired_unknown_and_unproven_requests_are_refused(site: Site) -> None:
    board, secret = Board(), site.token(hours=1)
    with pytest.raises(RefusedError, match=r"enrolment\.token_unknown"):
        site.enrol(board.enrol_request("x" * 43))
    stolen = board.enrol_request(secret).model_copy(update={"csr_pem": Board().enrol_request(secret).csr_pem})
    with pytest.raises(RefusedError, match=r"enrolment\.bad_proof"):
        site.enrol(stolen)
    site.later(hours=1)
    with pytest.raises(RefusedError, match=r"enrolment\.token_expired"):
        site.enrol(board.enrol_request(secret))
    site.later(minutes=-1)
    assert site.enrol(board.enrol_request(secret)).device == "edge-1"


def test_a_refused_csr_leaves_the_token_usable(site: Site) -> None:
    board, secret = Board(), site.token()
    with pytest.raises(RefusedError, match=r"enrolment\.csr_refused"):
        site.enrol(board.enrol_request(secret, csr_pem="nonsense"))
    assert site.enrol(board.enrol_request(secret)).device == "edge-1"


def test_one_identity_key_is_one_board(site: Site) -> None:
    board = site.admitted()
    with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
        site.enrol(board.enrol_request(site.token("edge-2")))


def test_a_newer_token_ends_the_older_one(site: Site) -> None:
    older, newer = site.token(), site.token()
    with pytest.raises(RefusedError, match=r"enrolment\.token_revoked"):
        site.enrol(Board().enrol_request(older))
    site.enrol(Board().enrol_request(newer))


def test_a_name_stays_with_its_board_unless_it_is_replaced(site: Site) -> None:
    site.admitted()
    site.revoke()
    with pytest.raises(ConflictError, match=r"device\.name_taken") as caught:
        site.token()
    assert "garrison device rotate edge-1" in caught.value.hint


def test_a_revoked_token_admits_nobody_and_keeps_whom_it_admitted(site: Site) -> None:
    secret, board = site.batch(5), Board()
    site.enrol(board.enrol_request(secret))
    with site.database.session() as session:
        tokens.revoke_token(session, "alice", 1, site.now)
        tokens.revoke_token(session, "alice", 1, site.now)
    with pytest.raises(RefusedError, match=r"enrolment\.token_revoked"):
        site.enrol(Board().enrol_request(secret))
    assert site.enrol(board.enrol_request(secret)).device == "edge-1"  # its answer was lost
    assert [event for event in site.events() if event[1] == "device.token.revoke"] == [
        ("alice", "device.token.revoke", "edge-")
    ]


def test_boards_of_a_batch_get_the_name_they_ask_for_or_the_next_number(site: Site) -> None:
    site.admitted("edge-2")
    site.token("edge-3")
    secret = site.batch(4)
    asked = ("edge-attic", "", "other-1", "edge-attic")
    names = [site.enrol(Board().enrol_request(secret, name=name)).device for name in asked]
    assert names == ["edge-attic", "edge-1", "edge-4", "edge-5"]
    with pytest.raises(RefusedError, match=r"enrolment\.token_used"):
        site.enrol(Board().enrol_request(secret))


def test_two_boards_race_for_a_one_time_token_and_one_wins(site: Site) -> None:
    secret = site.token()
    requests = [Board().enrol_request(secret) for _ in range(8)]
    outcomes = race(site, requests)
    assert sorted(outcomes) == ["edge-1", *["enrolment.token_used"] * 7]
    assert devices(site) == ["edge-1"]


def test_a_batch_never_admits_more_than_its_number(site: Site) -> None:
    secret = site.batch(5)
    outcomes = race(site, [Board().enrol_request(secret) for _ in range(12)])
    assert sorted(outcomes) == [*(f"edge-{n}" for n in range(1, 6)), *["enrolment.token_used"] * 7]
    assert len(devices(site)) == 5
    with site.database.reading() as session:
        assert session.scalars(select(EnrolmentToken.uses)).one() == 5
        assert len(session.scalars(select(TokenUse)).all()) == 5


def test_one_board_that_retries_all_at_once_is_one_board(site: Site) -> None:
    secret, board = site.batch(5), Board()
    assert race(site, [board.enrol_request(secret) for _ in range(6)]) == ["edge-1"] * 6
    assert devices(site) == ["edge-1"]
    with site.database.reading() as session:
        assert session.scalars(select(EnrolmentToken.uses)).one() == 1


def test_two_batches_with_one_prefix_never_share_a_name(site: Site) -> None:
    secrets = [site.batch(4), site.batch(4)]
    outcomes = race(site, [Board().enrol_request(secret) for secret in secrets * 4])
    assert sorted(outcomes) == [f"edge-{n}" for n in range(1, 9)]


@pytest.mark.parametrize("name", ["controller-1", "controllerx", "Edge", "a/b", "a+", "#", "", "-x", "x" * 64])
def test_names_that_are_no_boards_are_refused(site: Site, name: str) -> None:
    with pytest.raises(InvalidError, match=r"device\.name_malformed"):
        site.token(name)


@pytest.mark.parametrize("prefix", ["", "controller", "Edge-", "a/", "+", "x" * 57])
def test_prefixes_that_begin_no_boards_names_are_refused(site: Site, prefix: str) -> None:
    with pytest.raises(InvalidError, match=r"device\.prefix_malformed"):
        site.batch(2, prefix)


@pytest.mark.parametrize(
    "labels", [{"": "x"}, {"a": "x" * 65}, {"a,b": "x"}, {"a": "b*"}, {str(n): "x" for n in range(33)}]
)
def test_labels_that_filters_could_not_name_are_refused(site: Site, labels: dict[str, str]) -> None:
    with site.database.session() as session, pytest.raises(InvalidError, match=r"device\.labels_malformed"):
        tokens.create_token(session, "alice", "edge-1", group="/", labels=labels, hours=1, now=site.now)


def test_the_database_itself_refuses_a_use_too_many(site: Site) -> None:
    site.token()
    with pytest.raises(Exception, match="CHECK constraint failed"), site.database.session() as session:
        session.scalars(select(EnrolmentToken)).one().uses = 2


def race(site: Site, requests: list[EnrolRequest]) -> list[str]:
    """Return what each request got, a name or a code, with a thread for each of them."""

    def one(request: EnrolRequest) -> str:
        try:
            answer = site.enrol(request)
        except GarrisonError as error:
            return error.code
        assert isinstance(answer, Admitted)
        return answer.device

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests))


def devices(site: Site) -> list[str]:
    with site.database.reading() as session:
        return list(session.scalars(select(Device.id).order_by(Device.id)))


def test_a_token_that_ended_is_told_apart_in_lists(site: Site) -> None:
    site.token("edge-1", "/eu/")
    site.token("edge-2", "/us/")
    with site.database.reading() as session:
        assert [token.name for token in queries.tokens(session, ("/",))] == ["edge-2", "edge-1"]
        assert [token.name for token in queries.tokens(session, ("/eu/",))] == ["edge-1"]
        assert queries.pending_groups(session, "edge-1", site.now) == ["/eu/"]
        assert queries.pending_groups(session, "edge-1", site.now + timedelta(days=2)) == []
