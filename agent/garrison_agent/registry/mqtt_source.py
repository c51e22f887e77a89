"""The registry over the broker: ``Source`` spoken as fetches and chunks (docs/protocol.md, "Fetch").

Frames go from the link's callback straight to ``receive``, which never waits; the owner thread sees none of this. A
frame is taken only if it is exactly a piece of a window that is outstanding, so neither the broker nor the controller
can make a board hold more than it asked for. Nobody signs frames: readers verify what comes, and every refusal that
comes this way counts as one that may pass, since the broker could have made it up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from pydantic import ValidationError

from garrison_agent.pace import Pace
from garrison_agent.registry.windows import Window, Windows
from garrison_protocol import topics
from garrison_protocol.envelope import seal
from garrison_protocol.errors import (
    ConflictError,
    GarrisonError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
)
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.fetch import (
    FETCH_KIND,
    MAX_PIECE_BYTES,
    Chunk,
    ChunkStatus,
    Fetch,
    FetchKind,
    FetchRefusal,
    unpack_chunk,
)

MAX_STALL_S = 60.0
_BY_STATUS: dict[int, type[GarrisonError]] = {
    401: UnauthenticatedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
    422: InvalidError,
}
_FILES = frozenset({FetchKind.METADATA, FetchKind.TARGET, FetchKind.BLOB})
_CHANGING = frozenset({FetchKind.CERTIFICATE})
"""What must not be asked for twice: the nonce in it is good once."""


@dataclass(frozen=True)
class Patience:
    """How long a transfer waits, in seconds."""

    stall_s: float = 10.0
    """Without a chunk before the first new attempt; each further one waits twice as long."""
    give_up_s: float = 120.0
    """Without the next bytes, or slower than ``pace.MIN_BYTES_PER_S``, until it is ``source.unreachable``."""
    tick_s: float = 1.0
    """Between two empty pieces while nothing comes."""


class _Transfer:
    def __init__(self, windows: Windows, heard: int) -> None:
        self.windows = windows
        self.moved_at_s = 0.0
        """When it last asked or heard."""
        self.connection = heard
        self.refusal: bytes | None = None


class MqttSource:
    """The controller's registry through the board's link to the broker. Safe in any thread."""

    def __init__(
        self,
        *,
        device: str,
        key: SigningKey,
        send: Callable[[str, bytes], bool],
        connected: Callable[[], bool],
        patience: Patience = Patience(),
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``send`` publishes once (QoS 0) or says that it cannot now; it may take the link's locks.

        ``connected`` tells whether the broker has accepted the board.
        """
        self._device, self._key = device, key
        self._topic = topics.up(device, topics.Up.FETCH)
        self._send, self._connected = send, connected
        self._patience, self._now_s = patience, now_s
        self._changed = threading.Condition()
        self._transfers: dict[str, _Transfer] = {}
        self._connections = 0
        self._blob_pieces = 0

    def receive(self, frame: bytes) -> None:
        """Take a frame from the link's thread. Whatever it holds, this neither waits nor raises."""
        try:
            chunk = unpack_chunk(frame)
        except InvalidError:
            return
        with self._changed:
            transfer = self._transfers.get(chunk.request)
            if transfer is None or not self._take(transfer, chunk):
                return
            transfer.moved_at_s = self._now_s()
            self._changed.notify_all()

    def reconnected(self) -> None:
        """Tell that the broker has accepted a new connection: what was on its way on the old one is lost."""
        with self._changed:
            self._connections += 1
            self._changed.notify_all()

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.metadata``."""
        return self._whole(self._fetch(FetchKind.METADATA, name=name), max_bytes)

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.target``."""
        return self._whole(self._fetch(FetchKind.TARGET, name=path, sha256=sha256), max_bytes)

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """See ``Source.blob``."""
        with closing(self._stream(self._fetch(FetchKind.BLOB, sha256=sha256), Windows(offset))) as pieces:
            for piece in pieces:
                self._blob_pieces += 1
                yield piece

    def ask(self, kind: FetchKind, name: str, body: str) -> bytes:
        """Return the controller's answer to something small: an anchor, a nonce, a certificate.

        Raises:
            UnavailableError: ``source.unreachable``.
            GarrisonError: What the controller answers, by its own code; ``source.too_long``.
        """
        whole = Windows(first_bytes=MAX_PIECE_BYTES)  # one window: every fetch would be answered anew
        return self._whole(self._fetch(kind, name=name, body=body), MAX_PIECE_BYTES, whole)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Make the refusal of bytes that came this way within the block a reason to wait.

        The controller is not known to have sent them, so a broker that changes what it carries can delay a package,
        but not end its deployment.

        Raises:
            UnavailableError: ``source.damaged``.
        """
        before = self._blob_pieces
        try:
            yield
        except RefusedError as error:
            if self._blob_pieces == before:
                raise
            raise UnavailableError(
                "source.damaged",
                f"what came over the broker is not what was signed: {error.message}",
                hint="find out who changes it: the broker, or the controller's copy; the agent tries again by itself",
                retryable=True,
            ) from error

    def _fetch(self, kind: FetchKind, *, name: str = "", sha256: str | None = None, body: str = "") -> Fetch:
        """Return the request that all windows of a transfer have in common."""
        try:
            return Fetch(device=self._device, request="0" * 16, kind=kind, name=name, sha256=sha256, body=body)
        except ValidationError as error:
            raise NotFoundError(
                "source.not_found",
                f"nothing can be asked for as {kind.value} {name[:80]!r}: {error.error_count()} errors",
            ) from error

    def _whole(self, fetch: Fetch, max_bytes: int, windows: Windows | None = None) -> bytes:
        windows = windows or Windows()
        data = bytearray()
        with closing(self._stream(fetch, windows)) as stream:
            for piece in stream:
                data += piece
                if max(len(data), windows.total or 0) > max_bytes:
                    raise RefusedError(
                        "source.too_long",
                        f"{_what(fetch)}: more than the {max_bytes} bytes allowed are offered over the broker",
                        hint="something other than a Garrison controller may be answering",
                        retryable=True,
                    )
        return bytes(data)

    def _stream(self, fetch: Fetch, windows: Windows) -> Generator[bytes, None, None]:
        if not self._connected():
            raise _unreachable(fetch, "the board is not connected to the broker")
        patience = self._patience
        stall_s = patience.stall_s
        transfer = _Transfer(windows, self._connections)
        pace = Pace(patience.give_up_s)
        try:
            while not windows.done:
                began_s = self._now_s()
                self._ask(transfer, fetch)
                with self._changed:
                    piece = windows.pop()
                    if piece is None and transfer.refusal is None and not windows.done:
                        self._changed.wait(patience.tick_s)
                        piece = windows.pop()
                now_s = self._now_s()
                in_time = pace.add(now_s - began_s, len(piece or b""))
                if piece is not None:
                    stall_s = patience.stall_s
                    yield piece
                elif transfer.refusal is not None:
                    raise _refused(fetch, transfer.refusal)
                if not in_time and not windows.done:
                    raise _unreachable(fetch, pace.complaint)
                if piece is not None:
                    continue
                if self._stalled(transfer, now_s, stall_s):
                    if fetch.kind in _CHANGING:
                        raise _unreachable(fetch, "no answer came")
                    stall_s = min(MAX_STALL_S, 2 * stall_s)
                yield b""
        finally:
            with self._changed:
                self._drop(transfer)

    def _ask(self, transfer: _Transfer, fetch: Fetch) -> None:
        """Ask for what is missing and not on its way, as far as the link takes it."""
        while self._connected():
            with self._changed:
                window = transfer.windows.next_window()
                if window is None:
                    return
                request = os.urandom(8).hex()
                transfer.windows.asked(request, window, self._now_s())
                transfer.moved_at_s = self._now_s()
                self._transfers[request] = transfer
            # Outside the lock: the link's thread may hold what `send` needs while it waits in `receive`.
            if not self._send(self._topic, self._sealed(fetch, request, window)):
                return  # looks like a lost request: asked again after the stall

    def _sealed(self, fetch: Fetch, request: str, window: Window) -> bytes:
        asked = fetch.model_copy(
            update={
                "request": request,
                "offset": window.offset,
                "length": window.length,
                "piece": window.piece,
                "sent_at": round(time.time() * 1000),
            }
        )
        return seal(FETCH_KIND, encode(asked), self._key)

    def _stalled(self, transfer: _Transfer, now_s: float, stall_s: float) -> bool:
        """Tell whether what is on its way has to be asked for again, and forget it then."""
        with self._changed:
            lost = transfer.connection != self._connections
            transfer.connection = self._connections
            if not lost and now_s - transfer.moved_at_s < stall_s:
                return False
            self._drop(transfer)
            transfer.windows.forget()
            transfer.moved_at_s = now_s
            return True

    def _take(self, transfer: _Transfer, chunk: Chunk) -> bool:
        if chunk.status is ChunkStatus.ERROR:
            transfer.refusal = chunk.data
            return True
        before = transfer.windows.outstanding
        taken = transfer.windows.take(chunk, self._now_s())
        for closed in set(before).difference(transfer.windows.outstanding):
            del self._transfers[closed]
        return taken

    def _drop(self, transfer: _Transfer) -> None:
        for request in transfer.windows.outstanding:
            self._transfers.pop(request, None)


def _what(fetch: Fetch) -> str:
    return f"{fetch.kind.value} {fetch.name or fetch.sha256 or ''}".strip()


def _refused(fetch: Fetch, data: bytes) -> GarrisonError:
    try:
        refusal = FetchRefusal.model_validate_json(data)
    except ValidationError:
        return _unreachable(fetch, "it answered with an error that cannot be read")
    if refusal.status == 404 and fetch.kind in _FILES:
        return NotFoundError(
            "source.not_found", f"{_what(fetch)}: the controller has no such file", hint=refusal.hint, retryable=True
        )
    kind = _BY_STATUS.get(refusal.status, UnavailableError if refusal.status in (429, 503) else GarrisonError)
    return kind(refusal.code, refusal.message, hint=refusal.hint, retryable=True)


def _unreachable(fetch: Fetch, cause: str) -> UnavailableError:
    return UnavailableError(
        "source.unreachable",
        f"cannot get {_what(fetch)} from the controller over the broker: {cause}",
        hint="check that broker and controller run; the agent tries again by itself",
        retryable=True,
    )
