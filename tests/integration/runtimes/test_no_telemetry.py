"""No worker talks to the network: watched from outside, beside a process in which the watching must find something.

Recent wheels of onnxruntime open connections about ten seconds after their import, and write a database and a device
id below the home folder before that, unless ``ORT_DISABLE_TELEMETRY=1`` was set first. They are silent as well where
they believe to be in somebody's automatic tests, so what tells them of these is taken away here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runtimes.workers import WatchedWorker, llama_spec, magika_model, onnx_spec, smollm2

pytestmark = pytest.mark.integration

WATCH_S = 13.0
"""Longer than onnxruntime waits before it looks up its collector's address."""
TALKATIVE = """
import pathlib, socket
(pathlib.Path.home() / "written").write_text("something")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talk:
    talk.connect(("127.0.0.1", 9))
    print("ready", flush=True)
    input()
"""
SIGNS_OF_TESTS = (
    "CI",
    "TF_BUILD",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "CIRCLECI",
    "TRAVIS",
    "JENKINS_URL",
    "CODEBUILD_BUILD_ID",
    "BUILDKITE",
    "TEAMCITY_VERSION",
    "APPVEYOR",
    "BITBUCKET_BUILD_NUMBER",
)
"""Environment variables at which onnxruntime 1.32 sends nothing; as found in its library."""
INFER = "/v2/models/magika/infer"
BODY = {"inputs": [{"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": [0] * 2048}]}


@dataclass
class Watch:
    """What a process was seen to do; sampled until ``stop``."""

    pid: int
    home: Path
    sockets: set[str] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)
    samples: int = 0

    def run(self) -> None:
        while not self.stop.wait(0.01):
            self.sockets |= internet_sockets(self.pid)
            self.samples += 1

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.home.rglob("*") if path.is_file()}


def internet_sockets(pid: int) -> set[str]:
    """Return the TCP and UDP sockets that a process holds, as the kernel lists them; only its own count."""
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue  # closed meanwhile
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            held.add(match[1])
    found = set()
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{protocol}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[9] in held:
                found.add(f"{protocol} to {fields[2]}")
    return found


@pytest.fixture
def talkative(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that writes a file below its home and holds a socket."""
    home = tmp_path / "talkative"
    home.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", TALKATIVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"HOME": str(home)},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid, home
        child.kill()


def test_no_worker_opens_a_connection_or_leaves_a_file(
    talkative: tuple[int, Path], tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "worker"
    home.mkdir()
    for name in SIGNS_OF_TESTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    tensors = WatchedWorker(onnx_spec(magika_model(), short_folder / "quiet.sock"))
    text = WatchedWorker(llama_spec(smollm2(), short_folder / "quiet2.sock", context_length=256))
    with tensors, text:
        tensors.ready()
        text.ready()
        assert tensors.worker.pid is not None
        assert text.worker.pid is not None
        quiet = [Watch(tensors.worker.pid, home), Watch(text.worker.pid, home)]
        control = Watch(*talkative)
        watches = [*quiet, control]
        threads = [threading.Thread(target=watch.run) for watch in watches]
        for thread in threads:
            thread.start()
        used_for(WATCH_S, tensors, text)
        for watch in watches:
            watch.stop.set()
        for thread in threads:
            thread.join()
    assert [(watch.sockets, watch.files) for watch in quiet] == [(set(), set()), (set(), set())]
    assert all(watch.samples > 100 for watch in watches)
    assert (control.sockets, control.files) == ({"udp to 0100007F:0009"}, {"written"}), "the watching is blind"


def used_for(seconds: float, tensors: WatchedWorker, text: WatchedWorker) -> None:
    """Keep both at work, a little at a time."""
    ask: dict[str, Any] = {"prompt": "Hello", "max_tokens": 1}
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        tensors.post(INFER, BODY)
        text.post("/v1/completions", ask)
        pause.wait(0.1)
