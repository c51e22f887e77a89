"""Registry bytes out of a bundle: a ``Source`` over its files, and how a stick takes the network's place for a while.

Nothing on a stick is believed for standing there: callers verify every byte, as from any source.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from garrison_agent.registry.source import MetadataSource, Source
from garrison_agent.registry.trust import Refresh
from garrison_agent.registry.verifier import Verifier
from garrison_protocol import bundle
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError, RefusedError, UnavailableError

PIECE_BYTES = 1024 * 1024


class Reader(Protocol):
    """Reads a bundle's files; ``garrison_protocol.stick.Stick`` and ``api.carrier.Carrier`` are two."""

    def read_piece(self, path: str, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on, fewer only at the end. Raises GarrisonError."""
        ...


class BundleSource:
    """See ``registry.source.Source``. As thread-safe as its reader."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.metadata``."""
        with _translated(name):
            return read_whole(self._reader, bundle.metadata_path(name), max_bytes)

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.target``."""
        with _translated(path):
            return read_whole(self._reader, bundle.target_path(path, sha256), max_bytes)

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """See ``Source.blob``."""
        with _translated(sha256):
            path = bundle.blob_path(sha256)
        while True:
            with _translated(sha256):
                piece = self._reader.read_piece(path, offset, PIECE_BYTES)
            if not piece:
                return
            yield piece
            offset += len(piece)


def read_whole(reader: Reader, path: str, max_bytes: int) -> bytes:
    """Return the whole file at ``path``.

    Raises:
        RefusedError: ``source.too_long``; it goes on behind ``max_bytes``.
        GarrisonError: those of the reader.
    """
    data = bytearray()
    while piece := reader.read_piece(path, len(data), min(PIECE_BYTES, max_bytes + 1 - len(data))):
        data += piece
        if len(data) > max_bytes:
            raise RefusedError("source.too_long", f"{path}: more than the {max_bytes} bytes allowed")
    return bytes(data)


class Plugged:
    """The bundle that is being read now, if one is: jobs look there first. Safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._refreshed = False
        self._error: GarrisonError | None = None
        self._served = 0

    def attach(self, source: Source) -> None:
        """Let ``source`` take the network's place."""
        with self._lock:
            self._source, self._refreshed, self._error = source, False, None

    def detach(self) -> None:
        """Go back to the network."""
        with self._lock:
            self._source = None

    @property
    def source(self) -> Source | None:
        """Where blobs and targets are looked for first."""
        return self._source

    @property
    def metadata(self) -> MetadataSource | None:
        """Where metadata is taken from, unless this board has newer or the bundle's does not verify."""
        with self._lock:
            unusable = self._error is not None and self._error.code != "registry.expired"
            return None if unusable else self._source

    @property
    def refreshed(self) -> bool:
        """Whether a check of the bundle's metadata has ended. Only who asked for it knows what came of it."""
        with self._lock:
            return self._refreshed

    def checked(self, source: MetadataSource, error: GarrisonError | None) -> None:
        """Note how a refresh from ``source`` ended."""
        with self._lock:
            if source is self._source:
                self._refreshed, self._error = True, error

    def serve(self) -> None:
        """Note that bytes of a blob came from the bundle."""
        with self._lock:
            self._served += 1

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Make the refusal of bytes that a stick brought a reason to wait: it is not the package that is at fault.

        Raises:
            UnavailableError: ``bundle.damaged``.
        """
        before = self._served
        try:
            yield
        except RefusedError as error:
            if self._served == before:
                raise
            raise UnavailableError(
                "bundle.damaged",
                f"what the stick holds is not what was signed: {error.message}",
                hint="export the bundle again, and find out who had the stick",
                retryable=True,
            ) from error


class PluggedSource:
    """A ``Source`` that looks into the plugged bundle first, and elsewhere for what is not there."""

    def __init__(self, plugged: Plugged, other: Source) -> None:
        self._plugged, self._other = plugged, other

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.metadata``."""
        stick = self._plugged.metadata
        return (self._other if stick is None else stick).metadata(name, max_bytes)

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.target``."""
        stick = self._plugged.source
        if stick is not None:
            with contextlib.suppress(NotFoundError, UnavailableError):
                return stick.target(path, sha256, max_bytes)
        return self._other.target(path, sha256, max_bytes)

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """See ``Source.blob``. Where the stick ends or fails, the other source goes on from there."""
        stick = self._plugged.source
        if stick is not None:
            with (
                contextlib.suppress(NotFoundError, UnavailableError),
                contextlib.closing(stick.blob(sha256, offset)) as pieces,
            ):
                for piece in pieces:
                    self._plugged.serve()
                    yield piece
                    offset += len(piece)
                return
        yield from self._other.blob(sha256, offset)


class PluggedVerifier:
    """A ``Verifier`` that refreshes from the plugged bundle while there is one."""

    def __init__(self, plugged: Plugged, other: Verifier) -> None:
        self._plugged, self._other = plugged, other

    def refresh(
        self,
        high_water: Mapping[str, int],
        floor: datetime,
        want: Sequence[str],
        source: MetadataSource | None = None,
    ) -> Refresh:
        """See ``TrustVerifier.refresh``."""
        stick = self._plugged.metadata
        if source is not None or stick is None:
            return self._other.refresh(high_water, floor, want, source)
        try:
            view = self._other.refresh(high_water, floor, want, stick)
        except GarrisonError as error:
            self._plugged.checked(stick, error)
            raise
        self._plugged.checked(stick, None)
        return view

    def offline(
        self, high_water: Mapping[str, int], trusted_at: int, want: Sequence[str], floor: datetime | None = None
    ) -> Refresh:
        """See ``TrustVerifier.offline``."""
        return self._other.offline(high_water, trusted_at, want, floor)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Translate a reader's errors into those of a source.

    Raises:
        NotFoundError: ``source.not_found``.
        RefusedError: ``source.too_long``.
        UnavailableError: ``source.unreachable``.
    """
    try:
        yield
    except (NotFoundError, InvalidError) as error:
        raise NotFoundError("source.not_found", f"the bundle has no {what}", hint="export it again") from error
    except RefusedError as error:
        if error.code in ("source.too_long", "bundle.file_too_long"):
            raise RefusedError("source.too_long", error.message, hint=error.hint) from error
        raise _unreachable(error) from error
    except UnavailableError as error:
        raise _unreachable(error) from error


def _unreachable(error: GarrisonError) -> UnavailableError:
    return UnavailableError("source.unreachable", error.message, hint=error.hint, retryable=True)
