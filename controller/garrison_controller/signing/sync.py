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
from tuf.ngclient import FetcherInterface, Updater

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
        metadata = parse_root(data) if role == "root" else parse_targets(data)
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
        root = parse_root((Path(folder) / "root.json").read_bytes())
        roots = {version: remote.metadata(file_name("root", version)) for version in range(2, root.signed.version + 1)}
    _refuse_outdated(workspace, targets_bytes)
    _keep(workspace, {1: first, **roots}, targets_bytes, remote)
    return Pulled(root.signed.version, parse_targets(targets_bytes).signed.version)


def _upload(workspace: Workspace, complete: dict[str, bytes]) -> dict[str, object]:
    upload: dict[str, object] = {"roots": [], "files": {}}
    if "root" in complete:
        upload["roots"] = [_base64(complete["root"])]
    if "targets" in complete:
        upload["targets"] = _base64(complete["targets"])
        published = workspace.published_targets()
        changes = target_changes(
            None if published is None else published.signed, parse_targets(complete["targets"]).signed
        )
        upload["files"] = {
            change.path: _base64(workspace.target_bytes(change.target)) for change in changes if change.target
        }
    return upload


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


def _refuse_outdated(workspace: Workspace, targets_bytes: bytes) -> None:
    published, pending = parse_targets(targets_bytes), workspace.pending_targets()
    if pending is None or pending.signed.version > published.signed.version or pending.signed == published.signed:
        return
    raise ConflictError(
        "signing.pending_outdated",
        f"targets version {pending.signed.version} waits for signatures, but another one is published",
        hint=f"remove {workspace.folder / 'pending'}, pull, and make the change again",
    )


def _keep(workspace: Workspace, roots: dict[int, bytes], targets_bytes: bytes, remote: Remote) -> None:
    targets = parse_targets(targets_bytes).signed
    for target in targets.targets.values():
        try:
            data = workspace.target_bytes(target)
        except NotFoundError:
            data = remote.target(target.hashes["sha256"], target.path)
            read_target(target, data)
            workspace.record_target(target, data)
    for version, root in roots.items():
        workspace.record_published("root", version, root)
    workspace.record_published("targets", targets.version, targets_bytes)


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
