"""A bundle on its way into this board: read, checked, applied, and its models fetched, by the ways of the network.

Metadata goes through the verifier, envelopes through ``Inbound`` and ``Anchors``, blobs through the download code. A
job reads the small files; then everything is as if the network had brought it, but that the bundle is looked at first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from functools import partial

from garrison_agent.api.carrier import Carrier, ImportedAlias, ImportItem, ImportProgress, ImportResult
from garrison_agent.core.slot import Slot
from garrison_agent.events import BundleRead, CertificateTried, Message, Post
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.anchor import Anchors
from garrison_agent.owner.bundle_export import Renewals
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.inbound import Inbound
from garrison_agent.owner.jobs import Jobs
from garrison_agent.owner.trust import Trust
from garrison_agent.registry.bundle_source import BundleSource, Plugged, Reader, read_whole
from garrison_protocol import bundle, topics
from garrison_protocol.bundle import Head, Kind
from garrison_protocol.errors import ConflictError, GarrisonError, InsufficientError, NotFoundError, UnavailableError
from garrison_protocol.messages.enrolment import RenewResponse
from garrison_protocol.messages.report import RegistryView
from garrison_protocol.states import DeploymentState, Stream
from garrison_protocol.topics import Down

IDLE_S = 15.0
"""An import whose command has not come to read for this long gives way to another."""
_FETCHING = frozenset({DeploymentState.ASSIGNED, DeploymentState.DOWNLOADING, DeploymentState.VERIFYING})
_RECEIPTS = {Kind.RECEIPT_AUDIT: Stream.AUDIT, Kind.RECEIPT_TELEMETRY: Stream.TELEMETRY}
_OLDER = frozenset({"registry.rollback", "desired.counter_not_newer", "desired.below_anchor", "anchor.nonce_unknown"})


class _Visit:
    """One import: its reader, what was read, and what came of it so far."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.head: Head | None = None
        self.view = RegistryView()
        self.files: dict[Kind, bytes] = {}
        self.items: list[ImportItem] = []
        self.concerned: set[str] = set()
        self.applied = False


