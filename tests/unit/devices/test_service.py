from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509

from garrison_controller.access import queries as access
from garrison_controller.devices import queries, service
from garrison_controller.devices.filter import parse_filter
from garrison_controller.devices.service import RENEWALS_A_DAY
from garrison_controller.devices.tables import Device, IssuedCertificate
from garrison_protocol.errors import RefusedError, UnauthenticatedError
from tests.unit.devices.boards import NOW, Board
from tests.unit.devices.site import DAYS, GRACE_DAYS, Site


def test_a_session_needs_the_identity_key_and_a_fresh_nonce(site: Site) -> None:
    board = site.admitted()
    with site.database.session() as session:
        request = board.session_request("edge-1", site.sessions.nonce())
        with pytest.raises(RefusedError, match=r"session\.bad_proof"):
            service.open_session(session, Board().session_request("edge-1", request.nonce), site.sessions)
        bearer = service.open_session(session, request, site.sessions)
        assert service.session_device(session, site.sessions, bearer) == "edge-1"
        with pytest.raises(UnauthenticatedError, match=r"session\.nonce_invalid"):
            service.open_session(session, request, site.sessions)
        with pytest.raises(RefusedError, match=r"device\.unknown"):
            service.open_session(session, board.session_request("edge-9", site.sessions.nonce()), site.sessions)


def test_a_revoked_board_is_refused_at_once(site: Site) -> None:
    board = site.admitted()
    with site.database.session() as session:
        bearer = service.open_session(session, board.session_request("edge-1", site.sessions.nonce()), site.sessions)
    site.revoke()
    site.revoke()
    with site.database.session() as session:
        with pytest.raises(RefusedError, match=r"device\.revoked"):
            service.session_device(session, site.sessions, bearer)
        with pytest.raises(RefusedError, match=r"device\.revoked"):
            service.open_session(session, board.session_request("edge-1", site.sessions.nonce()), site.sessions)
        serial = queries.get(session, "edge-1").cert_serial
        assert queries.revoked_certificates(session, NOW) == [(serial, NOW)]
        assert queries.revoked_certificates(session, NOW + timedelta(days=31)) == []
        actions = [event.action for event in access.events(session)]
        assert actions.count("device.revoke") == 1


def test_a_renewal_gives_a_certificate_for_a_new_key_and_leaves_the_old_one_valid(site: Site) -> None:
    board = site.admitted()
    site.later(days=20)
    renewed = site.renew(board)
    certificate = x509.load_pem_x509_certificate(renewed.certificate_pem.encode())
    assert certificate.public_key() == board.tls.public_key()
    with site.database.reading() as session:
        device = queries.get(session, "edge-1")
        assert device.cert_serial == f"{certificate.serial_number:x}"
        assert device.cert_not_after == site.now + timedelta(days=DAYS)
        assert queries.revoked_certificates(session, site.now) == []
    assert ("device:edge-1", "device.renew", "edge-1") in site.events()


def test_an_ended_certificate_is_renewed_within_the_grace_time_and_not_after_it(site: Site) -> None:
    board = site.admitted()
    site.later(days=DAYS + GRACE_DAYS)
    site.renew(board)
    site.later(days=DAYS + GRACE_DAYS, seconds=1)
    with pytest.raises(RefusedError, match=r"renewal\.grace_over") as caught:
        site.renew(board)
    assert caught.value.fields["device"] == "edge-1"
    assert "garrison device rotate edge-1" in caught.value.hint


def test_only_the_identity_key_of_an_admitted_board_renews(site: Site) -> None:
    board = site.admitted()
    for name, code in (("edge-1", r"renewal\.bad_proof"), ("edge-9", r"device\.unknown")):
        with pytest.raises(RefusedError, match=code) as caught:
            site.renew(Board(), name)
        assert "device" not in caught.value.fields  # a stranger may have caused it
    site.revoke()
    with pytest.raises(RefusedError, match=r"device\.revoked") as revoked:
        site.renew(board)
    assert revoked.value.fields["device"] == "edge-1"


def test_a_recorded_renewal_renews_nothing(site: Site) -> None:
    board = site.admitted()
    request = board.renew_request("edge-1", site.sessions.nonce())
    for expected in (None, UnauthenticatedError):
        with site.database.session() as session:
            if expected is None:
                service.renew(session, request, site.sessions, site.authority, days=1, grace_days=1, now=site.now)
                continue
            with pytest.raises(expected, match=r"session\.nonce_invalid"):
                service.renew(session, request, site.sessions, site.authority, days=1, grace_days=1, now=site.now)


def test_a_board_that_asks_again_and_again_is_refused_for_a_day(site: Site) -> None:
    board = site.admitted()
    for _ in range(RENEWALS_A_DAY - 1):
        site.renew(board)
    with pytest.raises(RefusedError, match=r"renewal\.too_often"):
        site.renew(board)
    site.later(days=1)
    site.renew(board)


def test_revocation_ends_every_certificate_of_the_board(site: Site) -> None:
    board = site.admitted()
    site.renew(board)
    site.admitted("edge-2")
    site.revoke()
    with site.database.reading() as session:
        revoked = dict(queries.revoked_certificates(session, site.now))
        mine = [row.serial for row in session.query(IssuedCertificate).filter_by(device_id="edge-1")]
    assert set(revoked) == set(mine)
    assert len(mine) == 2


def test_lists_hold_what_filter_and_scopes_allow(site: Site) -> None:
    for name, group in (("edge-1", "/eu/a/"), ("edge-2", "/eu/b/"), ("edge-3", "/us/"), ("edge-4", "/eu/a/")):
        site.admitted(name, group)

    def names(text: str, *scopes: str, after: str = "", limit: int = 10) -> tuple[list[str], bool]:
        with site.database.reading() as session:
            found, more = queries.page(session, parse_filter(text), scopes, after=after, limit=limit)
            return [device.id for device in found], more

    assert names("", "/") == (["edge-1", "edge-2", "edge-3", "edge-4"], False)
    assert names("", "/eu/") == (["edge-1", "edge-2", "edge-4"], False)
    assert names("group=/eu/a/", "/eu/", "/us/") == (["edge-1", "edge-4"], False)
    assert names("", "/", limit=2) == (["edge-1", "edge-2"], True)
    assert names("", "/", after="edge-2", limit=2) == (["edge-3", "edge-4"], False)
    assert names("name=edge-9", "/") == ([], False)


def test_every_table_keeps_time_zones(site: Site) -> None:
    site.admitted()
    with site.database.reading() as session:
        assert session.get_one(Device, "edge-1").enrolled_at == NOW
