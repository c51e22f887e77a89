"""The chain from the pinned root to the targets, checked with python-tuf. Only the verifier process imports this.

Two steps on purpose. ``update`` runs python-tuf's own ``Updater`` in a scratch folder, since it writes without fsync
and replaces file by file. ``verify`` then checks the outcome again with the public Metadata API alone, at a reference
time of ours: the Updater reads the system clock, which a board without a battery may have at 1970, and offers no
public way to set it. The same ``verify`` serves without a network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
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
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from garrison_agent.registry.cache import MetadataCache, StoredState
from garrison_agent.registry.source import Source
from garrison_protocol.errors import NotFoundError, RefusedError, UnavailableError

_BASE = "source:///"
_SIGNED_BY_ROOT = ("timestamp", "snapshot", "targets")

S = TypeVar("S", Timestamp, Snapshot, Targets)


@dataclass(frozen=True)
class Trusted:
    """A verified state."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets

    def expired(self, at: datetime) -> bool:
        """Tell whether any role has expired at ``at`` (aware UTC)."""
        return any(part.is_expired(at) for part in (self.root, self.timestamp, self.snapshot, self.targets))

    def target(self, path: str) -> TargetFile | None:
        """Return what the release signers say about ``path``. Targets are flat: no delegations in this registry."""
        return self.targets.targets.get(path)


def update(source: Source, cache: MetadataCache, bootstrap: bytes) -> StoredState:
    """Return the newest state that ``source`` offers and python-tuf accepts; call ``verify`` on it before use.

    New roots are kept even when a later step fails: an answer withheld must not undo a rotation.

    Raises:
        RefusedError, UnavailableError, NotFoundError: as ``trust.refresh``.
    """
    with cache.scratch() as folder, translated():
        known = cache.roots()
        _lay_out(folder, cache, known)
        try:
            updater = Updater(
                str(folder), _BASE, fetcher=_SourceFetcher(source), config=UpdaterConfig(), bootstrap=bootstrap
            )
            updater.refresh()
        finally:
            newest = _keep_roots(folder, cache, known)
        timestamp, snapshot, targets = ((folder / f"{role}.json").read_bytes().decode() for role in _SIGNED_BY_ROOT)
        return StoredState(root=newest, timestamp=timestamp, snapshot=snapshot, targets=targets)


def verify(
    state: StoredState, roots: Mapping[int, bytes], bootstrap: bytes, *, at: datetime, high_water: Mapping[str, int]
) -> Trusted:
    """Return ``state`` once every signature, digest, version, and expiry (at ``at``, aware UTC) holds.

    ``high_water`` gives the versions seen before by role. The marks of timestamp and snapshot fall when the root has
    since replaced the keys of either, that of targets when its own keys were replaced, so that the fleet recovers
    from a thief who drove versions up (TUF specification, 5.3.11).

    Raises:
        RefusedError: ``registry.bad_signature``, ``registry.rollback``, ``registry.expired``, ``registry.damaged``.
    """
    with translated():
        chain = _root_chain(roots, bootstrap, state.root)
        root = chain[state.root]
        timestamp = _signed(Timestamp, state.timestamp.encode(), root, "timestamp")
        data = state.snapshot.encode()
        timestamp.snapshot_meta.verify_length_and_hashes(data)
        snapshot = _signed(Snapshot, data, root, "snapshot")
        _require_version("snapshot", snapshot.version, timestamp.snapshot_meta.version)
        meta = snapshot.meta.get("targets.json")
        if meta is None:
            raise RepositoryError("the snapshot names no targets")
        data = state.targets.encode()
        meta.verify_length_and_hashes(data)
        targets = _signed(Targets, data, root, "targets")
        _require_version("targets", targets.version, meta.version)
        trusted = Trusted(root, timestamp, snapshot, targets)
        _require_not_lower(trusted, chain, high_water)
        if trusted.expired(at):
            raise ExpiredMetadataError(f"metadata is not valid at {at:%Y-%m-%d %H:%M} UTC")
        return trusted


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


