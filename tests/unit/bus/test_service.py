from __future__ import annotations

import ssl
import threading

import pytest

from garrison_controller.bus import service
from garrison_controller.bus.service import Bus
from tests.unit.rollouts.fleet import Fleet


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_failure_ends_the_bus_in_silence(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RETRY_S", 0.0)
    bus = Bus(
        fleet.database,
        host="127.0.0.1",
        port=1,
        identity="controller-1",
        tls=ssl.create_default_context(),
        protocol="5",
        keepalive_s=60,
        director=fleet.director,
        receipt_key=fleet.receipt_key,
        now=fleet.clock,
    )
    went_on = threading.Event()
    faults = iter((ValueError("a bug"), RuntimeError("another")))

    def publish() -> None:
        for fault in faults:
            raise fault
        went_on.set()

    monkeypatch.setattr(bus, "_publish_desired", publish)
    monkeypatch.setattr(bus._link, "start", lambda: None)
    bus.start()
    bus.desired_changed()
    assert went_on.wait(10)
    bus.stop()
