"""Reads installed files back, in a thread, and has wrong ones repaired. An idle board does not import this."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from garrison_agent.api.cache_check import CacheCheck, FileCheck, FileOutcome
from garrison_agent.owner.jobs import Work
from garrison_agent.owner.shelf import Shelf
from garrison_agent.registry.download import Cancelled
from garrison_agent.registry.files import BlobStore
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import ModelFile, PackageRef, Variant

_MANIFEST = "manifest.json"
_READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Build:
    """One variant of one package."""

    package: PackageRef
    variant: str


def read_builds(check: CacheCheck, builds: list[Build], shelf: Shelf, work: Work | None) -> None:
    """Judge every file of ``builds``, and with ``work`` repair those that are wrong; ``check`` hears of all of it.

    A file that several packages share is read once. Never raises; what could not be repaired says why.
    """
    reading = _Reading(check, shelf)
    try:
        found = {build: reading.judge(build) for build in reading.sized(builds)}
        for build, files in found.items() if work is not None else ():
            if work is not None and any(file["outcome"] != "ok" for file in files):
                reading.repair(build, files, work)
    except Cancelled:
        pass
    finally:
        check.end()


class _Reading:
    def __init__(self, check: CacheCheck, shelf: Shelf) -> None:
        self._check = check
        self._shelf = shelf
        self._files: list[FileCheck] = []
        self._known: dict[str, tuple[FileOutcome, str]] = {}
        self._done = self._total = 0

    def sized(self, builds: list[Build]) -> list[Build]:
        """Return ``builds``, after adding up what there is to read."""
        files = {file.sha256: file.size for build in builds if (one := self._variant(build)) for file in one.files}
        self._total = sum(files.values())
        return builds

    def judge(self, build: Build) -> list[FileCheck]:
        """Return what is to be said of each file of a build."""
        files = [self._manifest(build)]
        self._add(files[0])
        variant = self._variant(build)
        for file in variant.files if variant is not None else ():
            if file.sha256 not in self._known:
                self._known[file.sha256] = self._read(file, partial(self._count, file.path))
            outcome, detail = self._known[file.sha256]
            files.append(_judged(build, file.path, file.size, outcome, detail))
            self._add(files[-1])
        return files

    def repair(self, build: Build, files: list[FileCheck], work: Work) -> None:
        """Have what is wrong fetched again, and look whether it is right now."""
        check = self._check

        def report(done: int, total: int) -> None:
            check.at("repairing", build.package.id, done, total)

        report(0, 0)
        if files[0]["outcome"] != "ok":
            self._shelf.forget(build.package)
        why = ""
        try:
            work.repair(build.package, build.variant, report, check.cancelled)
        except GarrisonError as error:
            why = f"{error.message} ({error.code})"
        variant = self._variant(build)
        sizes = {file.path: file for file in variant.files} if variant is not None else {}
        for file in files:
            if file["outcome"] == "ok":
                continue
            if file["path"] == _MANIFEST:
                outcome, detail = self._manifest(build)["outcome"], ""
            elif file["path"] in sizes:
                outcome, detail = self._read(sizes[file["path"]], lambda _count: None)
            else:
                continue
            if outcome == "ok":
                file["outcome"], file["detail"] = "repaired", ""
            else:
                file["detail"] = f"not repaired: {why or detail}"
        check.judged(self._files)

    def _variant(self, build: Build) -> Variant | None:
        try:
            return self._shelf.variant(build.package, build.variant)[1]
        except GarrisonError:
            return None

    def _manifest(self, build: Build) -> FileCheck:
        ref = build.package
        path = self._shelf.folder(ref.name, ref.version) / _MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return _judged(build, _MANIFEST, 0, "missing", "the file is not there")
        except OSError as error:
            return _judged(build, _MANIFEST, 0, "damaged", f"it cannot be read: {error.strerror}")
        right = sha256_hex(data) == ref.manifest_sha256
        return _judged(
            build, _MANIFEST, len(data), "ok" if right else "damaged", "" if right else "it is not the one installed"
        )

    def _read(self, file: ModelFile, count: Callable[[int], None]) -> tuple[FileOutcome, str]:
        return _read_blob(self._shelf.blobs, file, count, self._check.cancelled)

    def _count(self, path: str, count: int) -> None:
        self._done += count
        self._check.at("reading", path, self._done, self._total)

    def _add(self, file: FileCheck) -> None:
        self._files.append(file)
        self._check.judged(self._files)


def _judged(build: Build, path: str, size: int, outcome: FileOutcome, detail: str) -> FileCheck:
    return FileCheck(
        package=build.package.id, variant=build.variant, path=path, size_bytes=size, outcome=outcome, detail=detail
    )


def _read_blob(
    blobs: BlobStore, file: ModelFile, count: Callable[[int], None], cancelled: Callable[[], bool]
) -> tuple[FileOutcome, str]:
    """Read a blob from the disk itself as far as that goes: what the kernel keeps in memory proves nothing."""
    try:
        descriptor = os.open(blobs.path(file.sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return "missing", "the file is not there"
    except OSError as error:
        return "damaged", f"it cannot be opened: {error.strerror}"
    try:
        size = os.fstat(descriptor).st_size
        if size != file.size:
            return "damaged", f"it has {size} bytes instead of {file.size}"
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        digest, at, buffer = hashlib.sha256(), 0, memoryview(bytearray(_READ_BYTES))
        while length := os.preadv(descriptor, [buffer], at):
            if cancelled():
                raise Cancelled
            digest.update(buffer[:length])
            at += length
            count(length)
    except OSError as error:
        return "damaged", f"it cannot be read: {error.strerror}"
    finally:
        os.close(descriptor)
    if digest.hexdigest() != file.sha256:
        return "damaged", "its bytes are not those that were signed"
    return "ok", ""