class _SourceFetcher(FetcherInterface):
    """Lets python-tuf read from a ``Source``; its errors pass through untouched, but for "not found"."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter((self.download_bytes(url, UpdaterConfig().targets_max_length),))

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return the metadata file at ``url``: in memory, where python-tuf would spool to a temporary file."""
        name = url.removeprefix(_BASE)
        try:
            return self._source.metadata(name, max_length)
        except NotFoundError as error:
            raise DownloadHTTPError(f"no {name}", 404) from error  # this is what ends the walk along the roots


def _lay_out(folder: Path, cache: MetadataCache, known: Mapping[int, bytes]) -> None:
    """Give python-tuf our cache in the layout it wants. A damaged one is left out: high-water marks still hold."""
    history = folder / "root_history"
    history.mkdir()
    for version, data in known.items():
        (history / f"{version}.root.json").write_bytes(data)
    with contextlib.suppress(RefusedError):
        state = cache.load()
        if state is not None:
            for role, text in (
                ("timestamp", state.timestamp),
                ("snapshot", state.snapshot),
                ("targets", state.targets),
            ):
                (folder / f"{role}.json").write_bytes(text.encode())


def _keep_roots(folder: Path, cache: MetadataCache, known: Mapping[int, bytes]) -> int:
    """Keep every root that python-tuf has verified; return the version of the newest, which ``root.json`` links to."""
    link = folder / "root.json"
    newest = int(link.readlink().name.removesuffix(".root.json")) if link.is_symlink() else 0
    for version in range(1, newest + 1):
        path = folder / "root_history" / f"{version}.root.json"
        if path.exists() and (data := path.read_bytes()) != known.get(version):
            cache.keep_root(version, data)
    return newest


def _root_chain(roots: Mapping[int, bytes], bootstrap: bytes, last: int) -> dict[int, Root]:
    first = Metadata[Root].from_bytes(bootstrap)
    if not isinstance(first.signed, Root):
        raise RepositoryError("the pinned root is no root")
    root = first.signed
    root.verify_delegate("root", first.signed_bytes, first.signatures)
    chain = {root.version: root}
    for version in range(root.version + 1, last + 1):
        if version not in roots:
            raise RepositoryError(f"{version}.root.json is missing")
        following = Metadata[Root].from_bytes(roots[version])
        if not isinstance(following.signed, Root):
            raise RepositoryError(f"{version}.root.json is no root")
        root.verify_delegate("root", following.signed_bytes, following.signatures)
        following.signed.verify_delegate("root", following.signed_bytes, following.signatures)
        root = following.signed
        _require_version("root", root.version, version)
        chain[version] = root
    if last not in chain:
        raise BadVersionNumberError(f"root {last} is below the pinned one")
    return chain


def _signed(kind: type[S], data: bytes, root: Root, role: str) -> S:
    metadata = Metadata[S].from_bytes(data)
    if not isinstance(metadata.signed, kind):
        raise RepositoryError(f"{role}.json holds {metadata.signed.type}")
    root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    return metadata.signed


def _require_version(role: str, version: int, expected: int) -> None:
    if version != expected:
        raise BadVersionNumberError(f"{role} is version {version}, {expected} was announced")


def _require_not_lower(trusted: Trusted, chain: Mapping[int, Root], high_water: Mapping[str, int]) -> None:
    marks = dict(high_water)
    seen = chain.get(marks.get("root", 0))
    if seen is not None:
        rotated = {role for role in _SIGNED_BY_ROOT if _keys(seen, role) != _keys(trusted.root, role)}
        if rotated & {"timestamp", "snapshot"}:
            rotated |= {"timestamp", "snapshot"}
        for role in rotated:
            marks.pop(role, None)
    versions = {
        "root": trusted.root.version,
        "timestamp": trusted.timestamp.version,
        "snapshot": trusted.snapshot.version,
        "targets": trusted.targets.version,
    }
    for role, version in versions.items():
        if version < marks.get(role, 0):
            raise BadVersionNumberError(f"{role} is version {version}, {marks[role]} was seen before")


def _keys(root: Root, role: str) -> frozenset[str]:
    return frozenset(root.roles[role].keyids)
