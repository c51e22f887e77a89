"""A ``Source`` in memory that speaks the real protocol and can misbehave on demand."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError

_HINT = "check the network"


@dataclass
class RegistryContent:
    """What a controller holds; fakes of several transports serve one of these."""

    metadata: dict[str, bytes] = field(default_factory=dict)
    """By TUF file name."""
    targets: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """By (SHA-256, path)."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """By SHA-256."""


@dataclass
class MemorySource:
    """Serves ``content``. The fields after it are faults, changeable at any time."""

    content: RegistryContent
    piece_size: int = 10_000
    unreachable: bool = False
    cut_blob_after: int | None = None
    """The next blob request ends after this many bytes; then the fault is over."""
    fail_blob_after: int | None = None
    """The next blob request fails with ``source.unreachable`` after this many bytes; then the fault is over."""
    endless: set[str] = field(default_factory=set)
    """These blobs go on with zeros for ever."""
    log: list[str] = field(default_factory=list)
    """Every request: ``metadata NAME``, ``target PATH``, ``blob SHA256 OFFSET``."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes that callers took of each blob."""

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``Source.metadata``."""
        self._enter(f"metadata {name}")
        return self._bounded(name, self.content.metadata.get(name), max_bytes)

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``Source.target``."""
        self._enter(f"target {path}")
        return self._bounded(path, self.content.targets.get((sha256, path)), max_bytes)

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """See ``Source.blob``."""
        self._enter(f"blob {sha256} {offset}")
        data = self.content.blobs.get(sha256)
        if data is None:
            raise NotFoundError("source.not_found", f"no blob {sha256}")
        cut, self.cut_blob_after = self.cut_blob_after, None
        fail, self.fail_blob_after = self.fail_blob_after, None
        for at in range(offset, len(data), self.piece_size):
            passed = at - offset
            if fail is not None and passed >= fail:
                raise UnavailableError("source.unreachable", "the connection broke", hint=_HINT, retryable=True)
            piece = data[at : at + self.piece_size]
            if cut is not None and passed + len(piece) >= cut:
                yield self._count(sha256, piece[: cut - passed])
                return
            yield self._count(sha256, piece)
        while sha256 in self.endless:
            yield self._count(sha256, bytes(self.piece_size))

    def _count(self, sha256: str, piece: bytes) -> bytes:
        self.sent[sha256] = self.sent.get(sha256, 0) + len(piece)
        return piece

    def _enter(self, request: str) -> None:
        self.log.append(request)
        if self.unreachable:
            raise UnavailableError("source.unreachable", "the network is down", hint=_HINT, retryable=True)

    @staticmethod
    def _bounded(name: str, data: bytes | None, max_bytes: int) -> bytes:
        if data is None:
            raise NotFoundError("source.not_found", f"no {name}")
        if len(data) > max_bytes:
            raise RefusedError("source.too_long", f"{name} has more than {max_bytes} bytes")
        return data
