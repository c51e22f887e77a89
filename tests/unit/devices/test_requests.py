from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import insert

from garrison_controller.devices import queries, requests
from garrison_controller.devices.enrolment import Admitted
from garrison_controller.devices.requests import MAX_PENDING, Place, Waiting
from garrison_controller.devices.tables import EnrolmentRequest
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError, UnavailableError
from tests.unit.devices.boards import NOW, Board
from tests.unit.devices.site import Site


def states(site: Site) -> list[tuple[str, str]]:
    with site.database.reading() as session:
        return [(row.asked_name, row.state) for row in requests.listed(session, site.now)]


def test_a_board_without_a_token_waits_until_its_fingerprint_is_approved(site: Site) -> None:
    board = Board()
    assert site.ask(board, "edge-7") == Waiting(board.fingerprint, "edge-7")
    assert site.ask(board, "edge-7") == Waiting(board.fingerprint, "edge-7")
    assert states(site) == [("edge-7", "pending")]
    assert site.approve(board, group="/eu/") == "edge-7"
    assert states(site) == [("edge-7", "approved")]
    admitted = site.ask(board)
    assert isinstance(admitted, Admitted)
    assert admitted.device == "edge-7"
    assert states(site) == []
    with site.database.reading() as session:
        assert queries.get(session, "edge-7").group == "/eu/"
    assert site.events() == [
        ("enrolment", "device.enrol.ask", board.fingerprint),
        ("alice", "device.enrol.approve", "edge-7"),
        ("device:edge-7", "device.enrol", "edge-7"),
    ]


def test_a_lost_answer_after_approval_can_be_asked_for_again_for_an_hour(site: Site) -> None:
    board = Board()
    site.ask(board, "edge-7")
    site.approve(board)
    site.ask(board)
    site.later(minutes=59)
    assert isinstance(site.ask(board), Admitted)
    site.later(minutes=2)
    with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
        site.ask(board)


def test_the_approver_names_the_board_and_only_all_of_the_fingerprint_finds_it(site: Site) -> None:
    board = Board()
    site.ask(board)
    with pytest.raises(ConflictError, match=r"enrolment\.name_needed"):
        site.approve(board)
    with site.database.session() as session:
        for part in (board.fingerprint[:-1], board.fingerprint[:9], "", Board().fingerprint):
            with pytest.raises(NotFoundError, match=r"enrolment\.request_not_found"):
                requests.approve(session, "alice", part, Place("/", {}, "edge-1"), site.now)
        spoken = board.fingerprint.upper().replace("-", " ")
        assert requests.approve(session, "alice", spoken, Place("/", {}, "edge-1"), site.now).device_id == "edge-1"


def test_a_denied_board_is_told_so_and_may_be_approved_later(site: Site) -> None:
    board = Board()
    site.ask(board, "edge-7")
    with site.database.session() as session:
        requests.deny(session, "alice", board.fingerprint, site.now)
    with pytest.raises(RefusedError, match=r"enrolment\.denied"):
        site.ask(board)
    site.approve(board)
    assert isinstance(site.ask(board), Admitted)


def test_requests_end_after_a_week(site: Site) -> None:
    board = Board()
    site.ask(board, "edge-7")
    site.later(days=7)
    assert states(site) == []
    with pytest.raises(NotFoundError):
        site.approve(board)
    assert isinstance(site.ask(board, "edge-8"), Waiting)
    assert states(site) == [("edge-8", "pending")]
    site.approve(board)
    site.later(days=7)
    assert isinstance(site.ask(board), Waiting)  # an approval does not last for ever either


def test_a_full_queue_refuses_newcomers_and_drops_nobody(site: Site) -> None:
    first = Board()
    site.ask(first, "edge-1")
    rows = [
        {
            "identity_public": f"{number:064x}",
            "fingerprint": f"{number:039d}",
            "asked_name": "",
            "address": "",
            "state": "pending",
            "device_id": "",
            "group": "/",
            "labels": {},
            "asked_at": NOW,
            "expires_at": NOW + requests.LIFETIME,
            "decided_by": "",
        }
        for number in range(MAX_PENDING - 1)
    ]
    with site.database.session() as session:
        session.execute(insert(EnrolmentRequest), rows)
    with pytest.raises(UnavailableError, match=r"enrolment\.queue_full") as caught:
        site.ask(Board())
    assert caught.value.retryable
    assert isinstance(site.ask(first), Waiting)
    site.approve(first)
    assert isinstance(site.ask(Board()), Waiting)


