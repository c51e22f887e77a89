"""A real process is killed in the middle of a real download, several times; nothing verified is fetched twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from garrison_agent.registry.download import download_variant
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_protocol.manifest import CHUNK_SIZE
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import make_package, noise
from tests.fakes.registry_server import serve

CHUNK = CHUNK_SIZE
DATA = noise(CHUNK * 40 + 17)
PACKAGE = make_package(files={"model.gguf": DATA})
FILE = PACKAGE.variant.files[0]
BLOB_PATH = f"/device/v1/blobs/{FILE.sha256}"


def test_sigkill_at_many_points(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(PACKAGE.manifest_bytes)
    blobs = BlobStore(tmp_path / "blobs")
    with serve(RegistryContent(blobs=PACKAGE.blobs), tmp_path / "server") as server:
        verified = 0
        for step in (1, CHUNK - 1, CHUNK * 3, CHUNK * 7 + 5, CHUNK * 11):
            server.holding.clear()
            server.hold = (FILE.sha256, step)  # the rest of this answer never comes
            command = [sys.executable, "-m", "tests.unit.agent_registry.downloading_process"]
            command += [server.url, str(server.ca_path), str(blobs.root), str(manifest)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                target = verified + step // CHUNK * CHUNK
                for line in child.stdout:
                    if int(line) >= target:
                        break
                else:
                    pytest.fail("the download ended before it was killed")
                assert server.holding.wait(30)
                child.kill()
                child.stdout.read()
            assert blobs.list() == ()
            verified = target
        server.hold = None
        steps: list[int] = []
        download_variant(
            PACKAGE.manifest,
            PACKAGE.variant,
            HttpSource(HttpsOpener(server.url, server.ca_path)),
            blobs,
            progress=lambda done, _: steps.append(done),
            cancelled=lambda: False,
        )
        starts = [
            int((wanted or "").removeprefix("bytes=").removesuffix("-"))
            for path, wanted in server.requests
            if path == BLOB_PATH
        ]
        lists = [path for path, _ in server.requests if path != BLOB_PATH]
    assert starts == [0, 0, 0, CHUNK * 3, CHUNK * 10, CHUNK * 21]
    assert steps[0] == verified == CHUNK * 21
    assert lists == [f"/device/v1/blobs/{FILE.chunks_sha256}"]
    assert blobs.path(FILE.sha256).read_bytes() == DATA
