"""What this board believes about the registry now, and the packages that wait for an answer from it.

One verification runs at a time. Versions and ``fleet.json`` are stored in one transaction, before they count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel

from garrison_agent.adapters.database import Database
from garrison_agent.core.slot import Event, JobFailed, MustWait
from garrison_agent.core.time_floor import CLOCK_TOLERANCE_S
from garrison_agent.events import MetadataChecked, Post
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.jobs import Jobs, Work, failure
from garrison_agent.owner.timekeeper import Timekeeper
from garrison_agent.registry.trust import Refresh, admit
from garrison_protocol.errors import GarrisonError, InsufficientError, InvalidError, RefusedError
from garrison_protocol.fleet import Fleet, FleetKey, parse_fleet
from garrison_protocol.keys import key_id
from garrison_protocol.manifest import PackageRef, target_path
from garrison_protocol.messages.report import RegistryView
from garrison_protocol.states import Freshness, KeyPurpose, Stream, WaitReason

_log = logging.getLogger(__name__)

NOT_ANCHORED = "time.not_anchored"
_KEPT = "registry.kept"
_FLEET = "registry.fleet"


class _Kept(BaseModel):
    """The last verified view, as stored."""

    freshness: Freshness
    root: int
    timestamp: int
    snapshot: int
    targets: int
    refreshed_at: int
    expires: dict[str, int] = {}


@dataclass(frozen=True)
class _Waiting:
    attempt: int
    package: PackageRef


Admitted = Callable[[int, PackageRef, bytes], Event]
"""Takes an attempt, and a package with the manifest that the signers signed; returns the deployment's event."""