class BundleImport:
    """At most one import at a time. Owner thread only; call ``settle`` after every event."""

    def __init__(
        self,
        *,
        device: str,
        journal: Journal,
        trust: Trust,
        anchors: Anchors,
        inbound: Inbound,
        deployments: Deployments,
        renewals: Renewals,
        plugged: Plugged,
        jobs: Jobs,
        post: Post,
        judge_at: Callable[[], datetime],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._journal = journal
        self._trust = trust
        self._anchors = anchors
        self._inbound = inbound
        self._deployments = deployments
        self._renewals = renewals
        self._plugged = plugged
        self._jobs = jobs
        self._post = post
        self._judge_at = judge_at
        self._monotonic_s = monotonic_s
        self._visit: _Visit | None = None

    def begin(self) -> Carrier:
        """Return the carrier for whoever reads the stick; the agent begins to ask at once.

        Raises:
            ConflictError: ``bundle.busy``.
        """
        if self._visit is not None:
            if self._visit.carrier.idle_s < IDLE_S:
                raise ConflictError(
                    "bundle.busy", "another bundle is being imported", hint="wait until it has ended", retryable=True
                )
            self._end(_replaced())
        carrier = Carrier()
        self._visit = _Visit(carrier)
        self._jobs.apart(partial(_read, carrier, self._device, self._post))
        return carrier

    def read(self, event: BundleRead) -> None:
        """Take in the small files, and let the verifier look at the metadata."""
        visit = self._visit
        if visit is None or event.carrier is not visit.carrier:
            return
        if event.error is not None or event.head is None:
            self._end(event.error or _replaced())
            return
        visit.head, visit.files, visit.view = event.head, dict(event.files), self._trust.view
        self._plugged.attach(BundleSource(visit.carrier))
        visit.carrier.progress = ImportProgress(phase="checking", done=0, total=0)
        self._trust.refresh()

    def metadata_checked(self, error: GarrisonError | None) -> None:
        """Apply the envelopes, once a check has ended that was the bundle's; ``error`` is why it was not taken."""
        visit = self._visit
        if visit is None or visit.head is None or visit.applied:
            return
        if not self._plugged.refreshed:
            self._trust.refresh()  # what ended was a check that had begun before
            return
        visit.applied = True
        before = {alias: slot.step for alias, slot in self._deployments.slots.items()}
        visit.items.append(_item("metadata", error, "unchanged" if self._trust.view == visit.view else "new"))
        for kind in bundle.DOWN.values():
            data = visit.files.get(kind)
            if data is not None:
                visit.items.append(self._apply(kind, data))
        self._deployments.nudge()
        slots = self._deployments.slots
        visit.concerned = {alias for alias, slot in slots.items() if slot.step != before.get(alias) or _fetching(slot)}

    def settle(self) -> None:
        """End the import once nothing needs the stick any more."""
        visit = self._visit
        if visit is None or not visit.applied:
            return
        slots = self._deployments.slots
        visit.concerned |= {alias for alias, slot in slots.items() if _fetching(slot)}
        fetching = [slots[alias] for alias in visit.concerned if _fetching(slots[alias])]
        if fetching:
            amounts = [self._deployments.progress(slot) for slot in fetching]
            visit.carrier.progress = ImportProgress(
                phase="fetching", done=sum(done for done, _ in amounts), total=sum(total for _, total in amounts)
            )
            return
        assert visit.head is not None
        head = visit.head
        self._end(
            ImportResult(
                device=self._device,
                fleet=head.fleet,
                created=head.created,
                valid_until=head.valid_until,
                items=visit.items,
                aliases=[_alias(slots[alias]) for alias in sorted(visit.concerned)],
            )
        )

    def stop(self) -> None:
        """Send whoever reads the stick away."""
        if self._visit is not None:
            self._plugged.detach()
            self._visit.carrier.end(
                UnavailableError("agent.stopping", "the agent is stopping", hint="import again", retryable=True)
            )
            self._visit = None

    def _end(self, result: ImportResult | GarrisonError) -> None:
        visit, self._visit = self._visit, None
        assert visit is not None
        self._plugged.detach()
        visit.carrier.end(result)
        facts: dict[str, str | int | bool | None] = {"code": result.code if isinstance(result, GarrisonError) else None}
        facts |= {item["what"].replace(" ", "_").replace("-", "_"): item["outcome"] for item in visit.items}
        self._journal.append(Stream.AUDIT, "bundle.imported", facts)

    def _apply(self, kind: Kind, data: bytes) -> ImportItem:
        match kind:
            case Kind.ANCHOR:
                return self._anchor(data)
            case Kind.DESIRED:
                return self._desired(data)
            case Kind.RENEWAL:
                return self._renewal(data)
        stream = _RECEIPTS[kind]
        before = self._journal.heads()[stream.value].acked
        error = self._inbound.handle(Message(topics.down(self._device, Down.RECEIPT), data))
        news = self._journal.heads()[stream.value].acked != before
        return _item(f"receipt {stream.value}", error, "new" if news else "unchanged")

    def _anchor(self, data: bytes) -> ImportItem:
        try:
            self._anchors.take(data)
        except GarrisonError as error:
            if error.code != "anchor.nonce_unknown" and not isinstance(error, InsufficientError):
                self._inbound.refuse(error, "anchor")
            return _item("anchor", error, "new")
        return _item("anchor", None, "new")

    def _desired(self, data: bytes) -> ImportItem:
        before = self._inbound.applied
        error = self._inbound.handle(Message(topics.down(self._device, Down.DESIRED), data), wait=False)
        if error is None and self._inbound.held is not None and self._inbound.applied == before:
            message = "it waits for an anchor: export this board, take that home, and come back with a new bundle"
            return ImportItem(what="desired", outcome="waiting", code="desired.waits_for_anchor", message=message)
        return _item("desired", error, "unchanged" if self._inbound.applied == before else "new")

    def _renewal(self, data: bytes) -> ImportItem:
        fleet = self._trust.fleet
        try:
            answer = bundle.parse_document(RenewResponse, data, "renew.json")
            stored = fleet is not None and self._renewals.answered(answer, fleet.device_ca, self._judge_at())
        except GarrisonError as error:
            return _item("certificate", error, "new")
        if stored:
            self._post(CertificateTried(None))
        return _item("certificate", None, "new" if stored else "unchanged")


def _read(carrier: Carrier, device: str, post: Post) -> None:
    """Read what is small: ``bundle.json`` and this board's files. Runs as a job."""
    try:
        head = bundle.parse_document(Head, _whole(carrier, bundle.HEAD), bundle.HEAD)
        files: dict[Kind, bytes] = {}
        for kind in bundle.DOWN.values():
            try:
                files[kind] = _whole(carrier, bundle.device_path(device, kind))
            except NotFoundError:
                continue
    except NotFoundError:
        error = NotFoundError(
            "bundle.incomplete",
            "there is no bundle.json: this is no bundle, or its export was cut off",
            hint="name the folder that `garrison registry export` wrote; if it was cut off, run that again",
        )
        post(BundleRead(carrier, None, {}, error))
    except GarrisonError as error:
        post(BundleRead(carrier, None, {}, error))
    else:
        post(BundleRead(carrier, head, files, None))


def _whole(reader: Reader, path: str) -> bytes:
    return read_whole(reader, path, bundle.parse(path).max_bytes)


def _fetching(slot: Slot) -> bool:
    return slot.state in _FETCHING


def _alias(slot: Slot) -> ImportedAlias:
    return ImportedAlias(
        alias=slot.alias,
        package=slot.package.id,
        state=slot.state.value,
        error_code=slot.error_code,
        error_message=slot.error_message,
    )


def _item(what: str, error: GarrisonError | None, good: str) -> ImportItem:
    if error is None:
        return ImportItem(what=what, outcome=good, code=None, message="")
    outcome = "older" if error.code in _OLDER else "refused"
    return ImportItem(what=what, outcome=outcome, code=error.code, message=error.message)


def _replaced() -> UnavailableError:
    return UnavailableError("bundle.reader_gone", "the command that read the stick has gone", hint="import again")
