"""A controller's part that admits boards, without HTTP: each method is one transaction at the site's time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from garrison_controller.access import queries as access
from garrison_controller.db.base import Database
from garrison_controller.devices import enrolment, requests, service, tokens
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.enrolment import Admission, Admitted
from garrison_controller.devices.requests import Place, Waiting
from garrison_controller.devices.service import Renewed
from garrison_controller.devices.sessions import Sessions
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.enrolment import EnrolRequest
from tests.unit.devices.boards import NOW, Board

DAYS = 30
GRACE_DAYS = 365


class Site:
    """``now`` may be moved; nothing else is shared between calls but the database."""

    def __init__(self, database: Database, authority: Authority) -> None:
        self.database, self.authority = database, authority
        self.director = SigningKey.generate()
        self.now = NOW
        self.sessions = Sessions(self._now_s)

    def _now_s(self) -> float:
        return self.now.timestamp()

    def later(self, **amount: float) -> datetime:
        self.now += timedelta(**amount)
        return self.now

    @property
    def admission(self) -> Admission:
        return Admission(self.authority, self.director, DAYS, self.now)

    def token(self, name: str = "edge-1", group: str = "/demo/", hours: int = 24) -> str:
        with self.database.session() as session:
            _, secret = tokens.create_token(
                session, "alice", name, group=group, labels={"site": "x"}, hours=hours, now=self.now
            )
        return secret

    def batch(self, uses: int, prefix: str = "edge-", group: str = "/demo/") -> str:
        with self.database.session() as session:
            _, secret = tokens.create_batch(
                session, "alice", prefix, uses=uses, group=group, labels={}, hours=24, now=self.now
            )
        return secret

    def rotation(self, name: str = "edge-1") -> str:
        with self.database.session() as session:
            _, secret = tokens.create_rotation(session, "alice", name, hours=24, now=self.now)
        return secret

    def enrol(self, request: EnrolRequest) -> Admitted:
        with self.database.session() as session:
            return enrolment.enrol(session, request, self.admission)

    def ask(self, board: Board, name: str = "") -> Admitted | Waiting:
        with self.database.session() as session:
            return requests.ask(session, board.enrol_request(name=name), self.admission, address="192.0.2.7")

    def approve(self, board: Board, name: str = "", group: str = "/demo/") -> str:
        with self.database.session() as session:
            return requests.approve(session, "alice", board.fingerprint, Place(group, {}, name), self.now).device_id

    def admitted(self, name: str = "edge-1", group: str = "/demo/") -> Board:
        """Return a board that enrolled under ``name``."""
        board = Board()
        self.enrol(board.enrol_request(self.token(name, group)))
        return board

    def renew(self, board: Board, name: str = "edge-1") -> Renewed:
        with self.database.session() as session:
            request = board.renew_request(name, self.sessions.nonce())
            return service.renew(
                session,
                request,
                self.sessions,
                self.authority,
                days=DAYS,
                grace_days=GRACE_DAYS,
                now=self.now,
            )

    def revoke(self, name: str = "edge-1") -> None:
        with self.database.session() as session:
            service.revoke(session, "alice", name, "stolen", self.now)

    def events(self) -> Sequence[tuple[str, str, str]]:
        with self.database.reading() as session:
            return [(event.principal, event.action, event.subject) for event in access.events(session, limit=1000)]
