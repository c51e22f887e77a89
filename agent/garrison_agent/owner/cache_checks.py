"""Checks of the installed files that somebody asked for: one at a time, in a thread, and a record of what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from garrison_agent.api.commands import unknown_model
from garrison_agent.events import CacheChecked, Post
from garrison_agent.outbox.journal import Journal
from garrison_agent.owner.deployments import Deployments
from garrison_agent.owner.jobs import Jobs, Work
from garrison_agent.owner.shelf import Shelf
from garrison_protocol.errors import ConflictError
from garrison_protocol.manifest import PackageRef
from garrison_protocol.states import Stream

if TYPE_CHECKING:  # an idle board does without
    from garrison_agent.api.cache_check import CacheCheck


class CacheChecks:
    """Owner thread only."""

    def __init__(
        self, *, shelf: Shelf, deployments: Deployments, journal: Journal, jobs: Jobs, work: Work, post: Post
    ) -> None:
        self._shelf = shelf
        self._deployments = deployments
        self._journal = journal
        self._jobs = jobs
        self._work = work
        self._post = post
        self._current: CacheCheck | None = None

    def begin(self, name: str | None, *, repair: bool) -> CacheCheck:
        """Begin to read the files of the package called ``name``, or of all.

        Raises:
            NotFoundError: ``model.unknown``.
            ConflictError: ``cache.check_busy``.
        """
        from garrison_agent.api.cache_check import CacheCheck
        from garrison_agent.owner.cache_reading import Build, read_builds

        if self._current is not None and not self._current.over:
            raise ConflictError(
                "cache.check_busy",
                "the installed files are being checked already",
                hint="wait until that has ended",
                retryable=True,
            )
        names = self._builds()
        builds = [Build(ref, variant) for (ref, variant), known in names.items() if name is None or name in known]
        if name is not None and not builds:
            raise unknown_model(name, [one for known in names.values() for one in known])
        self._journal.append(Stream.AUDIT, "api.check_cache", {"model": name or "", "repair": repair})
        check = self._current = CacheCheck()  # behind the record: without that it would never begin, nor end
        shelf, work, post = self._shelf, self._work, self._post

        def job() -> None:
            read_builds(check, builds, shelf, work if repair else None)
            post(CacheChecked(tuple(check.view["files"])))

        self._jobs.apart(job)
        return check

    def finished(self, event: CacheChecked) -> None:
        """Record what was found."""
        found = dict.fromkeys(("ok", "damaged", "missing", "repaired"), 0)
        for file in event.files:
            found[file["outcome"]] += 1
        wrong = sorted({file["package"] for file in event.files if file["outcome"] != "ok"})
        self._journal.append(Stream.AUDIT, "cache.checked", {**found, "models": ",".join(wrong)[:1000]})

    def stop(self) -> None:
        """Let what is under way end."""
        if self._current is not None:
            self._current.cancel()

    def _builds(self) -> dict[tuple[PackageRef, str], set[str]]:
        """Return the builds that should be whole on the disk, each with the names it answers to."""
        names: dict[tuple[PackageRef, str], set[str]] = {}
        loading: set[tuple[PackageRef, str]] = set()
        for slot in self._deployments.slots.values():
            kept = {(one.package, one.variant) for one in (slot.serving, slot.previous) if one is not None}
            loading |= set(slot.uses()) - kept
            for ref, variant in kept:
                names.setdefault((ref, variant), set()).update((slot.alias, ref.id, ref.name))
        known = {ref.id: ref for ref, _ in names}
        for package in self._shelf.packages():
            if known.get(package.ref.id, package.ref) != package.ref:
                continue  # its manifest is not the one that was installed, which is what the check will say
            manifest = package.manifest
            for build in manifest.variants:
                here = any(self._shelf.blobs.path(file.sha256).exists() for file in build.files)
                if here and ((package.ref, build.name) not in loading or build in package.variants):
                    names.setdefault((package.ref, build.name), set()).update(
                        (manifest.alias, package.ref.id, package.ref.name)
                    )
        return names
