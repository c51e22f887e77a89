"""Between a signers' workspace and the controller: push what is signed, pull what is published.

The controller is reached through a ``Remote``, which the commands implement; nothing it answers is believed without
the signatures, from the workspace's first root on.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Snapshot, Targets
from tuf.ngclient import FetcherInterface, Updater

from garrison_controller.signing.families import TARGETS, families, is_family_role, refuse_unless_valid
from garrison_controller.signing.metadata import file_name, parse_root, parse_targets, read_target, target_changes
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, NotFoundError, RefusedError

_BASE = "registry://controller/"


class Remote(Protocol):
    """The controller, as a ceremony sees it. Methods raise ``GarrisonError``; NotFoundError where there is nothing."""

    def metadata(self, name: str) -> bytes:
        """Return a TUF metadata file."""
        ...

    def target(self, sha256: str, path: str) -> bytes:
        """Return a small target."""
        ...

    def publish(self, upload: dict[str, object]) -> dict[str, object]:
        """Send signed metadata; return the versions in force."""
        ...


@dataclass(frozen=True)
class Pulled:
    """Versions in the workspace after a pull."""

    root: int
    targets: int


def push(workspace: Workspace, remote: Remote) -> dict[str, object]:
    """Publish every pending role and keep it as published; return the controller's answer.

    Raises:
        RefusedError: ``registry.threshold_unmet``, before anything is sent.
        ConflictError: ``signing.nothing_pending``.
        GarrisonError: What the controller answered.
    """
    complete = workspace.completed()
    answer = remote.publish(_upload(workspace, complete))
    for role, data in complete.items():
        metadata = parse_root(data) if role == "root" else parse_targets(data, role)
        workspace.record_published(role, metadata.signed.version, data)
    return answer


def pull(workspace: Workspace, remote: Remote, first_root_sha256: str | None = None) -> Pulled:
    """Bring the workspace to what is published, verified by python-tuf's client from the first root on.

    A new workspace needs ``first_root_sha256``, learnt from a person and not from the controller.

    Raises:
        InvalidError: ``signing.first_root_unknown``.
        RefusedError: ``signing.first_root_mismatch``, ``registry.untrusted``.
        ConflictError: ``signing.pending_outdated`` if a pending version is published with other content.
    """
    first = _first_root(workspace, remote, first_root_sha256)
    with tempfile.TemporaryDirectory(prefix="garrison-pull-") as folder:
        updater = Updater(
            str(Path(folder)), _BASE + "metadata/", None, _BASE + "targets/", _RemoteFetcher(remote), bootstrap=first
        )
        try:
            updater.refresh()
        except (RepositoryError, DownloadError) as error:
            if isinstance(error.__cause__, GarrisonError):
                raise error.__cause__ from error
            raise RefusedError(
                "registry.untrusted",
                f"what the controller publishes does not follow from the first root: {error}",
                hint="do not sign anything; find out who changed the controller's registry",
            ) from error
        targets_bytes = (Path(folder) / "targets.json").read_bytes()
        snapshot = Metadata[Snapshot].from_bytes((Path(folder) / "snapshot.json").read_bytes()).signed
        root = parse_root((Path(folder) / "root.json").read_bytes())
        roots = {version: remote.metadata(file_name("root", version)) for version in range(2, root.signed.version + 1)}
    published = {TARGETS: targets_bytes, **_families(remote, snapshot, parse_targets(targets_bytes).signed)}
    _refuse_outdated(workspace, published)
    _keep(workspace, {1: first, **roots}, published, remote)
    return Pulled(root.signed.version, parse_targets(targets_bytes).signed.version)


def _upload(workspace: Workspace, complete: dict[str, bytes]) -> dict[str, object]:
    upload: dict[str, object] = {"roots": [], "files": {}}
    if "root" in complete:
        upload["roots"] = [_base64(complete["root"])]
    if TARGETS in complete:
        upload[TARGETS] = _base64(complete[TARGETS])
    if of_families := {role: _base64(data) for role, data in complete.items() if is_family_role(role)}:
        upload["families"] = of_families
    files = {}
    for role in (TARGETS, *of_families):
        if role in complete:
            published = workspace.published_targets(role)
            before = None if published is None else published.signed
            for change in target_changes(before, parse_targets(complete[role], role).signed):
                if change.target is not None:
                    files[change.path] = _base64(workspace.target_bytes(change.target))
    upload["files"] = files
    return upload


def _families(remote: Remote, snapshot: Snapshot, targets: Targets) -> dict[str, bytes]:
    """Return the metadata of every family that the snapshot lists, those that were taken back as well."""
    found = {}
    for name, meta in snapshot.meta.items():
        role = name.removesuffix(".json")
        if not is_family_role(role):
            continue
        data = remote.metadata(file_name(role, meta.version))
        try:
            meta.verify_length_and_hashes(data)
        except RepositoryError as error:
            raise RefusedError(
                "registry.untrusted",
                f"the controller's {role} is not the one that its snapshot names",
                hint="do not sign anything; find out who changed the controller's registry",
            ) from error
        if role in families(targets):
            refuse_unless_valid(targets, role, parse_targets(data, role))
        found[role] = data
    return found


def _first_root(workspace: Workspace, remote: Remote, expected: str | None) -> bytes:
    kept = workspace.first_root()
    if kept is not None:
        return kept
    if expected is None:
        raise InvalidError(
            "signing.first_root_unknown",
            f"{workspace.folder} has no root to start from",
            hint="give --root-sha256 with the digest of 1.root.json that another signer tells you",
        )
    data = remote.metadata(file_name("root", 1))
    if sha256_hex(data) != expected:
        raise RefusedError(
            "signing.first_root_mismatch",
            f"the controller's 1.root.json has the SHA-256 {sha256_hex(data)}",
            hint="this is another registry, or the digest is mistyped",
        )
    return data


def _refuse_outdated(workspace: Workspace, of_roles: dict[str, bytes]) -> None:
    for role, data in of_roles.items():
        published, pending = parse_targets(data, role), workspace.pending_targets(role)
        if pending is None or pending.signed.version > published.signed.version or pending.signed == published.signed:
            continue
        raise ConflictError(
            "signing.pending_outdated",
            f"{role} version {pending.signed.version} waits for signatures, but another one is published",
            hint=f"remove {workspace.folder / 'pending'}, pull, and make the change again",
        )


def _keep(workspace: Workspace, roots: dict[int, bytes], of_roles: dict[str, bytes], remote: Remote) -> None:
    for role, data in of_roles.items():
        for target in parse_targets(data, role).signed.targets.values():
            try:
                workspace.target_bytes(target)
            except NotFoundError:
                fetched = remote.target(target.hashes["sha256"], target.path)
                read_target(target, fetched)
                workspace.record_target(target, fetched)
    for version, root in roots.items():
        workspace.record_published("root", version, root)
    for role, data in of_roles.items():
        workspace.record_published(role, parse_targets(data, role).signed.version, data)


class _RemoteFetcher(FetcherInterface):
    """python-tuf's transport over a ``Remote``; 404 ends its walk through the roots."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = unquote(urlsplit(url).path).rpartition("/")[2]
        try:
            return iter([self._remote.metadata(name)])
        except NotFoundError as error:
            raise DownloadHTTPError(str(error), 404) from error
        except GarrisonError as error:
            raise DownloadError(str(error)) from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
