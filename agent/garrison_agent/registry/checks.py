"""Single checks of TUF metadata, and what python-tuf's refusals are called in Garrison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError

MAX_VERSION = 2**53
"""Higher ones fit neither the store nor the audit chain: a thief of online keys must not stop boards with a number."""

S = TypeVar("S", Timestamp, Snapshot, Targets)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Translate what python-tuf raises into Garrison's codes."""
    try:
        yield
    except ExpiredMetadataError as error:
        raise RefusedError(
            "registry.expired",
            f"the registry's metadata has expired: {error}",
            hint="check the board's clock, and that the controller runs and can sign; running models keep running",
            retryable=True,
        ) from error
    except BadVersionNumberError as error:
        raise RefusedError(
            "registry.rollback",
            f"the registry's metadata is older than what this board has seen: {error}",
            hint="someone replays old metadata, or the controller was restored from an old backup",
        ) from error
    except UnsignedMetadataError as error:
        raise RefusedError(
            "registry.bad_signature",
            f"too few valid signatures: {error}",
            hint="the metadata was not signed by the keys that the pinned root names",
        ) from error
    except (LengthOrHashMismatchError, DownloadLengthMismatchError, RepositoryError, ValueError) as error:
        raise RefusedError(
            "registry.damaged",
            f"the registry's metadata is damaged: {error}",
            hint="the next refresh replaces a damaged cache; if it comes from the controller, publish again",
        ) from error
    except DownloadHTTPError as error:
        raise NotFoundError(
            "source.not_found",
            f"the registry has no complete metadata: {error}",
            hint="publish with `garrison registry push`",
            retryable=True,
        ) from error
    except DownloadError as error:
        raise UnavailableError(
            "source.unreachable",
            f"the registry cannot be reached: {error}",
            hint="check the network and that the controller runs",
            retryable=True,
        ) from error


def signed(kind: type[S], data: bytes, delegator: Root | Targets, role: str) -> S:
    """Return the metadata in ``data`` once a threshold of the keys that ``delegator`` gives ``role`` has signed it."""
    metadata = Metadata[S].from_bytes(data)
    if not isinstance(metadata.signed, kind):
        raise RepositoryError(f"{role}.json holds {metadata.signed.type}")
    delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    if metadata.signed.version >= MAX_VERSION:
        raise RepositoryError(f"{role} is version {metadata.signed.version}, beyond what a store can count")
    return metadata.signed


def require_version(role: str, version: int, expected: int) -> None:
    """Refuse a version that is not the one announced."""
    if version != expected:
        raise BadVersionNumberError(f"{role} is version {version}, {expected} was announced")
