"""What a board may believe about the registry: refreshed from the controller, or checked again without it.

In production both run in a short-lived process (``verifier.TrustVerifier``), so that python-tuf's memory goes away
with it; importing this module costs nothing. Source: docs/security.md, "Trust"; notes on python-tuf in docs/adr/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from garrison_agent.registry.cache import MetadataCache
from garrison_agent.registry.source import MetadataSource
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import NotFoundError, RefusedError
from garrison_protocol.fleet import FLEET_TARGET, MAX_FLEET_BYTES, parse_fleet
from garrison_protocol.ids import SHA256_PATTERN
from garrison_protocol.manifest import MAX_MANIFEST_BYTES, Manifest, PackageRef, parse_manifest, target_path
from garrison_protocol.states import Freshness

if TYPE_CHECKING:
    from garrison_agent.registry.chain import Trusted


@dataclass(frozen=True)
class Refresh:
    """A verified view of the registry.

    Store the versions in ``high_water`` exactly as they are here, as the next high-water marks: after a rotation of
    keys a version may rightly be lower than before, and a maximum would shut the board out.
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
    families: Mapping[str, int] = field(default_factory=dict)
    """Marks of delegated roles: ``<role>@<digest of its keys>``, and their versions."""
    withheld: Mapping[str, str] = field(default_factory=dict)
    """Wanted paths whose family has expired or was refused, with the code; other families are not concerned."""
    refreshed_at: int = 0
    """Unix seconds at which all of it was valid; give it to ``offline`` later."""
    expires: Mapping[str, int] = field(default_factory=dict)
    """When each role ends, in Unix seconds."""

    @property
    def high_water(self) -> dict[str, int]:
        """The versions by role, as ``refresh`` and ``offline`` take them."""
        return {
            "root": self.root,
            "timestamp": self.timestamp,
            "snapshot": self.snapshot,
            "targets": self.targets,
            **self.families,
        }


def refresh(
    source: MetadataSource,
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
        state, refused = chain.update(source, cache, bootstrap, want)
        trusted = chain.verify(state, cache.roots(), bootstrap, at=at, high_water=high_water, refused=refused)
        good = {role: text for role, text in state.families.items() if role in trusted.families}
        cache.commit(state.model_copy(update={"families": good}))
        files = [file for part in (trusted.targets, *trusted.families.values()) for file in part.targets.values()]
        cache.prune_targets({file.hashes["sha256"] for file in files if "sha256" in file.hashes})

        def obtain(path: str, sha256: str, length: int) -> bytes:
            data = cache.target(sha256)
            if data is None:
                data = source.target(path, sha256, length)
                if len(data) != length or sha256_hex(data) != sha256:
                    raise _damaged(path, "the controller's copy is not the one that was signed")
                cache.keep_target(sha256, data)
            return data

        return _view(trusted, want, obtain, high_water=high_water, freshness=Freshness.FRESH, valid_at=at, judged_at=at)


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

    return _view(trusted, want, obtain, high_water=high_water, freshness=freshness, valid_at=then, judged_at=now)


def admit(view: Refresh, package: PackageRef) -> Manifest:
    """Return the manifest of ``package`` if the release signers let a board install exactly that.

    Raises:
        NotFoundError: ``registry.target_unknown``; the registry names no such package (or it was not wanted).
        RefusedError: ``registry.manifest_mismatch``; the registry's manifest is another one. ``registry.below_floor``;
            the signers have withdrawn the version. ``registry.stale``; metadata is not fresh, so nothing is installed.
            The code in ``Refresh.withheld``; its family's metadata is not good.
        InvalidError: ``manifest.malformed``, ``fleet.malformed``.
    """
    path = target_path(package.name, package.version)
    if (code := view.withheld.get(path)) is not None:
        raise RefusedError(
            code,
            f"the metadata of the family that {package.id} belongs to has expired, is missing, or does not verify",
            hint="its signers publish a new version with `garrison registry push`; other families go on",
            retryable=code in ("registry.expired", "source.not_found"),
        )
    data = view.manifests.get(path)
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
    obtain: Callable[[str, str, int], bytes | None],
    *,
    high_water: Mapping[str, int],
    freshness: Freshness,
    valid_at: datetime,
    judged_at: datetime,
) -> Refresh:
    found: dict[str, bytes] = {}
    withheld = {path: code for path in want if (code := trusted.withheld(path, judged_at)) is not None}
    for path in dict.fromkeys((FLEET_TARGET, *want)):
        try:
            data = _target(trusted, path, obtain)
        except (RefusedError, NotFoundError) as error:
            if path in trusted.targets.targets or not error.code.startswith(("registry.", "source.")):
                raise
            withheld.setdefault(path, error.code)  # a family's fault, and so no other's
            continue
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
        families={mark: version for mark, version in high_water.items() if "@" in mark} | trusted.marks,
        withheld=withheld,
        refreshed_at=int(valid_at.timestamp()),
        expires=trusted.ends,
    )


def _target(trusted: Trusted, path: str, obtain: Callable[[str, str, int], bytes | None]) -> bytes | None:
    target = trusted.target(path)
    if target is None:
        return None
    limit = MAX_FLEET_BYTES if path == FLEET_TARGET else MAX_MANIFEST_BYTES
    sha256 = target.hashes.get("sha256")
    # The digest becomes a file's name: whoever signs it must not choose which file of this board is read.
    if sha256 is None or re.fullmatch(SHA256_PATTERN, sha256) is None or target.length > limit:
        raise _damaged(path, "metadata gives it no SHA-256, or more bytes than a board reads")
    return obtain(path, sha256, target.length)


def _damaged(path: str, what: str) -> RefusedError:
    return RefusedError(
        "registry.damaged",
        f"{path}: {what}",
        hint="the next refresh replaces a damaged cache; if it comes from the controller, publish again",
    )
