"""The board that is attacked: a real owner, store, trust, and download over fake ports and an honest registry."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from garrison_agent.owner.jobs import IsCancelled, Report
from garrison_agent.owner.shelf import Shelf
from garrison_agent.registry import trust
from garrison_agent.registry.download import download_variant, verify_blob
from garrison_agent.registry.source import Source
from garrison_agent.registry.trust import Refresh
from garrison_protocol.errors import RefusedError
from garrison_protocol.manifest import Manifest, Variant
from tests.attacks import standing
from tests.fakes.board_ports import FakeClock, FakeWork
from tests.fakes.memory_source import MemorySource
from tests.fakes.packages import Package
from tests.fakes.tuf_repository import FakeRepository
from tests.unit.loop.rig import DIRECTOR, RECEIPTS, Rig

GATED = ("blobs", "models")
"""Folders below the state folder that hold what was installed."""


class RegistryWork(FakeWork):
    """The real chain of trust and real downloads from ``source``; only the gate's verdict is made up.

    The board's clock is the test's: what it says is passed on as a time that has come for certain.
    """

    def __init__(self, shelf: Shelf, repository: FakeRepository, folder: Path, clock: FakeClock) -> None:
        super().__init__(shelf, b"")
        self.repository = repository
        self.source: Source = MemorySource(repository.content)
        self._folder, self._bootstrap, self._blobs = folder, repository.bootstrap, shelf.blobs
        self._clock = clock

    def publish(self, package: Package) -> None:
        self.repository.add(package)
        self.repository.publish()

    def refresh(self, want: list[str], high_water: Mapping[str, int], floor_s: float) -> Refresh:
        return trust.refresh(
            self.source,
            self._folder,
            bootstrap=self._bootstrap,
            high_water=high_water,
            floor=self._at(floor_s),
            want=want,
        )

    def offline(self, want: list[str], high_water: Mapping[str, int], trusted_at: int, floor_s: float) -> Refresh:
        return trust.offline(
            self._folder,
            bootstrap=self._bootstrap,
            high_water=high_water,
            trusted_at=trusted_at,
            want=want,
            floor=self._at(floor_s),
        )

    def download(self, manifest: Manifest, variant: Variant, report: Report, cancelled: IsCancelled) -> None:
        download_variant(manifest, variant, self.source, self._blobs, progress=report, cancelled=cancelled)

    def verify(self, variant: Variant, cancelled: IsCancelled) -> None:
        for file in variant.files:
            if not verify_blob(file, self._blobs, cancelled=cancelled):
                raise RefusedError("download.digest_mismatch", f"{file.path} reads back differently")

    def _at(self, floor_s: float) -> datetime:
        return datetime.fromtimestamp(max(floor_s, self._clock.wall_s), UTC)


class Target(Rig):
    """A board named ``edge-1``, enrolled in ``repository``'s fleet, connected, and serving ``chat:1.0``."""

    def __init__(self, folder: Path) -> None:
        self.repository = FakeRepository()
        self.repository.director, self.repository.receipt = DIRECTOR, RECEIPTS
        self.repository.set_fleet()
        self.repository.publish()
        super().__init__(folder)

    def start(self) -> None:
        if not isinstance(self.work, RegistryWork):
            self.clock.wall_s = time.time()
            self.work = RegistryWork(self.shelf, self.repository, self.folder / "state" / "registry", self.clock)
        super().start()

    @property
    def content(self) -> dict[str, bytes]:
        """The registry's metadata as this board's controller (or whoever answers in its place) serves it."""
        return self.repository.content.metadata

    @property
    def refused(self) -> Mapping[str, int]:
        """Refused messages by code, as the board reports them."""
        return self.parts.inbound.refused

    @property
    def served(self) -> list[tuple[str, str, Path | None]]:
        """What programs on the board get: alias, model, and the worker's socket."""
        return [(route.alias, route.model_id, route.socket) for route in self.parts.routes.table.routes]

    def look(self) -> None:
        """Let the board ask for newer metadata, as it does on every notice and by its timer."""
        self.parts.trust.refresh()
        self.settle()

    def standing(self) -> tuple[object, ...]:
        """Return what an attack must not change: trust, installed files, slots, what is served."""
        state = self.folder / "state"
        # New roots are kept even where a later step fails: withholding that step must not undo a rotation.
        kept = standing.files(state, "registry/roots")
        return kept, standing.board_tables(self.database.connection), self.served

    @contextlib.contextmanager
    def refusing_metadata(self, code: str) -> Iterator[None]:
        """Assert that the next look at the registry is refused so, recorded once, and changes nothing else."""
        before, entries = self.standing(), len(self.headers("metadata.refused"))
        yield
        self.look()
        assert [entry["code"] for entry in self.headers("metadata.refused")[entries:]] == [code]
        assert self.standing() == before

    @contextlib.contextmanager
    def refusing_message(self, code: str, *, kind: str = "desired.refused") -> Iterator[None]:
        """Assert that what comes from the broker is refused so, counted, recorded, and changes nothing else."""
        self.settle()
        before, counted = self.standing(), dict(self.refused)
        yield
        self.settle()
        assert dict(self.refused) == {**counted, code: counted.get(code, 0) + 1}
        assert self.headers(kind)[-1]["code"] == code
        assert self.standing() == before

    @contextlib.contextmanager
    def refusing_package(self, code: str, *, state: str = "FAILED") -> Iterator[None]:
        """Assert that a deployment ends so, with its audit entry, while the old model serves on and no file is new.

        The refused manifest itself may be kept: the release signers signed it, and it says why the model was refused.
        """
        installed, before = self._installed(), (self.served, self.models.running)
        yield
        self.settle()
        assert (self.state, self.slot.error_code) == (state, code)
        assert any(code in header.values() for header in self.headers(f"deployment.{state.lower()}"))
        new = {name: one for name, one in self._installed().items() if installed.get(name) != one}
        assert set(new.values()) <= {self.slot.package.manifest_sha256}
        assert (self.served, self.models.running) == before

    def _installed(self) -> dict[str, str]:
        """Return the files that count as installed: not those of downloads that have not come to an end."""
        state = self.folder / "state"
        found = {f"{part}/{name}": one for part in GATED for name, one in standing.files(state / part).items()}
        return {name: one for name, one in found.items() if not name.endswith((".part", ".chunks"))}
