"""The chain from the pinned root to the targets and the families that they delegate to, checked with python-tuf.

Only the verifier process imports this.

Two steps on purpose. ``update`` runs python-tuf's own ``Updater`` in a scratch folder, since it writes without fsync
and replaces file by file. ``verify`` then checks the outcome again with the public Metadata API alone, at a reference
time of ours: the Updater reads the system clock, which a board without a battery may have at 1970, and offers no
public way to set it. The same ``verify`` serves without a network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadHTTPError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from garrison_agent.registry.cache import MetadataCache, StoredState
from garrison_agent.registry.checks import require_version, signed, translated
from garrison_agent.registry.families import family_file, fetch_families, kept_families, mark, verified_families
from garrison_agent.registry.source import MetadataSource
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET

_BASE = "source:///"
_SIGNED_BY_ROOT = ("timestamp", "snapshot", "targets")


@dataclass(frozen=True)
class Trusted:
    """A verified state."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    families: Mapping[str, Targets]
    """Delegated roles at hand, verified; one that has expired says so in ``withheld``."""
    refused: Mapping[str, str]
    """Delegated roles that were not verified, with the code of the refusal."""

    def expired(self, at: datetime) -> bool:
        """Tell whether any role that all packages rest on has expired at ``at`` (aware UTC)."""
        return any(part.is_expired(at) for part in (self.root, self.timestamp, self.snapshot, self.targets))

    @property
    def ends(self) -> dict[str, int]:
        """When each role ends, in Unix seconds."""
        parts = {"root": self.root, "timestamp": self.timestamp, "snapshot": self.snapshot, "targets": self.targets}
        return {role: int(part.expires.timestamp()) for role, part in {**self.families, **parts}.items()}

    def target(self, path: str) -> TargetFile | None:
        """Return what the role that speaks for ``path`` says about it, or None.

        As TUF's clients search (specification, 5.6.7), one level deep: targets itself, then the delegations in their
        order, each within its paths. A role that is not at hand ends the search: who withholds it must not make
        another speak in its place. ``fleet.json`` is never a delegate's.
        """
        own = self.targets.targets.get(path)
        if own is not None or path == FLEET_TARGET:
            return own
        for role, terminating in self._speakers(path):
            family = self.families.get(role)
            found = None if family is None else family.targets.get(path)
            if found is not None or family is None or terminating:
                return found
        return None

    def withheld(self, path: str, at: datetime) -> str | None:
        """Return why nothing new at ``path`` may be installed though the registry as a whole is good; else None."""
        if path in self.targets.targets or path == FLEET_TARGET:
            return None
        for role, terminating in self._speakers(path):
            if role in self.refused:
                return self.refused[role]
            family = self.families.get(role)
            if family is None:
                return None
            if family.is_expired(at):
                return "registry.expired"
            if terminating or path in family.targets:
                return None
        return None

    @property
    def marks(self) -> dict[str, int]:
        """The versions of the families at hand, as high-water marks; a mark holds for one set of keys."""
        return {mark(self.targets, role): family.version for role, family in self.families.items()}

    def _speakers(self, path: str) -> Iterator[tuple[str, bool]]:
        delegations = self.targets.delegations
        return iter(()) if delegations is None else delegations.get_roles_for_target(path)


def update(
    source: MetadataSource, cache: MetadataCache, bootstrap: bytes, want: Sequence[str] = ()
) -> tuple[StoredState, dict[str, str]]:
    """Return the newest state that ``source`` offers and python-tuf accepts; call ``verify`` on it before use.

    It holds the families that the paths in ``want`` need, and those kept before that have not changed. With it come
    the families that python-tuf refused, with the code: one family's fault is no other's.

    New roots are kept even when a later step fails: an answer withheld must not undo a rotation.

    Raises:
        RefusedError, UnavailableError, NotFoundError: as ``trust.refresh``.
    """
    with cache.scratch() as folder, translated():
        known = cache.roots()
        _lay_out(folder, cache, known)
        fetcher = _SourceFetcher(source, folder / "timestamp.json")
        try:
            updater = Updater(str(folder), _BASE, fetcher=fetcher, config=UpdaterConfig(), bootstrap=bootstrap)
            updater.refresh()
        finally:
            newest = _keep_roots(folder, cache, known)
        timestamp, snapshot, targets = ((folder / f"{role}.json").read_bytes().decode() for role in _SIGNED_BY_ROOT)
        refused = fetch_families(updater, _parse_targets(targets.encode()), want)
        families = kept_families(folder, snapshot.encode(), _parse_targets(targets.encode()))
        state = StoredState(root=newest, timestamp=timestamp, snapshot=snapshot, targets=targets, families=families)
        return state, refused


