"""What a board may believe about the registry: refreshed from the controller, or checked again without it.

In production both run in a short-lived process (``verifier.TrustVerifier``), so that python-tuf's memory goes away
with it; importing this module costs nothing. Source: docs/security.md, "Trust"; notes on python-tuf in docs/adr/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from garrison_agent.registry.cache import MetadataCache
from garrison_agent.registry.source import Source
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET, MAX_FLEET_BYTES, parse_fleet
from garrison_protocol.manifest import MAX_MANIFEST_BYTES, Manifest, PackageRef, parse_manifest, target_path
from garrison_protocol.states import Freshness

if TYPE_CHECKING:
    from garrison_agent.registry.chain import Trusted


@dataclass(frozen=True)
class Refresh:
    """A verified view of the registry.

    Store the four versions exactly as they are here, as the next high-water marks: after a rotation of keys a version
    may rightly be lower than before, and a maximum would shut the board out.
    """

    freshness: Freshness
    root: int
    timestamp: int
    snapshot: int
    targets: int
    fleet: bytes | None
    """``fleet.json``, or None while the release signers have published none."""
    manifests: Mapping[str, bytes] = field(default_factory=dict)
    """Those of the wanted targets that are in the registry and at hand, by path."""
    refreshed_at: int = 0
    """Unix seconds at which all of it was valid; give it to ``offline`` later."""

    @property
    def high_water(self) -> dict[str, int]:
        """The versions by role, as ``refresh`` and ``offline`` take them."""
        return {
            "root": self.root,
            "timestamp": self.timestamp,
            "snapshot": self.snapshot,
            "targets": self.targets,
        }


def refresh(
    source: Source,
    folder: Path,
    *,
    bootstrap: bytes,
    high_water: Mapping[str, int],
    floor: datetime,
    want: Sequence[str],
) -> Refresh:
    """Return the registry's newest state, fetched and verified at max(``floor``, clock), and keep it durably.

    ``folder`` is the cache, ``bootstrap`` the pinned root, ``want`` the paths of targets to have at hand besides
    ``fleet.json``. Always FRESH: expired metadata is refused, whereupon ``offline`` still gives the last good state.

    Raises:
        RefusedError: ``registry.expired``, ``registry.rollback``, ``registry.bad_signature``, ``registry.damaged``,
            ``source.too_long``.
        UnavailableError: ``source.unreachable``, ``disk.failed``.
        NotFoundError: ``source.not_found``; the controller lacks metadata or a target that metadata names.
        InsufficientError: ``disk.full``.
    """
    from garrison_agent.registry import chain

    cache = MetadataCache(folder)
    with cache.lock():
        at = max(floor, datetime.now(UTC))
        state = chain.update(source, cache, bootstrap)
        trusted = chain.verify(state, cache.roots(), bootstrap, at=at, high_water=high_water)
        cache.commit(state)
        files = trusted.targets.targets.values()
        cache.prune_targets({file.hashes["sha256"] for file in files if "sha256" in file.hashes})

        def obtain(path: str, sha256: str, length: int) -> bytes:
            data = cache.target(sha256)
            if data is None:
                data = source.target(path, sha256, length)
                if len(data) != length or sha256_hex(data) != sha256:
                    raise _damaged(path, "the controller's copy is not the one that was signed")
                cache.keep_target(sha256, data)
            return data

        return _view(trusted, want, Freshness.FRESH, at, obtain)


def offline(
    folder: Path,
    *,
    bootstrap: bytes,
    high_water: Mapping[str, int],
    trusted_at: int,
    want: Sequence[str],
    floor: datetime | None = None,
) -> Refresh:
    """Return the kept state, verified again at ``trusted_at`` (the last ``Refresh.refreshed_at``), with no network.

    STALE where it has expired since, judged at max(``trusted_at``, ``floor``, clock). Wanted targets that are not at
    hand are left out.

    Raises:
        NotFoundError: ``registry.empty``; this board has never refreshed.
        RefusedError: ``registry.damaged``, ``registry.rollback``, ``registry.bad_signature``, ``registry.expired``
            (it was not even valid at ``trusted_at``).
    """
    from garrison_agent.registry import chain

    cache = MetadataCache(folder)
    state = cache.load()
    if state is None:
        raise NotFoundError(
            "registry.empty",
            f"{folder} holds no registry metadata yet",
            hint="the board must reach its controller once before it can work without",
        )
    then = datetime.fromtimestamp(trusted_at, UTC)
    trusted = chain.verify(state, cache.roots(), bootstrap, at=then, high_water=high_water)
    now = max(then, datetime.now(UTC), floor or then)
    freshness = Freshness.STALE if trusted.expired(now) else Freshness.FRESH

    def obtain(path: str, sha256: str, _length: int) -> bytes | None:
        data = cache.target(sha256)
        if data is None and path == FLEET_TARGET:
            raise _damaged(path, "it is missing from the cache or damaged there")
        return data

    return _view(trusted, want, freshness, then, obtain)


def admit(view: Refresh, package: PackageRef) -> Manifest:
    """Return the manifest of ``package`` if the release signers let a board install exactly that.

    Raises:
        NotFoundError: ``registry.target_unknown``; the registry names no such package (or it was not wanted).
        RefusedError: ``registry.manifest_mismatch``; the registry's manifest is another one. ``registry.below_floor``;
            the signers have withdrawn the version. ``registry.stale``; metadata is not fresh, so nothing is installed.
        InvalidError: ``manifest.malformed``, ``fleet.malformed``.
    """
    data = view.manifests.get(target_path(package.name, package.version))
    if data is None:
        raise NotFoundError(
            "registry.target_unknown",
            f"the signed registry has no {package.id}",
            hint="publish it with `garrison model publish`; the board looks again by itself",
            retryable=True,
        )
    if sha256_hex(data) != package.manifest_sha256:
        raise RefusedError(
            "registry.manifest_mismatch",
            f"desired state names another manifest for {package.id} than the release signers signed",
            hint="create the rollout again from the published package",
        )
    if view.fleet is not None and parse_fleet(view.fleet).below_floor(package.name, package.version):
        raise RefusedError(
            "registry.below_floor",
            f"{package.id} is below the floor that the release signers set",
            hint="roll out a newer version",
        )
    if view.freshness is not Freshness.FRESH:
        raise RefusedError(
            "registry.stale",
            f"metadata has expired, so {package.id} cannot be installed now",
            hint="connect the board to its controller",
            retryable=True,
        )
    manifest = parse_manifest(data)
    if (manifest.name, manifest.version) != (package.name, package.version):
        raise RefusedError(
            "registry.manifest_mismatch",
            f"the manifest published as {package.id} says it is {manifest.id}",
            hint="publish the package again under its own name",
        )
    return manifest


def _view(
    trusted: Trusted,
    want: Sequence[str],
    freshness: Freshness,
    at: datetime,
    obtain: Callable[[str, str, int], bytes | None],
) -> Refresh:
    found: dict[str, bytes] = {}
    for path in dict.fromkeys((FLEET_TARGET, *want)):
        target = trusted.target(path)
        if target is None:
            continue
        limit = MAX_FLEET_BYTES if path == FLEET_TARGET else MAX_MANIFEST_BYTES
        sha256 = target.hashes.get("sha256")
        if sha256 is None or target.length > limit:
            raise _damaged(path, "metadata gives it no SHA-256, or more bytes than a board reads")
        data = obtain(path, sha256, target.length)
        if data is not None:
            found[path] = data
    fleet = found.pop(FLEET_TARGET, None)
    return Refresh(
        freshness=freshness,
        root=trusted.root.version,
        timestamp=trusted.timestamp.version,
        snapshot=trusted.snapshot.version,
        targets=trusted.targets.version,
        fleet=fleet,
        manifests=found,
        refreshed_at=int(at.timestamp()),
    )


def _damaged(path: str, what: str) -> RefusedError:
    return RefusedError(
        "registry.damaged",
        f"{path}: {what}",
        hint="the next refresh replaces a damaged cache; if it comes from the controller, publish again",
    )
