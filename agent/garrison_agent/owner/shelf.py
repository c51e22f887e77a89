"""The packages on this board's disk: manifests by name and version, files by digest (docs/architecture.md, "Disk")."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from garrison_agent.registry.budget import InstalledBlob
from garrison_agent.registry.files import BlobStore, disk_errors, sync_folder, write_atomic
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, NotFoundError, RefusedError
from garrison_protocol.manifest import Manifest, PackageRef, Variant, parse_manifest


@dataclass(frozen=True)
class Package:
    """A package whose manifest is on the disk, and the variants of which every file is."""

    ref: PackageRef
    manifest: Manifest
    folder: Path
    variants: tuple[Variant, ...]
    last_used: int
    """Unix seconds."""


class Shelf:
    """Manifests under ``models/``, blobs beside them. Reads are safe in any thread; the owner thread removes."""

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self.root = root
        self.blobs = blobs
        self._parsed: dict[str, Manifest] = {}

    def folder(self, name: str, version: str) -> Path:
        """Return where a package's manifest lies."""
        return self.root / name / version

    def keep(self, ref: PackageRef, data: bytes) -> Manifest:
        """Store the manifest of ``ref``, whose digest was checked against trusted metadata, and return it."""
        manifest = parse_manifest(data)
        write_atomic(self.folder(ref.name, ref.version) / "manifest.json", data)
        self._parsed[ref.manifest_sha256] = manifest
        return manifest

    def manifest(self, ref: PackageRef) -> Manifest:
        """Return the manifest of ``ref``, read from disk and compared with its digest the first time.

        Raises:
            NotFoundError: ``model.manifest_missing``.
            RefusedError: ``model.digest_mismatch``.
        """
        known = self._parsed.get(ref.manifest_sha256)
        if known is not None:
            return known
        path = self.folder(ref.name, ref.version) / "manifest.json"
        try:
            data = path.read_bytes()
        except OSError as error:  # an unreadable sector is as good as nothing
            raise NotFoundError(
                "model.manifest_missing",
                f"{path} is missing or unreadable: {error.strerror}",
                hint="the agent fetches it when it repairs the model",
            ) from error
        if sha256_hex(data) != ref.manifest_sha256:
            raise RefusedError(
                "model.digest_mismatch",
                f"{path} is not the manifest that was installed",
                hint="the agent fetches it again when it repairs the model",
            )
        manifest = self._parsed[ref.manifest_sha256] = parse_manifest(data)
        return manifest

    def variant(self, ref: PackageRef, name: str) -> tuple[Manifest, Variant]:
        """Return the manifest of ``ref`` and its variant called ``name``.

        Raises:
            NotFoundError: ``model.variant_unknown``, and as ``manifest``.
            RefusedError: as ``manifest``.
        """
        manifest = self.manifest(ref)
        variant = manifest.variant(name)
        if variant is None:
            raise NotFoundError("model.variant_unknown", f"{ref.id} has no variant {name}")
        return manifest, variant

    def forget(self, ref: PackageRef) -> None:
        """Read the manifest of ``ref`` from the disk again the next time it is asked for."""
        self._parsed.pop(ref.manifest_sha256, None)

    def used(self, ref: PackageRef) -> None:
        """Note that ``ref`` is in use now, for the order in which packages are removed."""
        with contextlib.suppress(OSError):
            os.utime(self.folder(ref.name, ref.version) / "manifest.json")

    def packages(self) -> list[Package]:
        """Return every package whose manifest is here; an unreadable one is passed over (a repair replaces it)."""
        found = []
        for path in sorted(self.root.glob("*/*/manifest.json")):
            try:
                data = path.read_bytes()
                manifest = parse_manifest(data)
            except (OSError, GarrisonError):
                continue
            ref = PackageRef(name=manifest.name, version=manifest.version, manifest_sha256=sha256_hex(data))
            whole = tuple(variant for variant in manifest.variants if self.complete(variant))
            found.append(Package(ref, manifest, path.parent, whole, int(path.stat().st_mtime)))
        return found

    def complete(self, variant: Variant) -> bool:
        """Tell whether every file of ``variant`` is on the disk at its full length."""
        return all(self.blobs.has(file.sha256, file.size) for file in variant.files)

    def missing_bytes(self, *variants: Variant) -> int:
        """Return how many bytes downloads of ``variants`` will still add to the disk."""
        files = {file.sha256: file.size for variant in variants for file in variant.files}
        missing = {sha256: size for sha256, size in files.items() if not self.blobs.has(sha256, size)}
        return sum(max(0, size - self._part_bytes(sha256)) for sha256, size in missing.items())

    def drop_partials(self, kept: Collection[str]) -> None:
        """Give up on begun downloads of all blobs but those in ``kept``."""
        for sha256 in self.blobs.partials():
            if sha256 not in kept:
                path = self.blobs.part_path(sha256)
                with disk_errors(path):
                    path.unlink(missing_ok=True)

    def installed(self, used: Collection[tuple[PackageRef, str]]) -> list[InstalledBlob]:
        """Return what each package keeps on the disk; those in ``used`` are protected."""
        protected = {ref.manifest_sha256 for ref, _ in used}
        return [
            InstalledBlob(
                package=package.ref.id,
                digests={
                    file.sha256: file.size
                    for variant in package.manifest.variants
                    for file in variant.files
                    if self.blobs.has(file.sha256, file.size)
                },
                last_used=package.last_used,
                protected=package.ref.manifest_sha256 in protected,
            )
            for package in self.packages()
        ]

    def remove(self, package_id: str, digests: Collection[str]) -> None:
        """Take the package's manifest and the blobs ``digests`` off the disk."""
        for digest in digests:
            self.blobs.remove(digest)
        name, _, version = package_id.partition(":")
        folder = self.folder(name, version)
        with disk_errors(folder), contextlib.suppress(FileNotFoundError):
            (folder / "manifest.json").unlink()
            sync_folder(folder)
        for path in (folder, folder.parent):
            with contextlib.suppress(OSError):  # other versions, or an operator's files, keep the folder
                path.rmdir()

    def _part_bytes(self, sha256: str) -> int:
        try:
            return self.blobs.part_path(sha256).stat().st_blocks * 512
        except FileNotFoundError:
            return 0