class Trust:
    """The registry as this board trusts it. Owner thread only."""

    def __init__(
        self,
        *,
        database: Database,
        journal: Journal,
        jobs: Jobs,
        work: Work,
        post: Post,
        time: Timekeeper,
        pin: Callable[[Fleet], None],
    ) -> None:
        """``pin`` makes this board trust the server CAs of a verified ``fleet.json``, durably; raises GarrisonError."""
        self._pin = pin
        self._database = database
        self._journal = journal
        self._jobs = jobs
        self._work = work
        self._post = post
        self._time = time
        kept, fleet = database.get(_KEPT), database.get(_FLEET)
        self._kept = None if kept is None else _Kept.model_validate_json(kept)
        self.fleet: Fleet | None = None if fleet is None else _readable(fleet.encode())[0]
        self.freshness = Freshness.NONE if self._kept is None else Freshness.STALE
        self._waiting: dict[str, _Waiting] = {}
        self._asked: dict[str, _Waiting] = {}
        self._busy = False
        self._again = False
        self._last_error: str | None = None

    @property
    def view(self) -> RegistryView:
        """Return what status messages say of it."""
        kept = self._kept
        if kept is None:
            return RegistryView()
        return RegistryView(
            freshness=self.freshness,
            root=kept.root,
            timestamp=kept.timestamp,
            snapshot=kept.snapshot,
            targets=kept.targets,
        )

    @property
    def fresh_at_s(self) -> float:
        """When fresh metadata was last verified, in Unix seconds; 0: never."""
        return 0.0 if self._kept is None else float(self._kept.refreshed_at)

    @property
    def expires(self) -> dict[str, int]:
        """When each role of the kept metadata ends, in Unix seconds."""
        return {} if self._kept is None else dict(self._kept.expires)

    @property
    def last_error(self) -> str | None:
        """The code of the last refresh's failure; None after a success."""
        return self._last_error

    @property
    def checking(self) -> bool:
        """Whether a check is under way."""
        return self._busy

    def judge_at(self) -> datetime:
        """Return the later of clock and floor, by which everything that ends is judged. Any thread may ask."""
        return self._time.judge_at()

    def public_key(self, purpose: KeyPurpose) -> Callable[[str], str | None]:
        """Return the look-up of keys that ``fleet.json`` lets sign ``purpose`` now."""
        at = self.judge_at()
        fleet = self.fleet
        return lambda signer: None if fleet is None else fleet.public_key(purpose, signer, at)

    def director(self, signer: str) -> str | None:
        """Return the raw director key in hex whose id is ``signer``, unless it is unknown or has ended.

        For anchors: its first day may still seem to lie ahead, as long as this board does not know how late it is.
        """
        key = self._director(signer)
        return None if key is None or key.not_after < self.judge_at() else key.public

    def may_say(self, signer: str, time_s: int) -> bool:
        """Tell whether the validity of director key ``signer`` covers ``time_s``, which it signed."""
        key = self._director(signer)
        return key is not None and key.not_before.timestamp() <= time_s <= key.not_after.timestamp()

    @property
    def director_ids(self) -> frozenset[str]:
        """The ids of every director key in ``fleet.json``, valid now or not."""
        return _directors(self.fleet)

    def _director(self, signer: str) -> FleetKey | None:
        keys = () if self.fleet is None else self.fleet.keys
        listed = (key for key in keys if key.purpose is KeyPurpose.DIRECTOR and key_id(key.public) == signer)
        return max(listed, key=lambda key: key.not_after, default=None)

    def resolve(self, alias: str, attempt: int, package: PackageRef) -> None:
        """Find out whether ``package`` may be installed; ``checked`` will tell."""
        self._waiting[alias] = _Waiting(attempt, package)
        self.refresh()

    def refresh(self) -> None:
        """Ask the controller for newer metadata; once more if a check is under way already."""
        if self._busy:
            self._again = True
        else:
            self._start(online=True)

    def look(self) -> None:
        """Check what is kept on the disk, without a network."""
        if not self._busy:
            self._start(online=False)

    def checked(self, event: MetadataChecked, admitted: Admitted) -> dict[str, Event]:
        """Take in the outcome of a check; return the event of each deployment that asked for it."""
        self._busy = False
        view, error = self._record(event.view, event.error)
        answers: dict[str, Event] = {}
        for alias, waiting in self._asked.items():
            if self._waiting.get(alias) == waiting:
                del self._waiting[alias]
                answers[alias] = self._answer(waiting, view, error, admitted)
        self._asked = {}
        if self._again or self._waiting:
            self._again = False
            self._start(online=True)
        return answers

    def _start(self, *, online: bool) -> None:
        self._busy = True
        self._asked = dict(self._waiting) if online else {}
        want = sorted({target_path(one.package.name, one.package.version) for one in self._asked.values()})
        high_water = self._high_water()
        trusted_at = 0 if self._kept is None else self._kept.refreshed_at
        work, post = self._work, self._post
        floor_s, doubts = self._time.floor_s(), self._time.doubts()
        ahead = self._time.clock_s < floor_s - CLOCK_TOLERANCE_S

        def job() -> None:
            error: GarrisonError | None = None
            if online:
                try:
                    post(MetadataChecked(work.refresh(want, high_water, floor_s), None))
                    return
                except GarrisonError as refused:
                    error = refused
                # Whoever signed our time may have lied, also so that every server's certificate seems to have ended.
                # Newer metadata says so by no longer naming that key; a thief may have had several.
                doubted = error.code == "registry.expired" or (ahead and error.code == "source.unreachable")
                for gone, doubted_floor_s in doubts if doubted else ():
                    try:
                        view = work.refresh(want, high_water, doubted_floor_s)
                    except GarrisonError:
                        continue  # expired without those keys' word as well; the first error says it
                    fleet = None if view.fleet is None else _readable(view.fleet)[0]
                    if fleet is not None and not gone & _directors(fleet):
                        post(MetadataChecked(view, None))
                        return
            try:
                post(MetadataChecked(work.offline(want, high_water, trusted_at, floor_s), error))
            except GarrisonError as nothing:
                post(MetadataChecked(None, error or nothing))

        self._jobs.apart(job)

    def _high_water(self) -> dict[str, int]:
        rows = self._database.connection.execute("SELECT role, version FROM high_water")
        return {str(role): int(version) for role, version in rows}

    def _record(self, view: Refresh | None, error: GarrisonError | None) -> tuple[Refresh | None, GarrisonError | None]:
        """Store the outcome of a check; return what of it counts."""
        fleet, unusable = None, None
        if view is not None and view.fleet is not None:
            fleet, unusable = _readable(view.fleet)
        if fleet is not None:
            try:
                self._pin(fleet)  # first: what this board says that it holds, it goes by already
            except InvalidError as no_pem:
                unusable = no_pem
            except GarrisonError as unwritten:
                view, fleet, error = None, None, unwritten
        outcome = view, error
        error = error or unusable
        code = None if error is None else error.code
        refused = error if isinstance(error, RefusedError | InvalidError) and code != self._last_error else None
        # The hour of the last refresh alone is no decision: a full disk may lose it.
        spare = refused is None and (view is None or not self._changed(_kept(view)))
        try:
            with self._database.transaction(spare=spare):
                if view is not None:
                    self._keep(_kept(view), view, fleet)
                if refused is not None:
                    facts: dict[str, str | int | bool | None] = {"code": refused.code, "detail": refused.message}
                    self._journal.append(Stream.AUDIT, "metadata.refused", facts)
        except InsufficientError as full:
            if not spare:
                raise
            _log.error("%s. %s", full, full.hint)
        self._last_error = code
        if view is not None:
            self.freshness = view.freshness
            if fleet is not None:
                self.fleet = fleet
        elif self._kept is not None:
            self.freshness = Freshness.STALE
        return outcome

    def _changed(self, kept: _Kept) -> bool:
        """Tell whether more than time has passed since what is stored."""
        passing = {"refreshed_at", "expires"}
        return self._kept is None or self._kept.model_dump(exclude=passing) != kept.model_dump(exclude=passing)

    def _keep(self, kept: _Kept, view: Refresh, fleet: Fleet | None) -> None:
        changed = self._changed(kept)
        if not changed and self._kept is not None and view.refreshed_at == self._kept.refreshed_at:
            return
        self._kept = kept
        self._database.put(_KEPT, kept.model_dump_json())
        for role, version in view.high_water.items():
            self._database.connection.execute("INSERT OR REPLACE INTO high_water VALUES (?, ?)", (role, version))
        if view.fleet is not None and fleet is not None:
            self._database.put(_FLEET, view.fleet.decode())
        if changed:
            facts: dict[str, str | int | bool | None] = {"freshness": view.freshness.value, **view.high_water}
            self._journal.append(Stream.AUDIT, "metadata.refreshed", facts)

    def _answer(
        self, waiting: _Waiting, view: Refresh | None, error: GarrisonError | None, admitted: Admitted
    ) -> Event:
        attempt, package = waiting.attempt, waiting.package
        if view is not None:
            path = target_path(package.name, package.version)
            if self._time.uncertain:
                return MustWait(
                    attempt,
                    WaitReason.METADATA_STALE,
                    NOT_ANCHORED,
                    "the clock is wrong, and the controller has not told the time since the agent started",
                )
            try:
                admit(view, package)
                return admitted(attempt, package, view.manifests[path])
            except GarrisonError as refused:
                if error is None:
                    return failure(attempt, refused)
        if error is None:
            return JobFailed(attempt, "registry.damaged", "the registry's metadata could not be checked")
        unreachable = error.retryable or not error.code.startswith("registry.")
        reason = WaitReason.NETWORK if unreachable else WaitReason.METADATA_STALE
        return MustWait(attempt, reason, error.code, error.message)


def _kept(view: Refresh) -> _Kept:
    """Return what is stored of ``view``."""
    return _Kept(
        freshness=view.freshness, refreshed_at=view.refreshed_at, expires=dict(view.expires), **view.high_water
    )


def _readable(fleet: bytes) -> tuple[Fleet | None, GarrisonError | None]:
    """Return what ``fleet.json`` says, or why this version cannot read it: the signers may be ahead of this board."""
    try:
        return parse_fleet(fleet), None
    except GarrisonError as error:
        return None, error


def _directors(fleet: Fleet | None) -> frozenset[str]:
    """Return the ids of the director keys that ``fleet`` lists."""
    keys = () if fleet is None else fleet.keys
    return frozenset(key_id(key.public) for key in keys if key.purpose is KeyPurpose.DIRECTOR)
