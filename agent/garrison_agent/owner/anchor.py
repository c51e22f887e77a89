"""Anchors: the controller's signed answer to a nonce of this board (docs/protocol.md, "Anchor").

From one come the time that has passed for certain, the lowest desired state that a board without one may take, and
whether this store is the one that the controller knows.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from garrison_agent.adapters.database import Database
from garrison_agent.core.recovery import Fit, compare
from garrison_agent.events import AnchorAnswered, Post, Tick
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.jobs import Jobs
from garrison_agent.owner.timekeeper import Timekeeper
from garrison_agent.owner.timers import Timers
from garrison_agent.owner.trust import Trust
from garrison_protocol.envelope import unseal
from garrison_protocol.errors import GarrisonError, InsufficientError, InvalidError, RefusedError
from garrison_protocol.messages.anchor import ANCHOR_KIND, Anchor, Committed
from garrison_protocol.messages.base import parse_message
from garrison_protocol.states import Stream

NONCE_BYTES = 16
RETRY_S = 15.0
RETRY_MAX_S = 900.0
_DESIRED = "desired.anchor"
_CARRIED = "anchor.carried"
_log = logging.getLogger(__name__)

Carrier = Callable[[str], bytes]
"""Brings a nonce to the controller and returns its answer, an envelope; blocks. Raises GarrisonError."""


@dataclass(frozen=True, slots=True)
class _Lowest:
    """The newest desired state that the controller had signed, and which key says so."""

    signer: str
    counter: int


class Anchors:
    """Asks for anchors and takes them in. Owner thread only.

    ``enrolled`` gives nonce and anchor of an offline enrolment, once. ``refused`` is told of an answer that cannot be
    believed; ``taken`` is called after one was, with whether a new epoch was opened.
    """

    def __init__(
        self,
        *,
        device: str,
        database: Database,
        journal: Journal,
        trust: Trust,
        time: Timekeeper,
        jobs: Jobs,
        timers: Timers,
        post: Post,
        carrier: Carrier,
        enrolled: Callable[[], tuple[str, bytes] | None],
        refused: Callable[[GarrisonError], None],
        taken: Callable[[bool], None],
    ) -> None:
        self._device = device
        self._database = database
        self._journal = journal
        self._trust = trust
        self._time = time
        self._jobs = jobs
        self._timers = timers
        self._post = post
        self._carrier = carrier
        self._enrolled = enrolled
        self._refused = refused
        self._taken = taken
        lowest = database.get(_DESIRED)
        self._lowest = None if lowest is None else _readable(lowest)
        self._nonce: str | None = None
        self._enrolment_nonce: str | None = None
        self._again = False
        self._pending: bytes | None = None
        """An answer by a key that may be newer than our ``fleet.json``."""
        self._failures = 0
        self._retry_set = False
        self._reopened = False
        """Once is enough between two starts: nobody who lies about our rows makes us begin anew again and again."""

    @property
    def lowest_counter(self) -> int | None:
        """The lowest counter of a desired state that may be taken; None: no anchor has told yet."""
        return None if self._lowest is None else self._lowest.counter

    @property
    def last_signer(self) -> str | None:
        """The id of the key that signed the newest anchor believed, as long as it is a director's."""
        return None if self._lowest is None else self._lowest.signer

    def ask(self) -> None:
        """Ask for an anchor now; while one is under way, once more after it."""
        if self._nonce is not None:
            self._again = True
            return
        nonce = self._nonce = os.urandom(NONCE_BYTES).hex()
        carrier, post = self._carrier, self._post

        def job() -> None:
            try:
                post(AnchorAnswered(carrier(nonce), None))
            except GarrisonError as error:
                post(AnchorAnswered(None, error))

        self._jobs.apart(job)

    def wanted(self) -> None:
        """Ask, unless that is under way or waits for its time: whoever repeats a message must not set the pace."""
        if self._nonce is None and not self._retry_set:
            self.ask()

    def answered(self, event: AnchorAnswered) -> None:
        """Take in what the carrier brought; ask again later if that was nothing to believe."""
        if event.envelope is not None:
            self._judge(event.envelope, last=False)
        else:
            self._retry()
            self._over()

    def take(self, envelope: bytes) -> Anchor:
        """Believe an anchor from any carrier, if it answers a nonce that is open, and return it.

        Raises:
            RefusedError: ``anchor.nonce_unknown`` (answered before, never asked, or overtaken by a newer anchor),
                ``anchor.beyond_key``; those of ``envelope.unseal``.
            InvalidError: ``envelope.kind_unexpected``, ``message.malformed``, ``message.misaddressed``.
            InsufficientError: ``disk.full``; nothing was stored.
        """
        opened = unseal(envelope, self._trust.director)
        if opened.kind != ANCHOR_KIND:
            raise InvalidError("envelope.kind_unexpected", f"a {opened.kind[:40]!r} message where an anchor is due")
        anchor = parse_message(Anchor, opened.body, device=self._device)
        if anchor.nonce not in (self._nonce, self._enrolment_nonce, self._database.get(_CARRIED)):
            raise RefusedError(
                "anchor.nonce_unknown",
                "this anchor answers no open question of this board",
                hint="somebody repeats an old answer, or a stick came back late; the board asks again by itself",
            )
        if not self._trust.may_say(opened.key_id, anchor.time):
            raise RefusedError(
                "anchor.beyond_key",
                f"the anchor's time {anchor.time} lies outside of the validity of the key that signed it",
                hint="check the controller's clock; if it is right, replace the director key "
                "(`garrison serve rotate-key director`)",
                signer=opened.key_id,
            )
        # The newest anchor counts, even with a lower counter: a controller may have been put back from a backup.
        lowest = _Lowest(signer=opened.key_id, counter=anchor.desired_counter)
        with self._database.transaction():
            floor = self._time.note(opened.key_id, anchor.time)
            if lowest != self._lowest:
                self._database.put(_DESIRED, json.dumps(asdict(lowest)))
            if self._database.get(_CARRIED) is not None:
                self._database.put(_CARRIED, "")
            reopened = self._compare(anchor.streams)
        # Only now: a full disk takes all of it back.
        self._reopened = self._reopened or reopened
        self._lowest = lowest
        jumped = self._time.believe(floor)
        if anchor.nonce == self._nonce:
            self._nonce = None
        if jumped:
            self._trust.refresh()
        self._taken(reopened)
        return anchor

    def carried_nonce(self) -> str:
        """Return a new nonce for an answer that somebody carries here; it stays open across restarts.

        It replaces the one before, and is void once a newer anchor has come another way.
        """
        nonce = os.urandom(NONCE_BYTES).hex()
        self._database.put(_CARRIED, nonce)
        return nonce

    def metadata_checked(self) -> None:
        """Follow ``fleet.json``: forget what keys said that are gone, and look at what a new one may have signed."""
        if self._pending is not None:
            envelope, self._pending = self._pending, None
            self._judge(envelope, last=True)
        if self._trust.fleet is None:
            return
        if self._lowest is None:
            self._take_enrolled()
        keys = self._trust.director_ids
        fell = self._time.listed(keys)
        if self._lowest is not None and self._lowest.signer not in keys:
            self._database.put(_DESIRED, "")
            self._lowest, fell = None, True
        if fell:
            self.ask()

    def retry_due(self) -> None:
        """The timer of ``_retry`` ran out."""
        self._retry_set = False
        self.ask()

    def _take_enrolled(self) -> None:
        """Begin with the anchor that an offline enrolment brought, if it did."""
        try:
            enrolled = self._enrolled()
            if enrolled is not None:
                self._enrolment_nonce, envelope = enrolled
                self.take(envelope)
        except GarrisonError as error:
            self._refused(error)
        finally:
            self._enrolment_nonce = None

    def _judge(self, envelope: bytes, *, last: bool) -> None:
        """Take ``envelope`` in; ``last``: newer metadata than this board has now will not come for it."""
        try:
            self.take(envelope)
            self._failures = 0
        except InsufficientError as error:
            _log.error("%s. %s", error, error.hint)
            self._retry()
        except GarrisonError as error:
            if error.code == "envelope.key_unknown" and not last:
                self._pending = envelope
                self._trust.refresh()
                return
            if self._trust.fleet is not None:  # without it no key is known, and nobody is to blame
                self._refused(error)
            self._retry()
        self._over()

    def _over(self) -> None:
        """The question that was under way is settled; ask the next, if somebody wanted one meanwhile."""
        self._nonce = None
        if self._again:
            self._again = False
            self.ask()

    def _retry(self) -> None:
        if not self._retry_set:
            self._retry_set = True
            self._timers.after(min(RETRY_MAX_S, RETRY_S * 2.0 ** min(self._failures, 16)), Tick.ANCHOR)
        self._failures += 1

    def _compare(self, theirs: Mapping[str, Committed]) -> bool:
        """Compare this store with what the controller has of it; tell whether a new epoch had to be opened."""
        heads, earlier = self._journal.heads(), self._journal.earlier
        fits = {}
        for stream in Stream:

            def hash_of(seq: int, stream: Stream = stream) -> str | None:
                return self._journal.hash_of(stream, seq)

            fits[stream] = compare(heads[stream.value], theirs.get(stream.value), hash_of, earlier)
        if Fit.OLDER in fits.values() and not self._reopened:
            count = self._journal.reopen("older_store", theirs)
            _log.warning("the store is older than what the controller has: new epoch, %d rows go again", count)
            return True
        if Fit.NEW in fits.values():
            self._journal.note_lost(theirs)
        return False


def _readable(text: str) -> _Lowest | None:
    try:
        stored = json.loads(text)
        return _Lowest(str(stored["signer"]), int(stored["counter"]))
    except (ValueError, KeyError, TypeError):
        return None  # it was taken back, or is damaged: without it this board asks anew