def test_a_name_is_promised_to_one_board(site: Site) -> None:
    one, two = Board(), Board()
    site.ask(one, "edge-7")
    site.ask(two, "edge-7")
    site.approve(one)
    with pytest.raises(ConflictError, match=r"device\.name_taken"):
        site.approve(two)
    with pytest.raises(ConflictError, match=r"device\.name_taken"):
        site.token("edge-7")
    assert site.approve(one, "edge-8") == "edge-8"
    assert site.approve(two) == "edge-7"
    names = [site.ask(board) for board in (one, two)]
    assert [name.device for name in names if isinstance(name, Admitted)] == ["edge-8", "edge-7"]


def test_known_and_unproven_keys_do_not_enter_the_queue(site: Site) -> None:
    with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
        site.ask(site.admitted())
    board = Board()
    with site.database.session() as session:
        forged = board.enrol_request(proof="00" * 64)
        with pytest.raises(RefusedError, match=r"enrolment\.bad_proof"):
            requests.ask(session, forged, site.admission, address="")
    with pytest.raises(InvalidError, match=r"device\.name_malformed"):
        site.ask(board, "controller-1")
    assert states(site) == []


def test_an_approved_board_that_asks_all_at_once_is_one_board(site: Site) -> None:
    board = Board()
    site.ask(board, "edge-7")
    site.approve(board)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: site.ask(board), range(6)))
    assert {answer.device for answer in answers if isinstance(answer, Admitted)} == {"edge-7"}
    assert len(answers) == 6


def test_a_carried_request_is_admitted_at_once_and_answered_again(site: Site) -> None:
    board = Board()
    with site.database.session() as session:
        place = Place("/eu/", {"site": "x"})
        first = requests.admit_offline(session, "alice", board.offline_request("edge-7"), place, site.admission)
        again = requests.admit_offline(session, "alice", board.offline_request(), place, site.admission)
        assert (first.device, again.device) == ("edge-7", "edge-7")
        assert first.certificate_pem != again.certificate_pem
        other = Place("/eu/", {}, "edge-8")
        with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
            requests.admit_offline(session, "alice", board.offline_request(), other, site.admission)
        forged = board.offline_request().model_copy(update={"identity": Board().identity.public_hex})
        with pytest.raises(RefusedError, match=r"enrolment\.bad_proof"):
            requests.admit_offline(session, "alice", forged, place, site.admission)
    assert ("alice", "device.enrol.approve", "edge-7") in site.events()


def test_a_carried_request_of_a_revoked_board_is_refused(site: Site) -> None:
    board = site.admitted()
    site.revoke()
    with site.database.session() as session, pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
        requests.admit_offline(session, "alice", board.offline_request(), Place("/", {}), site.admission)


def test_an_approval_admits_no_key_that_spoke_for_a_board_meanwhile(site: Site) -> None:
    board, revoked = Board(), Board()
    for one, name in ((board, "edge-7"), (revoked, "edge-8")):
        site.ask(one, name)
        site.approve(one, group="/us/")
    site.enrol(board.enrol_request(site.token("edge-1")))
    with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
        site.ask(board)
    site.enrol(Board().enrol_request(site.rotation("edge-1")))
    with pytest.raises(RefusedError, match=r"enrolment\.identity_retired"):
        site.ask(board)
    site.enrol(revoked.enrol_request(site.token("edge-2")))
    site.revoke("edge-2")
    with pytest.raises(RefusedError, match=r"enrolment\.identity_taken"):
        site.ask(revoked)


def test_a_name_for_which_a_token_was_given_out_is_not_promised_to_another(site: Site) -> None:
    secret, board = site.token("edge-1", "/eu/"), Board()
    site.ask(board, "edge-1")
    with pytest.raises(ConflictError, match=r"device\.name_taken"):
        site.approve(board, group="/us/")
    with site.database.session() as session, pytest.raises(ConflictError, match=r"device\.name_taken"):
        requests.admit_offline(session, "alice", board.offline_request("edge-1"), Place("/us/", {}), site.admission)
    assert site.enrol(Board().enrol_request(secret)).device == "edge-1"
