"""A name passes from one board to another: what stays, what ends, and what either board can still do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from garrison_controller.audit.tables import Alarm, Refusal, StreamRow
from garrison_controller.devices import anchors, enrolment, queries, service, tokens
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.enrolment import Admission, Admitted
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import Device, RetiredIdentity
from garrison_controller.rollouts.specification import GroupSpec
from garrison_controller.rollouts.tables import Assignment, DesiredState, Target
from garrison_protocol import envelope, keys
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError, UnauthenticatedError
from garrison_protocol.messages.anchor import ANCHOR_KIND, Anchor
from garrison_protocol.messages.base import encode, parse_message
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.report import STATUS_KIND
from garrison_protocol.messages.streams import AUDIT_KIND
from garrison_protocol.states import DeploymentState, Stream
from garrison_protocol.topics import Up, up
from tests.unit.devices.boards import Board
from tests.unit.devices.site import Site
from tests.unit.rollouts.fleet import ALIAS, START, FakeBoard, Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def authority() -> Authority:
    return Authority.create("Garrison device CA", START)


class Replacement:
    """Another board that takes over the name of ``name``, with the fleet's real message path behind it."""

    def __init__(self, fleet: Fleet, authority: Authority, name: str = "edge-1") -> None:
        self.keys = Board()
        with fleet.database.session() as session:
            _, secret = tokens.create_rotation(session, "alice", name, hours=24, now=fleet.clock())
        admission = Admission(authority, fleet.director, 30, fleet.clock())
        with fleet.database.session() as session:
            self.admitted = enrolment.enrol(session, self.keys.enrol_request(secret), admission)
        self.speaks = FakeBoard(name, key=self.keys.identity, epoch="00000000000000bb")


def say(fleet: Fleet, board: FakeBoard, *, rows: int = 0, counter: int = 0) -> None:
    """Let a board say where it stands, and send ``rows`` audit rows."""
    for _ in range(rows):
        board.record()
    fleet.ingest.handle(up(board.device, Up.STATUS), board.seal(STATUS_KIND, board.status(counter=counter)))
    if rows:
        fleet.ingest.handle(up(board.device, Up.AUDIT), board.seal(AUDIT_KIND, board.batch()))


def refusals(fleet: Fleet) -> dict[str, int]:
    with fleet.database.reading() as session:
        return {row.code: row.count for row in session.scalars(select(Refusal).where(Refusal.sender == "edge-1"))}


def alarms(fleet: Fleet) -> list[str]:
    with fleet.database.reading() as session:
        return list(session.scalars(select(Alarm.code)))


def test_group_labels_and_history_stay_with_the_name(site: Site) -> None:
    earlier = site.admitted("edge-1", "/eu/plant1/")
    site.later(days=3)
    newer = Board()
    admitted = site.enrol(newer.enrol_request(site.rotation()))
    assert (admitted.device, admitted.replaced) == ("edge-1", True)
    with site.database.reading() as session:
        device = queries.get(session, "edge-1")
        assert (device.group, device.labels, device.state) == ("/eu/plant1/", {"site": "x"}, "enrolled")
        assert (device.identity_public, device.identity_since) == (newer.identity.public_hex, site.now)
        retired = session.scalars(select(RetiredIdentity)).one()
        assert (retired.identity_public, retired.until) == (earlier.identity.public_hex, site.now)
        assert len(queries.revoked_certificates(session, site.now)) == 1
        assert device.cert_serial not in dict(queries.revoked_certificates(session, site.now))
    assert ("device:edge-1", "device.rotate", "edge-1") in site.events()


def test_a_replacement_that_asks_again_has_the_revocation_list_written_again(site: Site) -> None:
    """The controller may have been killed between the commit and the list."""
    site.admitted()
    request = Board().enrol_request(site.rotation())
    assert site.enrol(request).replaced
    assert site.enrol(request).replaced
    first = Board().enrol_request(site.token("edge-2"))
    assert not site.enrol(first).replaced
    assert not site.enrol(first).replaced


def test_the_present_board_goes_on_until_the_other_enrols(site: Site) -> None:
    board = site.admitted()
    secret = site.rotation()
    site.renew(board)
    site.enrol(Board().enrol_request(secret))
    with pytest.raises(RefusedError, match=r"renewal\.bad_proof"):
        site.renew(board)


def test_sessions_of_the_earlier_board_end_with_it(site: Site) -> None:
    board, sessions = site.admitted(), Sessions(site.now.timestamp)
    with site.database.reading() as session:
        bearer = service.open_session(session, board.session_request("edge-1", sessions.nonce()), sessions)
    site.enrol(Board().enrol_request(site.rotation()))
    with site.database.reading() as session, pytest.raises(UnauthenticatedError, match=r"session\.expired"):
        service.session_device(session, sessions, bearer)


