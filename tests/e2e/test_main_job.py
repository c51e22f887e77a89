"""The main job, as `make demo` runs it, over both versions of MQTT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from demo.fleet import ROOT

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mqtt", ["5", "3.1.1"])
def test_all_eleven_steps_hold(tmp_path: Path, mqtt: str) -> None:
    command = [sys.executable, "-m", "demo", "--mqtt", mqtt, "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(" ok ") == 11
