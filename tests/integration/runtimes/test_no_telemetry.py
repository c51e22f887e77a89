"""No worker talks to the network: watched from outside, beside a process in which the watching must find something.

Recent wheels of onnxruntime open connections about ten seconds after their import, and write a database and a device
id below the home folder before that, unless ``ORT_DISABLE_TELEMETRY=1`` was set first.
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
TALKATIVE = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1]); print('ready', flush=True); input()"
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
    """A process that imports onnxruntime as it comes."""
    home = tmp_path / "talkative"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    child = subprocess.Popen(
        [sys.executable, "-c", TALKATIVE, str(magika_model())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield child.pid, home
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()


def test_no_worker_opens_a_connection_or_leaves_a_file(
    talkative: tuple[int, Path], tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "worker"
    home.mkdir()
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
    assert "deviceid" in control.files, "the watching is blind"


def used_for(seconds: float, tensors: WatchedWorker, text: WatchedWorker) -> None:
    """Keep both at work, a little at a time."""
    ask: dict[str, Any] = {"prompt": "Hello", "max_tokens": 1}
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        tensors.post(INFER, BODY)
        text.post("/v1/completions", ask)
        pause.wait(0.1)


def test_the_watching_sees_a_connection(tmp_path: Path) -> None:
    """The part of it that a machine without a network may not get to see above."""
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('127.0.0.1', 9)); input(1)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"1"
        assert internet_sockets(child.pid) == {"udp to 0100007F:0009"}
        child.kill()
