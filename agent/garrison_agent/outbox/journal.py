"""The board's two upward streams: the chained audit log and telemetry (docs/protocol.md, "Streams and receipts").

An append that returned survives SIGKILL and power cuts (``adapters.database``: synchronous=FULL). Appends inside one
caller's transaction share one fsync. The owner thread calls everything here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import NamedTuple

from garrison_agent.adapters.database import Database
from garrison_protocol import chain
from garrison_protocol.chain import Entry
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError
from garrison_protocol.messages.anchor import Committed
from garrison_protocol.messages.report import Head
from garrison_protocol.messages.streams import MAX_ROWS, Batch, Receipt, Row
from garrison_protocol.states import Stream

EPOCH_BYTES = 8
MAX_ENTRY_BYTES = 160 * 1024
"""Header and body together. Even if no byte of it compresses and every one must be escaped, it fits an envelope."""
MAX_BATCH_BYTES = 380_000
"""Encoded rows of a batch: with base64 (4/3), incompressible, and sealed, still below the envelope's 512 KiB."""
KEPT_AFTER_THINNING = 0.9
"""Thinning goes below its cap, so that it (and its audit entry) happens once in a while, not with every row."""
SEGMENT_KIND = "inference.segment"

_ROW_OVERHEAD = len('{"header":,"body":,"salt":""},') + 2 * chain.SALT_BYTES
_CHAINED = frozenset({Stream.AUDIT})
_OWN_KEYS = frozenset("denypct")
"""Of a header; the rest are facts."""
_EARLIER = "journal.earlier"
MAX_EARLIER = 64
"""Epochs of before that are remembered."""
_REPEAT = "journal.repeat"
"""Stream, epoch, and last number repeated, of what still goes again."""
REPEATED_AT_ONCE = 200


class ReceiptOutcome(StrEnum):
    """What a receipt meant here."""

    ADVANCED = "advanced"
    """It covers rows that no receipt covered before."""
    REPEATED = "repeated"
    """Nothing new."""
    RESEND = "resend"
    """The controller lacks rows from ``up_to + 1`` on."""
    WRONG_EPOCH = "wrong_epoch"
    """It speaks of another life of this store; ignored."""
    ALARM = "alarm"
    """It covers rows that this board never wrote, or other contents: somebody forged or forked the record."""


class _Newest(NamedTuple):
    """The head of a stream: what the next row follows."""

    epoch: str
    seq: int
    hash: str


