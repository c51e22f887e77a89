"""The port through which registry metadata and model bytes come: HTTP, MQTT chunks, or a USB bundle.

Nothing that comes through it is trusted; callers verify every byte. It never decides, it only carries.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol


class MetadataSource(Protocol):
    """Where metadata and small targets come from: all that a refresh needs.

    Every method raises nothing but ``GarrisonError``:
        NotFoundError: ``source.not_found``; the other side has no such thing. An answer, not a fault.
        UnavailableError: ``source.unreachable``, retryable.
        RefusedError: ``source.too_long``; more than ``max_bytes`` came.
        Any other, by its own code, with which the controller refuses this board (revoked, unknown).
    """

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """Return the metadata file that TUF calls ``name``: ``2.root.json``, ``timestamp.json``, ..."""
        ...

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """Return a small target (a manifest, ``fleet.json``) by its path and the digest that metadata gives it."""
        ...


class Source(MetadataSource, Protocol):
    """Where all registry bytes come from; raises as ``MetadataSource``."""

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """Yield a blob from ``offset`` (bytes) on, in pieces of any size; the caller bounds and closes it.

        An early end is a cut connection. Errors come at the first or any later piece. An empty piece says that
        nothing came for a while, so that the caller can give up.
        """
        ...