def test_a_replaced_key_speaks_for_no_board_ever_again(site: Site) -> None:
    board = site.admitted()
    site.enrol(Board().enrol_request(site.rotation()))
    for secret in (site.token("edge-2"), site.rotation(), site.batch(2)):
        with pytest.raises(RefusedError, match=r"enrolment\.identity_retired"):
            site.enrol(board.enrol_request(secret))
    with pytest.raises(RefusedError, match=r"enrolment\.identity_retired"):
        site.ask(board)


def test_a_revoked_name_can_be_given_to_another_board(site: Site) -> None:
    site.admitted()
    site.revoke()
    assert site.enrol(Board().enrol_request(site.rotation())).device == "edge-1"
    with site.database.reading() as session:
        assert queries.get(session, "edge-1").state == "enrolled"


def test_revocation_ends_a_string_that_would_give_the_name_away(site: Site) -> None:
    site.admitted()
    leaked = site.rotation()
    site.revoke()
    with pytest.raises(RefusedError, match=r"enrolment\.token_revoked"):
        site.enrol(Board().enrol_request(leaked))


def test_only_known_names_are_given_away_and_only_the_newest_token_counts(site: Site) -> None:
    with pytest.raises(NotFoundError, match=r"device\.not_found"):
        site.rotation("edge-9")
    site.admitted()
    older, _ = site.rotation(), site.rotation()
    with pytest.raises(RefusedError, match=r"enrolment\.token_revoked"):
        site.enrol(Board().enrol_request(older))


def test_boards_that_race_for_a_name_leave_one_identity(site: Site) -> None:
    site.admitted()
    requests = [Board().enrol_request(site_token) for site_token in [site.rotation()] * 6]

    def one(place: int) -> str:
        try:
            return site.enrol(requests[place]).device
        except GarrisonError as error:
            return error.code

    with ThreadPoolExecutor(6) as pool:
        outcomes = sorted(pool.map(one, range(6)))
    assert outcomes == ["edge-1", *["enrolment.token_used"] * 5]
    with site.database.reading() as session:
        assert len(session.scalars(select(RetiredIdentity)).all()) == 1


def test_the_new_boards_status_and_rows_count_and_the_old_ones_are_refused(fleet: Fleet, authority: Authority) -> None:
    old = fleet.boards["edge-1"]
    old.connection = 40
    say(fleet, old, rows=3)
    new = Replacement(fleet, authority)
    old.connection = 41
    say(fleet, old, rows=1)
    assert refusals(fleet) == {"envelope.key_unknown": 2}
    say(fleet, new.speaks, rows=2)
    with fleet.database.reading() as session:
        device = session.get_one(Device, "edge-1")
        assert (device.connection, device.online) == (1, True)
        rows = session.execute(select(StreamRow.epoch, StreamRow.seq).order_by(StreamRow.epoch, StreamRow.seq)).all()
    assert [tuple(row) for row in rows] == [
        *((old.epoch, seq) for seq in (1, 2, 3)),
        *((new.speaks.epoch, seq) for seq in (1, 2)),
    ]
    assert alarms(fleet) == []  # nothing was lost: it is another board


def test_the_death_of_the_old_board_does_not_end_the_new_one(fleet: Fleet, authority: Authority) -> None:
    old = fleet.boards["edge-1"]
    say(fleet, old)
    will = old.seal(STATUS_KIND, old.status(online=False))
    new = Replacement(fleet, authority)
    say(fleet, new.speaks)
    fleet.ingest.handle(up("edge-1", Up.STATUS), will)
    with fleet.database.reading() as session:
        assert session.get_one(Device, "edge-1").online


def test_the_new_board_is_handed_what_the_old_one_served_under_a_higher_counter(
    fleet: Fleet, authority: Authority
) -> None:
    rollout = fleet.begin("first", "1.0.0")
    fleet.tick()
    fleet.activate("edge-1", rollout)
    with fleet.database.reading() as session:
        before = session.get_one(DesiredState, "edge-1").counter
    Replacement(fleet, authority)
    with fleet.database.reading() as session:
        row = session.get_one(DesiredState, "edge-1")
        opened = envelope.unseal(row.envelope, lambda _: fleet.director.public_hex)
        desired = parse_message(Desired, opened.body, device="edge-1")
        assert (desired.counter, row.published_at) == (before + 1, None)
        assert [(one.alias, one.package.version, one.start_by) for one in desired.aliases] == [(ALIAS, "1.0.0", None)]
        assert session.scalars(select(Target.step).where(Target.device_id == "edge-1")).one() == 0


