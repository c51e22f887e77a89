"""The published repository on disk: a plain TUF repository that any TUF client, or a USB stick, can be fed from.

``metadata/`` holds TUF metadata by file name, ``metadata/targets/`` the small targets with their digests before their
names. ``timestamp.json`` is written last, so that everything it leads to is durable before a client can learn of it.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

from garrison_controller.signing.families import all_targets, families, is_family_role
from garrison_controller.signing.metadata import (
    file_name,
    parse_root,
    parse_targets,
    prefixed_path,
    target_digest,
    write_durable,
)
from garrison_protocol.errors import GarrisonError, NotFoundError

TIMESTAMP = "timestamp.json"
_METADATA_NAME = re.compile(
    r"timestamp\.json|[1-9][0-9]{0,9}\.(root|targets|snapshot|family-[a-z0-9][a-z0-9-]{0,62})\.json"
)


@dataclass(frozen=True)
class Published:
    """What ``timestamp.json`` leads to."""

    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    targets_bytes: bytes
    families: Mapping[str, Metadata[Targets]]
    """Those that targets delegates to, by role."""

    @property
    def listed(self) -> dict[str, int]:
        """The version of every family that the snapshot lists, those that were taken back as well."""
        roles = {name.removesuffix(".json"): meta.version for name, meta in self.snapshot.signed.meta.items()}
        return {role: version for role, version in roles.items() if is_family_role(role)}

    @property
    def every_target(self) -> dict[str, tuple[str, TargetFile]]:
        """Every target with the role that names it, by path."""
        return all_targets(self.targets.signed, {role: one.signed for role, one in self.families.items()})


class RegistryStore:
    """Files below the metadata folder. Readers need no lock: files are replaced whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._targets = folder / "targets"

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold the one publisher's lock, against threads and processes alike."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def metadata_path(self, name: str) -> Path:
        """Return the file that holds the metadata called ``name``.

        Raises:
            NotFoundError: ``registry.metadata_not_found``; to a TUF client an answer, not a failure.
        """
        path = self._folder / name
        if _METADATA_NAME.fullmatch(name) is None or not path.is_file():
            raise NotFoundError("registry.metadata_not_found", f"no metadata {name[:64]!r} is published")
        return path

    def find_metadata(self, name: str) -> bytes | None:
        """Return the metadata called ``name``, or None."""
        path = self._folder / name
        return path.read_bytes() if path.is_file() else None

    def target_path(self, sha256: str, path: str) -> Path:
        """Return the file that holds the target ``path`` with the digest ``sha256``.

        Raises:
            NotFoundError: ``registry.target_not_found``.
        """
        folder, slash, name = path.rpartition("/")
        found = self._targets / f"{folder}{slash}{sha256}.{name}"
        try:
            present = found.resolve().is_relative_to(self._targets.resolve()) and found.is_file()
        except (OSError, ValueError):  # a name too long for the file system, or with a NUL
            present = False
        if re.fullmatch(r"[0-9a-f]{64}", sha256) is None or not present:
            raise NotFoundError("registry.target_not_found", f"no target {path[:128]!r} with this digest is published")
        return found

    def read_target(self, target: TargetFile) -> bytes:
        """Return the bytes of a published target.

        Raises:
            NotFoundError: ``registry.target_not_found``.
        """
        return self.target_path(target_digest(target), target.path).read_bytes()

    def root(self) -> Metadata[Root] | None:
        """Return the newest root: clients walk the numbers up to it."""
        versions = [int(path.name.split(".")[0]) for path in self._folder.glob("*.root.json")]
        if not versions:
            return None
        return parse_root((self._folder / file_name("root", max(versions))).read_bytes())

    def roots(self) -> dict[int, bytes]:
        """Return every root, from the first on, by version."""
        found = {int(path.name.split(".")[0]): path for path in self._folder.glob("*.root.json")}
        return {version: found[version].read_bytes() for version in sorted(found)}

    def published(self) -> Published | None:
        """Return what is published, or None before the first publication.

        Raises:
            GarrisonError: ``registry.store_damaged``: a file that the timestamp leads to is missing or unreadable.
        """
        data = self.find_metadata(TIMESTAMP)
        return None if data is None else self.leads_to(data)

    def leads_to(self, stamp: bytes) -> Published:
        """Return what ``stamp``, the bytes of a timestamp of ours, leads to.

        Raises:
            GarrisonError: ``registry.store_damaged``, as ``published``.
        """
        try:
            timestamp = Metadata[Timestamp].from_bytes(stamp)
            name = file_name("snapshot", timestamp.signed.snapshot_meta.version)
            snapshot = Metadata[Snapshot].from_bytes((self._folder / name).read_bytes())
            name = file_name("targets", snapshot.signed.meta["targets.json"].version)
            targets_bytes = (self._folder / name).read_bytes()
            targets = parse_targets(targets_bytes)
            of_families = {role: self._family(snapshot.signed, role) for role in families(targets.signed)}
            return Published(timestamp, snapshot, targets, targets_bytes, of_families)
        except (OSError, KeyError, RepositoryError) as error:
            raise GarrisonError(
                "registry.store_damaged",
                f"the published repository in {self._folder} is damaged: {error}",
                hint="restore the folder from a backup",
            ) from error

    def write_root(self, version: int, data: bytes) -> None:
        """Keep a root for ever; boards that were away for long walk through all of them."""
        write_durable(self._folder / file_name("root", version), data)

    def write_metadata(self, role: str, version: int, data: bytes) -> None:
        """Write targets, a family's, or snapshot metadata; nobody sees it before the timestamp leads there."""
        write_durable(self._folder / file_name(role, version), data)

    def write_target(self, target: TargetFile, data: bytes) -> None:
        """Write a small target."""
        write_durable(self._targets / prefixed_path(target), data)

    def write_timestamp(self, data: bytes) -> None:
        """Publish: from here on clients see the new version."""
        write_durable(self._folder / TIMESTAMP, data)

    def _family(self, snapshot: Snapshot, role: str) -> Metadata[Targets]:
        name = file_name(role, snapshot.meta[f"{role}.json"].version)
        return parse_targets((self._folder / name).read_bytes(), role)
