"""Boards' requests that came home on a stick: nonces to answer, and renewals. Runs inside the caller's transaction."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Session

from garrison_controller.bundles.tables import CarriedRequest
from garrison_controller.devices import service as devices
from garrison_controller.devices.ca import Authority
from garrison_protocol.bundle import RENEWAL_NONCE, HomeRequest
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import RefusedError
from garrison_protocol.messages.enrolment import RenewRequest


class _Number:
    """The nonce of a carried renewal: a number above the last one that was granted."""

    def __init__(self, last: int) -> None:
        self._last = last
        self.value = 0

    def spend_nonce(self, nonce: str) -> None:
        """Take the number that ``nonce`` is.

        Raises:
            RefusedError: ``renewal.not_newer``.
        """
        found = RENEWAL_NONCE.fullmatch(nonce)
        if found is None or int(found[1]) <= self._last:
            raise RefusedError(
                "renewal.not_newer",
                "this carried request for a certificate is not newer than the last one that was granted",
                hint="take the newest export of the board home; an old stick may have come twice",
            )
        self.value = int(found[1])


def take(
    session: Session,
    device_id: str,
    request: HomeRequest,
    authority: Authority,
    *,
    days: int,
    grace_days: int,
    now: datetime,
) -> bool:
    """Keep what a board asked for, and grant its renewal; tell whether any of it is new.

    The nonce is not signed: whoever replaces it on the stick only gets an anchor that the board will not take.

    Raises:
        RefusedError: ``device.unknown``, ``device.revoked``; and for a renewal as ``devices.service.renew``,
            ``renewal.not_newer``, ``message.misaddressed``.
    """
    device = devices.enrolled_device(session, device_id)
    row = session.get(CarriedRequest, device_id, with_for_update=True)
    if row is None:
        row = CarriedRequest(device_id=device_id, identity_public="", nonce="", received_at=now)
        session.add(row)
    if row.identity_public != device.identity_public:
        row.identity_public, row.renewal, row.csr_sha256, row.certificate_pem = device.identity_public, 0, "", ""
    news = row.nonce != request.nonce
    row.nonce, row.received_at = request.nonce, now
    if request.renew is not None:
        news = _renew(session, row, request.renew, authority, days=days, grace_days=grace_days, now=now) or news
    return news


def _renew(
    session: Session,
    row: CarriedRequest,
    request: RenewRequest,
    authority: Authority,
    *,
    days: int,
    grace_days: int,
    now: datetime,
) -> bool:
    if request.device != row.device_id:
        raise RefusedError("message.misaddressed", f"a request of {request.device} in the folder of {row.device_id}")
    csr_sha256 = sha256_hex(request.csr_pem.encode())
    if csr_sha256 == row.csr_sha256:
        return False
    number = _Number(row.renewal)
    renewed = devices.renew(session, request, number, authority, days=days, grace_days=grace_days, now=now)
    row.renewal, row.csr_sha256, row.certificate_pem = number.value, csr_sha256, renewed.certificate_pem
    return True
