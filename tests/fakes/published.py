"""The controller's registry without a network, and python-tuf's own client over its files, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from garrison_controller.db.base import Database
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.online import OnlineSigners
from garrison_controller.registry.rules import Upload
from garrison_controller.registry.service import Publication, Registry
from garrison_controller.registry.store import RegistryStore
from garrison_controller.signing.metadata import parse_root, parse_targets, target_changes
from garrison_controller.signing.packing import Package
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.keys import SigningKey
from garrison_protocol.states import KeyPurpose
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
        keys = ceremony.folder / "online"
        self.registry = Registry(
            self.database,
            RegistryStore(self.folder),
            BlobFolder(state / "blobs"),
            OnlineSigners.load(keys),
            {
                purpose: SigningKey.load(keys / f"{purpose.value}.key").public_hex
                for purpose in (KeyPurpose.DIRECTOR, KeyPurpose.RECEIPT, KeyPurpose.LOG)
            },
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
            version = parse_root(data).signed.version if role == "root" else parse_targets(data).signed.version
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


def upload_of(workspace: Workspace) -> Upload:
    """Return the workspace's pending roles as an upload, signed enough or not."""
    root, targets, published = (workspace.pending_root(), workspace.pending_targets(), workspace.published_targets())
    pending = {path.name.split(".")[1]: path.read_bytes() for path in (workspace.folder / "pending").iterdir()}
    files = {}
    if targets is not None:
        changes = target_changes(None if published is None else published.signed, targets.signed)
        files = {change.path: workspace.target_bytes(change.target) for change in changes if change.target}
    return Upload(() if root is None else (pending["root"],), pending.get("targets"), files)
