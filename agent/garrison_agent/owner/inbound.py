"""What comes down: opened, checked, and applied or refused, counted, and recorded. Nothing here can end the agent."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from garrison_agent.adapters.database import Database
from garrison_agent.core.desired import Applied, Verdict, judge
from garrison_agent.core.slot import Now
from garrison_agent.events import Message
from garrison_agent.outbox.journal import Journal, ReceiptOutcome
from garrison_agent.owner.anchor import Anchors
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.trust import Trust
from garrison_agent.owner.uplink import Uplink
from garrison_protocol import topics
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.envelope import Opened, unseal
from garrison_protocol.errors import GarrisonError, InsufficientError, InvalidError, RefusedError
from garrison_protocol.messages import desired as desired_state
from garrison_protocol.messages import streams
from garrison_protocol.messages.base import parse_message
from garrison_protocol.states import KeyPurpose, Stream

_log = logging.getLogger(__name__)

RECORD_EVERY_S = 60.0
"""A flood of bad messages is counted, but leaves one audit entry per code in this time."""
COUNT_EVERY_S = 1.0
HINTS, HINTS_IN_S = 6, 60.0
"""At most so many checks of metadata in so many seconds for hints, which nobody signed: each takes a core a second."""
_COUNTER, _DIGEST = "desired.counter", "desired.sha256"


class Inbound:
    """Desired state, receipts, and notices of new metadata. Owner thread only."""

    def __init__(
        self,
        *,
        device: str,
        database: Database,
        journal: Journal,
        trust: Trust,
        anchors: Anchors,
        deployments: Deployments,
        uplink: Uplink,
        now: Callable[[], Now],
    ) -> None:
        self._device = device
        self._database = database
        self._journal = journal
        self._trust = trust
        self._anchors = anchors
        self._deployments = deployments
        self._uplink = uplink
        self._now = now
        self.applied = Applied(int(database.get(_COUNTER) or 0), database.get(_DIGEST))
        rows = database.connection.execute("SELECT code, count FROM refusal").fetchall()
        self.refused: dict[str, int] = {str(code): int(count) for code, count in rows}
        """Refused messages by code since the store began."""
        self._uncounted: set[str] = set()
        self._counted_at = float("-inf")
        self._recorded_at: dict[str, float] = {}
        self._pending: bytes | None = None
        self._held: tuple[int, bytes] | None = None
        """The newest desired state that waits for an anchor: its counter, and the envelope."""
        self._notice: str | None = None
        self._looked_at: deque[float] = deque(maxlen=HINTS)
        self._look_due = False

    def handle(self, message: Message, *, wait: bool = True) -> GarrisonError | None:
        """Apply one message, or refuse it and return why; with ``wait``, one by an unknown key after newer metadata."""
        if message.topic == topics.REGISTRY_TIMESTAMP:
            self._notify(message.payload)
            return None
        try:
            topic = topics.parse(message.topic)
            if topic.device != self._device:
                raise InvalidError("message.misaddressed", f"a message for {topic.device}", device=topic.device)
            match topic.kind:
                case topics.Down.DESIRED:
                    if message.payload:  # an empty one means that nothing is retained any more
                        self._desired(message.payload, wait=wait)
                case topics.Down.RECEIPT:
                    self._receipt(message.payload)
                case _:
                    raise InvalidError("topic.unexpected", f"boards send {topic.kind.value}, they do not get it")
        except InsufficientError as error:  # not the message's fault; it comes again until it is answered
            _log.error("%s. %s", error, error.hint)
            return error
        except GarrisonError as error:
            self.refuse(error, message.topic)
            return error
        return None

    def metadata_checked(self, error: GarrisonError | None) -> None:
        """Judge a desired state again that was signed by a key unknown until now."""
        if self._pending is None or error is not None:
            return
        payload, self._pending = self._pending, None
        self._judge_again(payload)

    def anchored(self) -> None:
        """Judge a desired state again that waited for an anchor."""
        if self._held is not None:
            (_, payload), self._held = self._held, None
            self._judge_again(payload)

    def beat(self) -> None:
        """Follow a hint that came amid too many. At every heartbeat."""
        if self._look_due:
            self._look()

    @property
    def held(self) -> int | None:
        """The counter of the desired state that waits for an anchor, if one does."""
        return None if self._held is None else self._held[0]

    def _judge_again(self, payload: bytes) -> None:
        try:
            self._desired(payload, wait=False)
        except InsufficientError as full:
            _log.error("%s. %s", full, full.hint)
        except GarrisonError as refused:
            if refused.code == "envelope.key_unknown" and (self._trust.checking or self._look_due):
                self._pending = payload  # the check that ended had begun before; the next one may know the key
                return
            self.refuse(refused, topics.down(self._device, topics.Down.DESIRED))

    def count(self) -> None:
        """Store the counts of refused messages that are not stored yet."""
        if not self._uncounted:
            return
        with self._database.transaction(spare=True):
            for code in self._uncounted:
                self._database.connection.execute(
                    "INSERT OR REPLACE INTO refusal VALUES (?, ?)", (code, self.refused[code])
                )
        self._uncounted.clear()
        self._counted_at = self._now().monotonic_s

    def _notify(self, payload: bytes) -> None:
        """Fetch metadata when the notice differs from the last one. It is a hint; nothing in it is believed."""
        digest = sha256_hex(payload)
        if payload and digest != self._notice:
            self._notice = digest
            self._look()

    def _look(self) -> None:
        """Fetch metadata because of a hint, which anybody on the way may give: a flood of them sets no pace."""
        now_s = self._now().monotonic_s
        self._look_due = len(self._looked_at) == HINTS and now_s - self._looked_at[0] < HINTS_IN_S
        if not self._look_due:
            self._looked_at.append(now_s)
            self._trust.refresh()

    def _open(self, payload: bytes, purpose: KeyPurpose, kind: str) -> Opened:
        opened = unseal(payload, self._trust.public_key(purpose))
        if opened.kind != kind:
            raise InvalidError("envelope.kind_unexpected", f"a {opened.kind[:40]!r} message where {kind} is due")
        return opened

    def _desired(self, payload: bytes, *, wait: bool) -> None:
        try:
            opened = self._open(payload, KeyPurpose.DIRECTOR, desired_state.KIND)
        except RefusedError as error:
            if wait and error.code == "envelope.key_unknown":
                self._pending = payload  # the key may be newer than our fleet.json
                self._look()
                return
            raise
        desired = parse_message(desired_state.Desired, opened.body, device=self._device)
        digest = sha256_hex(opened.body)
        facts: dict[str, str | int | bool | None] = {"counter": desired.counter, "sha256": digest}
        match judge(self.applied, desired.counter, digest, self._anchors.lowest_counter):
            case Verdict.REPEATED:
                return
            case Verdict.OLDER:
                raise RefusedError(
                    "desired.counter_not_newer",
                    f"desired state {desired.counter} came after {self.applied.counter}",
                    counter=desired.counter,
                )
            case Verdict.HOLD:
                if self._held is None or desired.counter >= self._held[0]:
                    self._held = (desired.counter, payload)
                self._anchors.wanted()
            case Verdict.BELOW_ANCHOR:
                raise RefusedError(
                    "desired.below_anchor",
                    f"desired state {desired.counter} is older than {self._anchors.lowest_counter}, "
                    "which the controller had signed for this board",
                    counter=desired.counter,
                )
            case Verdict.CONFLICT:
                self._record("alarm.desired_conflict", "alarm.desired_conflict", facts)
                raise RefusedError(
                    "desired.conflict",
                    f"there are two desired states with the counter {desired.counter}",
                    counter=desired.counter,
                )
            case Verdict.ACCEPT:

                def store() -> None:
                    self._database.put(_COUNTER, str(desired.counter))
                    self._database.put(_DIGEST, digest)
                    self._journal.append(
                        Stream.AUDIT,
                        "desired.accepted",
                        {**facts, "aliases": len(desired.aliases), "signer": opened.key_id},
                    )

                self._deployments.apply(desired, store)
                self.applied = Applied(desired.counter, digest)
                self._uplink.changed()

    def _receipt(self, payload: bytes) -> None:
        if self._trust.fleet is None:
            return  # nobody's key is known yet; the rows go again, and so will the receipt
        opened = self._open(payload, KeyPurpose.RECEIPT, streams.RECEIPT_KIND)
        outcome = self._uplink.received(parse_message(streams.Receipt, opened.body, device=self._device))
        if outcome is ReceiptOutcome.ALARM:
            self._anchors.wanted()  # it may be this store that is wrong

    def refuse(self, error: GarrisonError, topic: str) -> None:
        """Count and record that what came from ``topic`` is not believed."""
        self.refused[error.code] = self.refused.get(error.code, 0) + 1
        self._uncounted.add(error.code)
        kind = "desired.refused" if topic.endswith(f"/{topics.Down.DESIRED.value}") else "message.refused"
        facts: dict[str, str | int | bool | None] = {
            "code": error.code,
            "topic": topic[: topics.MAX_TOPIC_LENGTH],
            "detail": error.message[:300],
        }
        try:
            with self._database.transaction(spare=True):
                self._record(f"{kind} {error.code}", kind, facts)
                if self._now().monotonic_s - self._counted_at >= COUNT_EVERY_S:
                    self.count()
        except InsufficientError as full:  # strangers must not end an agent whose disk is full
            self._uncounted.add(error.code)
            _log.error("%s. %s", full, full.hint)
        self._uplink.progressed()

    def _record(self, key: str, kind: str, facts: dict[str, str | int | bool | None]) -> None:
        now_s = self._now().monotonic_s
        if now_s - self._recorded_at.get(key, float("-inf")) >= RECORD_EVERY_S:
            self._recorded_at[key] = now_s
            self._journal.append(Stream.AUDIT, kind, facts)