def verify(
    state: StoredState,
    roots: Mapping[int, bytes],
    bootstrap: bytes,
    *,
    at: datetime,
    high_water: Mapping[str, int],
    refused: Mapping[str, str] | None = None,
) -> Trusted:
    """Return ``state`` once every signature, digest, version, and expiry (at ``at``, aware UTC) holds.

    ``high_water`` gives the versions seen before by role. The marks of timestamp and snapshot fall when the root has
    since replaced the keys of either, that of targets when its own keys were replaced, so that the fleet recovers
    from a thief who drove versions up (TUF specification, 5.3.11). A family's mark is named after its keys, and so
    holds for them alone.

    A family that does not verify is left out, and what it may say with it; all others stay. ``refused`` adds families
    that were not even fetched.

    Raises:
        RefusedError: ``registry.bad_signature``, ``registry.rollback``, ``registry.expired``, ``registry.damaged``.
    """
    with translated():
        chain = _root_chain(roots, bootstrap, state.root)
        root = chain[state.root]
        timestamp = signed(Timestamp, state.timestamp.encode(), root, "timestamp")
        data = state.snapshot.encode()
        timestamp.snapshot_meta.verify_length_and_hashes(data)
        snapshot = signed(Snapshot, data, root, "snapshot")
        require_version("snapshot", snapshot.version, timestamp.snapshot_meta.version)
        meta = snapshot.meta.get("targets.json")
        if meta is None:
            raise RepositoryError("the snapshot names no targets")
        data = state.targets.encode()
        meta.verify_length_and_hashes(data)
        targets = signed(Targets, data, root, "targets")
        require_version("targets", targets.version, meta.version)
        families, unverified = verified_families(state, snapshot, targets, high_water)
        trusted = Trusted(root, timestamp, snapshot, targets, families, {**(refused or {}), **unverified})
        _require_not_lower(trusted, chain, high_water)
        if trusted.expired(at):
            raise ExpiredMetadataError(f"metadata is not valid at {at:%Y-%m-%d %H:%M} UTC")
        return trusted


class _SourceFetcher(FetcherInterface):
    """Lets python-tuf read from a ``Source``; its errors pass through untouched, but for "not found"."""

    def __init__(self, source: MetadataSource, kept_timestamp: Path) -> None:
        self._source = source
        self._kept_timestamp = kept_timestamp
        self._timestamp: bytes | None = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter((self.download_bytes(url, UpdaterConfig().targets_max_length),))

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return the metadata file at ``url``: in memory, where python-tuf would spool to a temporary file."""
        name = url.removeprefix(_BASE)
        if name == self._kept_timestamp.name and self._timestamp is not None:
            return self._timestamp
        try:
            return self._source.metadata(name, max_length)
        except NotFoundError as error:
            if name.endswith(".root.json"):
                self._look_at_timestamp()
            raise DownloadHTTPError(f"no {name}", 404) from error  # this is what ends the walk along the roots

    def _look_at_timestamp(self) -> None:
        """Fetch the timestamp, which comes next, before python-tuf reads the kept one; which may have to go first."""
        with contextlib.suppress(GarrisonError):  # python-tuf asks again, and hears why
            self._timestamp = self._source.metadata(self._kept_timestamp.name, UpdaterConfig().timestamp_max_length)
            if _only_prolonged(self._kept_timestamp, self._timestamp):
                self._kept_timestamp.unlink()


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
            for role, text in state.families.items():
                (folder / family_file(role)).write_bytes(text.encode())


def _only_prolonged(kept: Path, offered: bytes) -> bool:
    """Tell whether ``offered`` is the kept timestamp with a later expiry, as bundles carry it; nothing is verified yet.

    python-tuf keeps its own of two timestamps with one version, even an expired one. They differ in nothing but the
    expiry, so there is no older state to be rolled back to.
    """
    if not kept.exists():
        return False
    try:
        before = Metadata[Timestamp].from_bytes(kept.read_bytes()).signed
        after = Metadata[Timestamp].from_bytes(offered).signed
        same = (before.version, before.snapshot_meta) == (after.version, after.snapshot_meta)
        return same and before.expires < after.expires
    except (RepositoryError, AttributeError):
        return False


def _parse_targets(data: bytes) -> Targets:
    return Metadata[Targets].from_bytes(data).signed


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
        require_version("root", root.version, version)
        chain[version] = root
    if last not in chain:
        raise BadVersionNumberError(f"root {last} is below the pinned one")
    return chain


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