def test_the_counter_lies_above_what_the_old_board_was_seen_with(fleet: Fleet, authority: Authority) -> None:
    say(fleet, fleet.boards["edge-1"], counter=70)
    Replacement(fleet, authority)
    with fleet.database.reading() as session:
        assert session.get_one(DesiredState, "edge-1").counter == 71


def test_a_replacement_in_the_middle_of_a_rollout_is_handed_the_change_again(
    fleet: Fleet, authority: Authority
) -> None:
    rollout = fleet.begin("first", "1.0.0")
    fleet.tick()
    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 2)
    Replacement(fleet, authority)
    with fleet.database.reading() as session:
        target = session.get_one(Target, (rollout, "edge-1"))
        assert (target.state, target.deployment) == ("SCHEDULED", None)
        assert session.get(Assignment, ("edge-1", ALIAS)) is None
    fleet.tick()
    with fleet.database.reading() as session:
        assert session.get_one(Target, (rollout, "edge-1")).state == "QUEUED"
        assert session.get_one(Assignment, ("edge-1", ALIAS)).package_version == "1.0.0"


def test_a_revoked_board_leaves_its_place_in_a_rollout_at_once(fleet: Fleet) -> None:
    rollout = fleet.begin(
        "first", "1.0.0", groups=(GroupSpec(name="all", filter="*"),), max_unavailable=1, success_threshold=50
    )
    fleet.tick()
    with fleet.database.session() as session:
        service.revoke(session, "alice", "edge-1", "stolen", fleet.clock())
    fleet.tick()
    with fleet.database.reading() as session:
        states = {
            one.device_id: (one.state, one.error_code)
            for one in session.scalars(select(Target).where(Target.rollout_id == rollout))
        }
        assert session.get(Assignment, ("edge-1", ALIAS)) is None
    assert states == {
        "edge-1": ("CANCELED", "device.revoked"),
        "edge-2": ("QUEUED", None),
        "edge-3": ("SCHEDULED", None),
    }


def test_an_anchor_tells_time_counter_and_newest_rows_to_one_nonce(fleet: Fleet, authority: Authority) -> None:
    board = fleet.boards["edge-1"]
    say(fleet, board, rows=3)
    fleet.begin("first", "1.0.0")
    fleet.tick()

    def anchor() -> Anchor:
        with fleet.database.reading() as session:
            sealed = anchors.anchor(session, "edge-1", "ab" * 16, fleet.director, fleet.clock())
        opened = envelope.unseal(
            sealed, lambda signer: fleet.director.public_hex if signer == fleet.director.key_id else None
        )
        assert opened.kind == ANCHOR_KIND
        return parse_message(Anchor, opened.body, device="edge-1")

    first = anchor()
    assert (first.nonce, first.time, first.desired_counter) == ("ab" * 16, int(fleet.clock().timestamp()), 1)
    head = first.streams[Stream.AUDIT]
    assert (head.epoch, head.seq, head.hash) == (board.epoch, 3, board.entries[-1].hash)

    board.epoch, board.entries = "00000000000000cc", []  # its store was lost
    fleet.clock.now += timedelta(hours=1)
    say(fleet, board, rows=1)
    assert anchor().streams[Stream.AUDIT].epoch == board.epoch

    fleet.clock.now += timedelta(hours=1)
    Replacement(fleet, authority)
    replaced = anchor()
    assert replaced.streams == {}  # the new board has lost nothing
    assert replaced.desired_counter == 2


def test_revoked_and_unknown_boards_get_no_anchor(fleet: Fleet) -> None:
    with fleet.database.session() as session:
        service.revoke(session, "alice", "edge-1", "stolen", fleet.clock())
        for name, code in (("edge-1", "device.revoked"), ("edge-9", "device.unknown")):
            with pytest.raises(RefusedError, match=code):
                anchors.anchor(session, name, "00" * 16, fleet.director, fleet.clock())


def test_what_a_replacement_says_is_signed_by_its_key_alone(fleet: Fleet, authority: Authority) -> None:
    new = Replacement(fleet, authority)
    assert isinstance(new.admitted, Admitted)
    body = encode(new.speaks.status())
    forged = envelope.seal(STATUS_KIND, body, keys.SigningKey.generate())
    fleet.ingest.handle(up("edge-1", Up.STATUS), forged)
    assert refusals(fleet) == {"envelope.key_unknown": 1}
