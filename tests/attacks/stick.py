"""A board that only a stick reaches, and sticks as an honest controller would write them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path

from garrison_agent.api.carrier import Carrier, ImportResult, parse_failure
from garrison_agent.api.commands import BeginImport
from garrison_agent.events import Asked
from garrison_agent.owner.jobs import IsCancelled, Report
from garrison_agent.owner.work import BoardWork
from garrison_agent.registry import trust
from garrison_agent.registry.bundle_source import Plugged
from garrison_agent.registry.source import MetadataSource
from garrison_agent.registry.trust import Refresh
from garrison_protocol import bundle
from garrison_protocol.bundle import Kind
from garrison_protocol.errors import GarrisonError
from garrison_protocol.manifest import Manifest, Variant
from garrison_protocol.stick import Stick
from tests.attacks.target import RegistryWork, Target
from tests.fakes.memory_source import MemorySource
from tests.unit.loop.rig import DEVICE


class StickWork(RegistryWork):
    """The agent's own work, which looks onto a plugged stick first; metadata is verified in this process."""

    def plug(self, plugged: Plugged) -> None:
        self._work = BoardWork(_Verifier(self), self.source, self._shelf, plugged, contextlib.nullcontext)

    def refresh(self, want: list[str], high_water: Mapping[str, int], floor_s: float) -> Refresh:
        return self._work.refresh(want, dict(high_water), floor_s)

    def refresh_from(
        self, source: MetadataSource, want: Sequence[str], high_water: Mapping[str, int], floor: datetime
    ) -> Refresh:
        return trust.refresh(
            source, self._folder, bootstrap=self._bootstrap, high_water=high_water, floor=floor, want=want
        )

    def download(self, manifest: Manifest, variant: Variant, report: Report, cancelled: IsCancelled) -> None:
        self._work.download(manifest, variant, report, cancelled)

    def at(self, floor: datetime) -> datetime:
        return self._at(floor.timestamp())


class _Verifier:
    """See ``registry.verifier.Verifier``; the board's clock is the test's."""

    def __init__(self, work: StickWork) -> None:
        self._work = work

    def refresh(
        self,
        high_water: Mapping[str, int],
        floor: datetime,
        want: Sequence[str],
        source: MetadataSource | None = None,
    ) -> Refresh:
        return self._work.refresh_from(source or self._work.source, want, high_water, self._work.at(floor))

    def offline(
        self, high_water: Mapping[str, int], trusted_at: int, want: Sequence[str], floor: datetime | None = None
    ) -> Refresh:
        at_s = 0.0 if floor is None else floor.timestamp()
        return self._work.offline(list(want), high_water, trusted_at, at_s)


class StickBoard(Target):
    """``edge-1``, serving ``chat:1.0``; ``cut_off`` takes controller and broker away."""

    def start(self) -> None:
        if not isinstance(self.work, StickWork):
            self.clock.wall_s = datetime.now(UTC).timestamp()
            self.work = StickWork(self.shelf, self.repository, self.folder / "state" / "registry", self.clock)
        self.work.plug(self.plugged)
        super().start()

    def cut_off(self) -> None:
        assert isinstance(self.work, StickWork)
        self.disconnect()
        self.controller_silent = True
        assert isinstance(self.work.source, MemorySource)
        self.work.source.unreachable = True

    def carry(self, folder: Path) -> ImportResult | GarrisonError:
        """Let the board import what lies in ``folder``, and return what came of it."""
        answer: Future[object] = Future()
        self.inbox.put(Asked(BeginImport(), answer))
        while not answer.done():
            assert self.step()
        carrier = answer.result()
        assert isinstance(carrier, Carrier)
        reader = threading.Thread(target=read_for, args=(carrier, folder))
        reader.start()
        try:
            self.settle()
            assert carrier.result is not None, "the import never ended"
        finally:
            carrier.end(GarrisonError("test.failed", "the test ended first"))
            reader.join()
        return carrier.result

    def import_bundle(self, folder: Path) -> dict[str, tuple[str, str | None]]:
        """Import, and return outcome and code of each part of the bundle."""
        result = self.carry(folder)
        assert not isinstance(result, GarrisonError), result
        return {item["what"]: (item["outcome"], item["code"]) for item in result["items"]}


def read_for(carrier: Carrier, folder: Path) -> None:
    """Do what ``garrison-agent import`` does: read what the agent asks for, until it has had enough."""
    wake = threading.Event()
    with Stick(folder) as stick:
        while carrier.result is None:
            carrier.listen(wake.set)
            wake.wait(10)
            wake.clear()
            while (wanted := carrier.take()) is not None:
                try:
                    carrier.answer(wanted.number, stick.read_piece(wanted.path, wanted.offset, wanted.length))
                except GarrisonError as error:
                    body = json.dumps({"code": error.code, "message": error.message}).encode()
                    carrier.answer(wanted.number, parse_failure(body))
        carrier.listen(None)


def write_bundle(
    folder: Path, board: Target, files: Mapping[Kind, bytes] | None = None, *, without_blobs: bool = False
) -> Path:
    """Write what the board's registry holds now, and ``files`` for the board."""
    folder.mkdir(parents=True, exist_ok=True)
    content = board.repository.content
    with Stick(folder) as stick:
        for name, data in content.metadata.items():
            stick.write(bundle.metadata_path(name), [data], durable=False)
        for (sha256, path), data in content.targets.items():
            stick.write(bundle.target_path(path, sha256), [data], durable=False)
        for sha256, data in {} if without_blobs else content.blobs.items():
            stick.write(bundle.blob_path(sha256), [data], durable=False)
        for kind, data in (files or {}).items():
            stick.write(bundle.device_path(DEVICE, kind), [data], durable=False)
        head = bundle.Head(fleet="demo", created=1, valid_until=2, devices=(DEVICE,))
        stick.write(bundle.HEAD, [head.model_dump_json().encode()], durable=False)
    return folder