class Journal:
    """Appends, reads, and acknowledges the rows of both streams."""

    def __init__(
        self,
        database: Database,
        device: str,
        *,
        now_ms: Callable[[], int],
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Open the streams of ``device``; a new store gets a new epoch and its first audit entry.

        Raises:
            ConflictError: ``journal.other_device``: the store holds another board's record.
            GarrisonError: ``journal.damaged``: the newest audit entry is not the one that the store remembers.
        """
        self._database = database
        self._device = device
        self._now_ms = now_ms
        self._random_bytes = random_bytes
        self._remembered: dict[Stream, _Newest] = {}  # maybe rolled back since: `_move_head` finds out
        with database.transaction():
            owner = database.get("journal.device")
            if owner is None:
                self._open_epoch({"reason": "new_store"})
                database.put("journal.device", device)
            elif owner != device:
                raise ConflictError(
                    "journal.other_device",
                    f"{database.path} holds the record of {owner}, not of {device}",
                    hint="give each board a state folder of its own, or move the old one away",
                )
        self._check_head()

    def append(
        self,
        stream: Stream,
        kind: str,
        facts: dict[str, str | int | bool | None],
        body: object | None = None,
        *,
        spare: bool = False,
    ) -> Entry:
        """Return the new newest row of ``stream``, once it is as durable as the transaction it stands in.

        ``facts`` go into the header (keys of two letters or more); ``body`` is hidden behind a salted commitment, so
        that it can be erased later. Both hold strings, integers, booleans, null; no floats. A ``spare`` row can be
        done without where room is scarce.

        Raises:
            InsufficientError: ``disk.full``.
            InvalidError: ``journal.entry_too_large`` (above ``MAX_ENTRY_BYTES``).
            ValueError: A fact or body is not canonical JSON; a bug.
        """
        with self._database.transaction(spare=spare):
            entry = self._append_at(stream, kind, facts, body, time_ms=self._now_ms())
            size = len(entry.header.encode()) + len((entry.body or "").encode())
            if size > MAX_ENTRY_BYTES:
                raise InvalidError("journal.entry_too_large", f"an entry {kind} of {size} bytes", kind=kind, size=size)
        return entry

    def heads(self) -> dict[str, Head]:
        """Return the newest row of each stream and how far receipts cover it."""
        heads = {}
        for stream in Stream:
            epoch, seq, digest, acked = self._stream(stream)
            heads[stream.value] = Head(epoch=epoch, seq=seq, hash=digest, acked=acked)
        return heads

    def pending(self) -> dict[str, int]:
        """Return per stream how many rows no receipt covers yet."""
        counts = self._database.connection.execute(
            "SELECT s.stream, (SELECT count(*) FROM entry e"
            " WHERE e.stream = s.stream AND e.epoch = s.epoch AND e.seq > s.acked) FROM stream s"
        )
        return {str(stream): int(count) for stream, count in counts}

    def batch(
        self, stream: Stream, after: int, *, max_bytes: int = MAX_BATCH_BYTES, max_rows: int = MAX_ROWS
    ) -> Batch | None:
        """Return the next committed rows behind number ``after``, or None if there are none.

        At most ``max_rows`` consecutive rows and ``max_bytes`` of encoded text, but at least one row; it ends where
        thinned rows left a gap.

        Raises:
            RuntimeError: A transaction is open. Rows that may still be rolled back must not leave the board: their
                numbers would come again with other contents.
        """
        if self._database.connection.in_transaction:
            raise RuntimeError("a batch is read while a transaction is open")
        epoch, _, _, _ = self._stream(stream)
        cursor = self._database.connection.execute(
            "SELECT seq, header, body, salt FROM entry WHERE stream = ? AND epoch = ? AND seq > ? ORDER BY seq LIMIT ?",
            (stream.value, epoch, after, min(max_rows, MAX_ROWS)),
        )
        first, size, rows = 0, 0, list[Row]()
        for seq, header, body, salt in cursor:
            size += _encoded_size(header) + _encoded_size(body) + _ROW_OVERHEAD
            if rows and (size > max_bytes or seq != first + len(rows)):
                break
            first = first or seq
            rows.append(Row(header=header, body=body, salt=salt))
        cursor.close()
        if not rows:
            return None
        return Batch(
            device=self._device,
            sent_at=self._now_ms(),
            stream=stream,
            epoch=epoch,
            first=first,
            dropped=first - after - 1,
            rows=tuple(rows),
        )

    def acknowledge(self, receipt: Receipt) -> ReceiptOutcome:
        """Take in a receipt whose signature and device were verified.

        Acknowledged audit rows stay: a controller restored from an old backup asks for them again.
        """
        with self._database.transaction():
            epoch, head, _, acked = self._stream(receipt.stream)
            if receipt.epoch != epoch:
                return ReceiptOutcome.WRONG_EPOCH
            reason = self._contradiction(receipt, epoch, head)
            if reason is not None:
                self._raise_alarm(receipt, reason)
                return ReceiptOutcome.ALARM
            if receipt.up_to > acked:
                self._database.connection.execute(
                    "UPDATE stream SET acked = ? WHERE stream = ?", (receipt.up_to, receipt.stream.value)
                )
            if receipt.resend:
                return ReceiptOutcome.RESEND
            return ReceiptOutcome.ADVANCED if receipt.up_to > acked else ReceiptOutcome.REPEATED

    def thin(self, *, telemetry_rows: int, segment_bodies: int | None = None) -> int:
        """Keep the outbox within its caps and return how many rows and bodies went; the audit chain says which.

        Telemetry rows above the cap go, the oldest (those that receipts cover) first. So do the *bodies* of inference
        segments above theirs (None: no cap); the headers stay, so the chain still verifies. Every other audit entry
        is kept for ever.

        Raises:
            InsufficientError: ``disk.full``; what is too much stays until there is room to say what went.
        """
        with self._database.transaction(spare=True):
            gone = self._thin_telemetry(telemetry_rows)
            if segment_bodies is not None:
                gone += self._thin_segments(segment_bodies)
        return gone

    @property
    def earlier(self) -> tuple[str, ...]:
        """The epochs that came before the present one, as far as this store knows."""
        return tuple((self._database.get(_EARLIER) or "").split())

    def hash_of(self, stream: Stream, seq: int) -> str | None:
        """Return the hash of a row of the present epoch, None where it was thinned (or never was)."""
        epoch, _, _, _ = self._stream(stream)
        row = self._database.connection.execute(
            "SELECT hash FROM entry WHERE stream = ? AND epoch = ? AND seq = ?", (stream.value, epoch, seq)
        ).fetchone()
        return None if row is None else str(row[0])

    def note_lost(self, theirs: Mapping[str, Committed]) -> None:
        """Record that this store replaces one that was lost, whose newest rows at the controller are ``theirs``."""
        with self._database.transaction():
            self.append(Stream.AUDIT, "epoch.recovery", {"reason": "store_lost", **_named(theirs)})
            self._remember([head.epoch for head in theirs.values()])

    def reopen(self, reason: str, theirs: Mapping[str, Committed]) -> int:
        """Begin a new epoch, since numbers of the present one are taken by other rows; return how many rows go again.

        Its first entry names both sides' newest rows. Rows that no receipt covers follow with ``repeat``: some may have
        arrived before, none is lost. Audit entries stay under their old numbers too.
        """
        with self._database.transaction():
            before = {stream: self._stream(stream) for stream in Stream}
            self._open_epoch(
                {
                    "reason": reason,
                    **{
                        f"{stream.value}_{name}": value
                        for stream, (epoch, seq, digest, _) in before.items()
                        for name, value in (("before", epoch), ("last", seq), ("hash", digest))
                    },
                    **_named(theirs),
                }
            )
            self._remember([epoch for epoch, _, _, _ in before.values()] + [head.epoch for head in theirs.values()])
            left = [(stream.value, epoch, acked) for stream, (epoch, _, _, acked) in before.items()]
            self._database.put(_REPEAT, json.dumps([*self._repeats(), *left]))
            counts = [
                self._database.connection.execute(
                    "SELECT count(*) FROM entry WHERE stream = ? AND epoch = ? AND seq > ?", place
                ).fetchone()[0]
                for place in left
            ]
        return sum(counts)

    @property
    def repeating(self) -> bool:
        """Whether rows of an earlier epoch still have to go again."""
        return bool(self._repeats())

    def repeat(self) -> bool:
        """Append the next rows of an earlier epoch that no receipt covered; tell whether there may be more.

        Each has a new number, and its old one (``again``) and hash (``was``) in its header. That can wait for room.

        Raises:
            InsufficientError: ``disk.full``; nothing changed.
        """
        left = self._repeats()
        if not left:
            return False
        (name, epoch, last), *others = left
        with self._database.transaction(spare=True):
            rows = self._database.connection.execute(
                "SELECT seq, hash, header, body FROM entry WHERE stream = ? AND epoch = ? AND seq > ?"
                " ORDER BY seq LIMIT ?",
                (name, epoch, last, REPEATED_AT_ONCE),
            ).fetchall()
            for seq, digest, header, body in rows:
                said = json.loads(header)
                facts = {key: value for key, value in said.items() if key not in _OWN_KEYS}
                self._append_at(
                    Stream(name),
                    said["y"],
                    {**facts, "again": f"{epoch}/{seq}", "was": digest},
                    None if body is None else json.loads(body),
                    time_ms=said["t"],
                )
            if not rows and name == Stream.TELEMETRY.value:
                self._database.connection.execute("DELETE FROM entry WHERE stream = ? AND epoch = ?", (name, epoch))
            left = [(name, epoch, rows[-1][0]), *others] if rows else others
            self._database.put(_REPEAT, json.dumps(left))
        return bool(left)

    def _repeats(self) -> list[tuple[str, str, int]]:
        return [(name, epoch, last) for name, epoch, last in json.loads(self._database.get(_REPEAT) or "[]")]

    def _remember(self, epochs: Collection[str]) -> None:
        known = [*self.earlier, *epochs]
        self._database.put(_EARLIER, " ".join(list(dict.fromkeys(known))[-MAX_EARLIER:]))

    def _stream(self, stream: Stream) -> tuple[str, int, str, int]:
        """Return epoch, head's number and hash, and acked. Read every time: a rollback leaves nothing stale."""
        row = self._database.connection.execute(
            "SELECT epoch, seq, hash, acked FROM stream WHERE stream = ?", (stream.value,)
        ).fetchone()
        epoch, seq, digest, acked = row
        return epoch, seq, digest, acked

    def _head(self, stream: Stream) -> _Newest:
        epoch, seq, digest, _ = self._stream(stream)
        return _Newest(epoch, seq, digest)

    def _append_at(
        self,
        stream: Stream,
        kind: str,
        facts: dict[str, str | int | bool | None],
        body: object | None,
        *,
        time_ms: int,
    ) -> Entry:
        """Append inside the caller's transaction, of whatever size, as of ``time_ms``."""
        before = self._remembered.get(stream) or self._head(stream)

        def follow(newest: _Newest) -> Entry:
            return chain.build(
                device=self._device,
                epoch=newest.epoch,
                seq=newest.seq + 1,
                time_ms=time_ms,
                kind=kind,
                previous=newest.hash if stream in _CHAINED else None,
                facts=facts,
                body=body,
                salt=None if body is None else self._random_bytes(chain.SALT_BYTES),
            )

        entry = follow(before)
        if not self._move_head(stream, before, entry):
            before = self._head(stream)  # a rollback took back what was remembered
            entry = follow(before)
            if not self._move_head(stream, before, entry):
                raise RuntimeError(f"the head of {stream} moved inside a transaction")
        self._database.connection.execute(
            "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (stream.value, before.epoch, entry.seq, kind, entry.hash, entry.header, entry.body, entry.salt),
        )
        self._remembered[stream] = _Newest(before.epoch, entry.seq, entry.hash)
        return entry

    def _move_head(self, stream: Stream, before: _Newest, entry: Entry) -> bool:
        """Make ``entry`` the newest row, if ``before`` really is (a hash stands for one row of one epoch only).

        Comparing in the statement that writes anyway saves reading the head for every row of a group, and a memory
        that a rollback made wrong is never acted on.
        """
        moved = self._database.connection.execute(
            "UPDATE stream SET seq = ?, hash = ? WHERE stream = ? AND seq = ? AND hash = ?",
            (entry.seq, entry.hash, stream.value, before.seq, before.hash),
        )
        return moved.rowcount == 1

    def _open_epoch(self, facts: dict[str, str | int | bool | None]) -> None:
        epoch = self._random_bytes(EPOCH_BYTES).hex()
        for stream in Stream:
            self._database.connection.execute(
                "INSERT OR REPLACE INTO stream (stream, epoch, seq, hash) VALUES (?, ?, 0, ?)",
                (stream.value, epoch, chain.genesis(self._device, stream.value, epoch)),
            )
        self.append(Stream.AUDIT, "epoch.opened", facts)

    def _check_head(self) -> None:
        epoch, seq, digest, _ = self._stream(Stream.AUDIT)
        rows = self._database.connection.execute(
            "SELECT seq, hash FROM entry WHERE stream = ? AND epoch = ? ORDER BY seq DESC LIMIT 1",
            (Stream.AUDIT.value, epoch),
        ).fetchall()
        if rows != [(seq, digest)]:
            raise GarrisonError(
                "journal.damaged",
                f"{self._database.path} was altered: its newest audit entry is not number {seq}",
                hint="keep a copy for the auditor, move the file away, and start the agent; it opens a new epoch",
            )

    def _contradiction(self, receipt: Receipt, epoch: str, head: int) -> str | None:
        if receipt.up_to == 0:
            return None
        if receipt.up_to > head:
            return "never_sent"
        row = self._database.connection.execute(
            "SELECT hash FROM entry WHERE stream = ? AND epoch = ? AND seq = ?",
            (receipt.stream.value, epoch, receipt.up_to),
        ).fetchone()
        if row is None:
            return None  # thinned on the way; there is nothing left to compare
        return None if row[0] == receipt.hash else "other_hash"

    def _raise_alarm(self, receipt: Receipt, reason: str) -> None:
        """Record a false receipt once: the record itself is sent, and draws the same receipt again."""
        key = f"journal.alarm.{receipt.stream.value}"
        seen = f"{reason} {receipt.up_to} {receipt.hash}"
        if self._database.get(key) == seen:
            return
        self._database.put(key, seen)
        self.append(
            Stream.AUDIT,
            "alarm.receipt",
            {"reason": reason, "stream": receipt.stream.value, "up_to": receipt.up_to, "hash": receipt.hash},
        )

    def _thin_telemetry(self, cap: int) -> int:
        execute = self._database.connection.execute
        name = Stream.TELEMETRY.value
        epoch, _, _, acked = self._stream(Stream.TELEMETRY)
        (count,) = execute("SELECT count(*) FROM entry WHERE stream = ? AND epoch = ?", (name, epoch)).fetchone()
        if count <= cap:
            return 0
        oldest = (
            "SELECT seq FROM entry WHERE stream = ? AND epoch = ? ORDER BY seq LIMIT ?",
            (name, epoch, count - int(cap * KEPT_AFTER_THINNING)),
        )
        numbers = [seq for (seq,) in execute(*oldest)]
        execute(
            "DELETE FROM entry WHERE stream = ? AND epoch = ? AND seq <= ?",
            (name, epoch, numbers[-1]),
        )
        self.append(
            Stream.AUDIT,
            "telemetry.thinned",
            {
                "rows": len(numbers),
                "unsent": sum(1 for seq in numbers if seq > acked),
                "first": numbers[0],
                "last": numbers[-1],
            },
        )
        return len(numbers)

    def _thin_segments(self, cap: int) -> int:
        execute = self._database.connection.execute
        current, _, _, acked = self._stream(Stream.AUDIT)
        (count,) = execute("SELECT count(*) FROM entry WHERE kind = ? AND body IS NOT NULL", (SEGMENT_KIND,)).fetchone()
        if count <= cap:
            return 0
        rows = execute(
            "SELECT epoch, seq FROM entry WHERE kind = ? AND body IS NOT NULL ORDER BY rowid LIMIT ?",
            (SEGMENT_KIND, count - int(cap * KEPT_AFTER_THINNING)),
        ).fetchall()
        for epoch in dict.fromkeys(epoch for epoch, _ in rows):
            numbers = [seq for one, seq in rows if one == epoch]
            execute(
                "UPDATE entry SET body = NULL, salt = NULL"
                " WHERE kind = ? AND body IS NOT NULL AND epoch = ? AND seq <= ?",
                (SEGMENT_KIND, epoch, numbers[-1]),
            )
            facts: dict[str, str | int | bool | None] = {
                "bodies": len(numbers),
                "unsent": sum(1 for seq in numbers if epoch == current and seq > acked),
                "kind": SEGMENT_KIND,
                "first": numbers[0],
                "last": numbers[-1],
            }
            self.append(Stream.AUDIT, "audit.thinned", facts if epoch == current else {**facts, "epoch": epoch})
        return len(rows)


def _encoded_size(text: str | None) -> int:
    """Return the bytes that ``text`` takes inside a message (UTF-8, escaped)."""
    return 0 if text is None else len(json.dumps(text, ensure_ascii=False).encode())


def _named(theirs: Mapping[str, Committed]) -> dict[str, str | int | bool | None]:
    """Return the controller's newest rows as facts of an entry."""
    return {
        f"controller_{stream.value}": f"{head.epoch}/{head.seq}/{head.hash or ''}"
        for stream in Stream
        if (head := theirs.get(stream.value)) is not None
    }
