"""This board's TLS certificate: when it ends, and its renewal in time (docs/protocol.md, "Renewal").

A try runs as a job, which stores the new pair; the journal follows the file, so that a renewal is recorded even if the
process ended between the two.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from garrison_agent.adapters.database import Database
from garrison_agent.api.commands import CertificateStatus, Check
from garrison_agent.core.certificate import Tries, Validity, is_due, wait_s
from garrison_agent.events import CertificateTried, Post, Tick
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.jobs import Jobs
from garrison_agent.owner.timers import Timers
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, InsufficientError, UnavailableError
from garrison_protocol.states import Stream

_KNOWN = "certificate.sha256"
_ISSUED = "certificate.issued"
"""The certificate and the CAs of which one was seen to have issued it."""
_log = logging.getLogger(__name__)


class Renew(Protocol):
    """Gets and stores certificates; ``adapters.renewal.Renewal`` is one."""

    def read(self, device_cas: str = "") -> tuple[str, Validity] | None:
        """Return the stored certificate's SHA-256 and span; None: there is none that can be used.

        Nor can one that is by none of ``device_cas`` (PEM; empty: any will do).

        Raises:
            UnavailableError: This cannot be found out now.
        """
        ...

    def renew(self) -> None:
        """Replace it by a new one; blocks. Raises GarrisonError."""
        ...


class Certificate:
    """Renews the certificate when its time has come. Owner thread only."""

    def __init__(
        self,
        *,
        renew: Renew,
        database: Database,
        journal: Journal,
        jobs: Jobs,
        timers: Timers,
        post: Post,
        judge_at_s: Callable[[], float],
        monotonic_s: Callable[[], float],
        chance: Callable[[], float],
        reconnect: Callable[[], None],
        device_cas: Callable[[], str],
    ) -> None:
        """``judge_at_s`` is the later of clock and floor in Unix seconds; ``reconnect`` uses the new pair.

        ``device_cas`` are those of the verified ``fleet.json`` (PEM, or empty).
        """
        self._renew = renew
        self._database = database
        self._journal = journal
        self._jobs = jobs
        self._timers = timers
        self._post = post
        self._judge_at_s = judge_at_s
        self._monotonic_s = monotonic_s
        self._chance = chance
        self._reconnect = reconnect
        self._sha256: str | None = None
        self._validity: Validity | None = None
        self._device_cas = device_cas
        self._cas = device_cas()
        self._read(self._cas)
        self._tries = Tries()
        self._error: GarrisonError | None = None
        self._next_s: float | None = None
        self._busy = False

    def look(self) -> None:
        """Record a certificate that is new, and renew one whose time has come.

        Raises:
            InsufficientError: The disk is full; the next look records it.
        """
        self._begin_if_due()
        self._record()

    def metadata_checked(self) -> None:
        """Renew at once if ``fleet.json`` has given up the CA of this certificate: the broker will too.

        A certificate by a CA that is not listed *yet* stays: the controller is ahead of this board's metadata.

        Raises:
            InsufficientError: The disk is full; the next look records it.
        """
        cas = self._device_cas()
        if cas != self._cas:
            self._cas = cas
            self._read(cas)
            self.look()

    def tried(self, event: CertificateTried) -> None:
        """Take in how a renewal ended.

        Raises:
            InsufficientError: The disk is full; what could not be recorded is repeated.
        """
        self._busy, self._next_s = False, None
        before, self._error = self._error, event.error
        if event.error is None:
            self._read()
            # Where this board's time is ahead of the controller's, the next one would be due again as soon.
            self._tries = Tries(self._tries.failed + 1, refused=True) if self.due else Tries()
            self._reconnect()
            self._record()
            return
        refused = not (event.error.retryable or isinstance(event.error, UnavailableError | InsufficientError))
        self._tries = Tries(self._tries.failed + 1, refused)
        self._begin_if_due()
        if refused and (before is None or before.code != event.error.code):
            facts: dict[str, str | int | bool | None] = {"code": event.error.code, "detail": event.error.message}
            self._journal.append(Stream.AUDIT, "certificate.refused", facts)

    @property
    def due(self) -> bool:
        """Whether the certificate is to be renewed, by any way."""
        return is_due(self._validity, self._judge_at_s())

    def status(self) -> CertificateStatus:
        """Return what ``garrison-agent status`` shows of it."""
        validity, error = self._validity, self._error
        return CertificateStatus(
            not_before=None if validity is None else int(validity.start_s),
            not_after=None if validity is None else int(validity.end_s),
            renew_at=None if validity is None else int(validity.renew_at_s),
            ended=validity is None or validity.ended(self._judge_at_s()),
            failed=self._tries.failed,
            error_code=None if error is None else error.code,
            error_message=None if error is None else error.message,
        )

    def check(self) -> Check:
        """Return the doctor's finding on the renewal."""
        error = self._error
        if error is not None:
            detail = f"{self._tries.failed} failed: {error.message} [{error.code}]"
            useless = self._validity is None or self._validity.ended(self._judge_at_s())
            return Check(name="renewal", outcome="fail" if useless else "warn", detail=detail, fix=error.hint)
        due = is_due(self._validity, self._judge_at_s())
        if due and self._tries.failed:
            detail = "the newest certificate is due again at once: this board's time is ahead of the controller's"
            fix = "set the clock; if it is right, look at the time floor in `garrison-agent status`"
            return Check(name="renewal", outcome="warn", detail=detail, fix=fix)
        return Check(name="renewal", outcome="ok", detail="under way" if due else "not due yet", fix="")

    def _begin_if_due(self) -> None:
        at_s, now_s = self._judge_at_s(), self._monotonic_s()
        if self._busy or not is_due(self._validity, at_s):
            return
        if self._next_s is None:
            delay_s = wait_s(self._validity, self._tries, at_s, self._chance())
            self._next_s = now_s + delay_s
            self._timers.after(delay_s, Tick.CERTIFICATE)
        if now_s < self._next_s:
            return
        self._busy = True
        renew, post = self._renew.renew, self._post

        def job() -> None:
            try:
                renew()
            except GarrisonError as error:
                post(CertificateTried(error))
            else:
                post(CertificateTried(None))

        self._jobs.apart(job)

    def _read(self, device_cas: str = "") -> None:
        try:
            found = self._renew.read()
            if found is not None and device_cas:
                found = self._issued(found, device_cas)
        except UnavailableError as error:
            _log.error("%s. %s", error, error.hint)
            found = None
        self._sha256, self._validity = (None, None) if found is None else found

    def _issued(self, found: tuple[str, Validity], device_cas: str) -> tuple[str, Validity] | None:
        """Return ``found`` if one of ``device_cas`` issued it; each pair of them is looked at once."""
        pair = f"{found[0]} {sha256_hex(device_cas.encode())}"
        if self._database.get(_ISSUED) == pair:
            return found
        checked = self._renew.read(device_cas)
        if checked is not None:
            with contextlib.suppress(InsufficientError):  # the next start looks again
                self._database.put(_ISSUED, pair)
        return checked

    def _record(self) -> None:
        known = self._database.get(_KNOWN)
        if self._sha256 is None or self._validity is None or self._sha256 == known:
            return
        with self._database.transaction():
            self._database.put(_KNOWN, self._sha256)
            if known is not None:  # the first one came with the enrolment
                facts: dict[str, str | int | bool | None] = {
                    "sha256": self._sha256,
                    "not_before": int(self._validity.start_s),
                    "not_after": int(self._validity.end_s),
                }
                self._journal.append(Stream.AUDIT, "certificate.renewed", facts)
