"""The controller's registry without a network, and python-tuf's own client over its files, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from garrison_controller.api.registry import parse_upload
from garrison_controller.db.base import Database
from garrison_controller.devices.keyring import Keyring, KeyStore
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.rules import Upload
from garrison_controller.registry.service import Publication, Registry
from garrison_controller.registry.store import RegistryStore
from garrison_controller.signing.metadata import parse_root, parse_targets, target_changes
from garrison_controller.signing.packing import Package
from garrison_controller.signing.workspace import Workspace
from tests.fakes.ceremony import NOW, Ceremony

METADATA, TARGETS = "tuf://registry/metadata/", "tuf://registry/targets/"


class FolderFetcher(FetcherInterface):
    """Serves a registry's folder as any static file server would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = unquote(urlsplit(url).path).lstrip("/")
        file = self.folder / (path.removeprefix("metadata/") if path.startswith("metadata/") else path)
        if not file.is_file():
            raise DownloadHTTPError(f"no {path}", 404)
        return iter([file.read_bytes()])


class PublishedRegistry:
    """A ``Registry`` on a ceremony's online keys; ``notices`` collects every new timestamp."""

    def __init__(self, ceremony: Ceremony) -> None:
        state = ceremony.folder / "state"
        state.mkdir()
        self.folder = state / "metadata"
        self.notices: list[bytes] = []
        self.database = Database(f"sqlite:///{state / 'controller.db'}")
        self.database.create_all()
        keyring = Keyring(KeyStore(ceremony.folder / "online"))
        self.registry = Registry(
            self.database,
            RegistryStore(self.folder),
            BlobFolder(state / "blobs"),
            keyring.signers,
            keyring.purposes,
            on_timestamp=self.notices.append,
        )
        self.workspace = ceremony.workspace

    def upload_blobs(self, package: Package) -> None:
        """Receive a package's blobs."""
        for blob in package.blobs:
            incoming = self.registry.blobs.begin(blob.sha256, 0, blob.size)
            incoming.write(blob.path.read_bytes())
            assert incoming.finish()
            incoming.close()

    def push(self) -> Publication:
        """Publish what is pending in the workspace, as ``anna``, and record it there."""
        complete = self.workspace.completed()
        publication = self.registry.accept_metadata(upload_of(self.workspace), "id-anna", "anna", NOW)
        for role, data in complete.items():
            version = parse_root(data).signed.version if role == "root" else parse_targets(data, role).signed.version
            self.workspace.record_published(role, version, data)
        return publication

    def updater(self, cache: Path) -> Updater:
        """Return python-tuf's unmodified client, pinned to ``1.root.json``."""
        cache.mkdir(exist_ok=True)
        fetcher = FolderFetcher(self.folder)
        return Updater(str(cache), METADATA, str(cache), TARGETS, fetcher, bootstrap=self.registry.first_root())

    def close(self) -> None:
        """Close the database."""
        self.database.close()


class RegistryRemote:
    """``signing.sync.Remote`` without a network; whoever pushes is ``anna``."""

    def __init__(self, published: PublishedRegistry) -> None:
        self._registry = published.registry

    def metadata(self, name: str) -> bytes:
        """See ``Remote``."""
        return self._registry.store.metadata_path(name).read_bytes()

    def target(self, sha256: str, path: str) -> bytes:
        """See ``Remote``."""
        return self._registry.store.target_path(sha256, path).read_bytes()

    def publish(self, upload: dict[str, object]) -> dict[str, object]:
        """See ``Remote``."""
        parsed = parse_upload(json.dumps(upload).encode())
        return self._registry.accept_metadata(parsed, "id-anna", "anna", NOW).to_dict()


def upload_of(workspace: Workspace) -> Upload:
    """Return the workspace's pending roles as an upload, signed enough or not."""
    pending = {path.name.split(".")[1]: path.read_bytes() for path in (workspace.folder / "pending").iterdir()}
    files: dict[str, bytes] = {}
    for role in pending.keys() - {"root"}:
        targets, published = workspace.pending_targets(role), workspace.published_targets(role)
        assert targets is not None
        changes = target_changes(None if published is None else published.signed, targets.signed)
        files |= {change.path: workspace.target_bytes(change.target) for change in changes if change.target}
    roots = (pending["root"],) if "root" in pending else ()
    of_families = {role: data for role, data in pending.items() if role not in ("root", "targets")}
    return Upload(roots, pending.get("targets"), files, of_families)
