"""A real process is killed before every operation on the disk that a renewal makes; the pair always fits."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from garrison_agent.adapters.enrolment import enrol
from garrison_agent.adapters.renewal import HttpCarrier, Renewal
from garrison_agent.identity import Identity, tidy
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki


def now() -> datetime:
    return datetime.now(UTC)


def renew(state: Path, last: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.unit.adapters.renewing_process", str(state), str(last)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_killed_at_every_point_a_pair_that_fits_is_there(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with DeviceApi(FleetPki(tmp_path / "pki")) as api:
        identity = enrol(state, api.line(), judge_at=now)
        renewal = Renewal(identity, [HttpCarrier(identity.url, lambda: identity.server_context(now))], str)
        swapped: list[bool] = []
        for last in range(1, 100):
            before = renewal.read()
            assert before is not None
            api.broker = ("127.0.0.1", 9000 + last)  # so that device.json is written too
            child = renew(state, last)
            after = renewal.read()
            assert after is not None, f"no pair that fits after a kill before operation {last}"
            Identity.load(state)
            identity.mqtt_context(now)
            assert identity.broker()[1] in (9000 + last, 9000 + last - 1, 8883)
            if after != before:
                assert identity.broker()[1] == 9000 + last  # never a new pair with the old address
            if child.returncode == 0:
                assert int(child.stdout) == last - 1
                break
            assert child.returncode == -signal.SIGKILL, child.stderr
            swapped.append(after != before)
        assert len(swapped) > 8
        assert True in swapped  # killed after the swap ...
        assert False in swapped  # ... and before it
        renewal.renew()
    tidy(state)
    assert {path.name for path in identity.folders.identity.iterdir()} == {"identity.key", "tls.pem", "device.json"}
