"""The blocking work of jobs on the real registry, disk, and workers. Every method runs in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from garrison_agent.owner.jobs import IsCancelled, Report
from garrison_agent.owner.shelf import Shelf
from garrison_agent.registry.bundle_source import Plugged, PluggedSource, PluggedVerifier
from garrison_agent.registry.download import download_variant, repair_blob, repair_variant, verify_blob
from garrison_agent.registry.source import Source
from garrison_agent.registry.trust import Refresh
from garrison_agent.registry.verifier import Verifier
from garrison_agent.runtimes.gate import read_health, run_gate
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import GarrisonError, RefusedError
from garrison_protocol.manifest import (
    MAX_MANIFEST_BYTES,
    Evaluation,
    Manifest,
    ModelFile,
    PackageRef,
    Variant,
    target_path,
)
from garrison_protocol.messages.desired import GateLimits
from garrison_protocol.messages.report import EvaluationSummary


class BoardWork:
    """See ``owner.jobs.Work``."""

    def __init__(
        self,
        verifier: Verifier,
        source: Source,
        shelf: Shelf,
        plugged: Plugged,
        blamed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """While a bundle is ``plugged``, both take what it has from there.

        ``blamed`` makes the refusal of bytes whose sender nobody knows a reason to wait.
        """
        self._verifier = PluggedVerifier(plugged, verifier)
        self._source = PluggedSource(plugged, source)
        self._shelf = shelf
        self._plugged = plugged
        self._blamed = blamed

    def refresh(self, want: list[str], high_water: dict[str, int], floor_s: float) -> Refresh:
        """As ``registry.trust.refresh``, in a process of its own."""
        return self._verifier.refresh(high_water, datetime.fromtimestamp(floor_s, UTC), want)

    def offline(self, want: list[str], high_water: dict[str, int], trusted_at: int, floor_s: float) -> Refresh:
        """As ``registry.trust.offline``, in a process of its own."""
        return self._verifier.offline(high_water, trusted_at, want, datetime.fromtimestamp(floor_s, UTC))

    def download(self, manifest: Manifest, variant: Variant, report: Report, cancelled: IsCancelled) -> None:
        """As ``registry.download.download_variant``."""
        with self._plugged.blamed(), self._blamed():
            download_variant(manifest, variant, self._source, self._shelf.blobs, progress=report, cancelled=cancelled)

    def verify(self, variant: Variant, cancelled: IsCancelled) -> None:
        """Read every file back. One that rotted on this disk since an earlier download is repaired.

        Raises:
            RefusedError: ``download.digest_mismatch``; the disk does not give back what was written.
            GarrisonError: as ``registry.download.repair_blob``.
        """
        for file in variant.files:
            if not self._whole(file, cancelled):
                repair_blob(
                    file, self._source, self._shelf.blobs, progress=lambda _done, _total: None, cancelled=cancelled
                )
                if not self._whole(file, cancelled):
                    raise RefusedError(
                        "download.digest_mismatch",
                        f"{file.path} reads back differently from what was written",
                        hint="check the disk's health",
                        sha256=file.sha256,
                    )

    def evaluate(
        self,
        socket: Path,
        model_id: str,
        evaluation: Evaluation,
        limits: GateLimits,
        *,
        rss_mb: float | None,
        cancelled: IsCancelled,
    ) -> tuple[EvaluationSummary | None, str | None, str | None]:
        """As ``runtimes.gate.run_gate``."""
        result = run_gate(socket, model_id, evaluation, limits, rss_mb=rss_mb, cancelled=cancelled)
        return result.summary, result.failure_code, result.message

    def health(self, socket: Path, timeout_s: float) -> Mapping[str, object] | None:
        """As ``runtimes.gate.read_health``."""
        return read_health(socket, timeout_s)

    def repair(self, package: PackageRef, variant: str, report: Report, cancelled: IsCancelled) -> int:
        """Fetch the manifest again if it is damaged, then whatever chunks are; return how many were."""
        try:
            manifest, build = self._shelf.variant(package, variant)
        except GarrisonError:
            data = self._source.target(
                target_path(package.name, package.version), package.manifest_sha256, MAX_MANIFEST_BYTES
            )
            if sha256_hex(data) != package.manifest_sha256:
                raise RefusedError(
                    "registry.damaged", f"the controller's manifest of {package.id} is not the one that was installed"
                ) from None
            self._shelf.keep(package, data)
            manifest, build = self._shelf.variant(package, variant)
        repaired = repair_variant(
            manifest, build, self._source, self._shelf.blobs, progress=report, cancelled=cancelled
        )
        return repaired.bad_chunks

    def _whole(self, file: ModelFile, cancelled: IsCancelled) -> bool:
        blobs = self._shelf.blobs
        return blobs.has(file.sha256, file.size) and verify_blob(file, blobs, cancelled=cancelled)
