from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from garrison_agent import https
from garrison_agent.adapters import device_http
from garrison_agent.adapters.device_http import MAX_ERROR_CHARS, DeviceHttp, refusal
from garrison_agent.adapters.enrolment import enrol
from garrison_protocol.errors import ConflictError, InvalidError, RefusedError, UnavailableError
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki
from tests.fakes.ticks import Ticks

BLOB = "/device/v1/blobs/abc"


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[DeviceApi]:
    with DeviceApi(FleetPki(tmp_path / "pki")) as api:
        api.blobs["abc"] = b"x" * 300_000
        yield api


@pytest.fixture
def http(api: DeviceApi, tmp_path: Path) -> DeviceHttp:
    identity = enrol(tmp_path / "state", api.line(), judge_at=now)
    return DeviceHttp(identity, lambda: identity.server_context(now))


def fetch(http: DeviceHttp, path: str = BLOB) -> tuple[int, bytes]:
    with http.open(path, {}) as response:
        data = b""
        while piece := response.read(65536):
            data += piece
        return response.status, data


def test_one_session_serves_many_requests(api: DeviceApi, http: DeviceHttp) -> None:
    assert fetch(http) == (200, api.blobs["abc"])
    assert fetch(http) == (200, api.blobs["abc"])
    assert sum("session" in line for line in api.requests) == 1


def test_an_answer_that_is_too_slow_is_none(http: DeviceHttp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_http, "send", functools.partial(https.send, now_s=Ticks(40)))
    with pytest.raises(UnavailableError, match="fewer than 15360 bytes") as caught:
        fetch(http)
    assert caught.value.code == "controller.unreachable"


def test_a_session_that_ended_is_renewed(api: DeviceApi, http: DeviceHttp) -> None:
    fetch(http)
    api.sessions.clear()
    assert fetch(http)[0] == 200
    assert sum("session" in line for line in api.requests) == 2


def test_public_files_need_no_session(api: DeviceApi, http: DeviceHttp) -> None:
    assert fetch(http, "/device/v1/metadata/1.root.json") == (200, api.root)
    assert fetch(http, "/device/v1/metadata/9.root.json")[0] == 404
    assert not any("session" in line for line in api.requests)


def test_a_board_that_the_controller_does_not_know_hears_why(api: DeviceApi, http: DeviceHttp) -> None:
    api.identities["edge-1"] = "0" * 64
    with pytest.raises(RefusedError, match=r"device\.bad_proof"):
        fetch(http)


def test_threads_share_one_session(api: DeviceApi, http: DeviceHttp) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(http)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [200] * 8
    assert sum("session" in line for line in api.requests) == 1


def test_a_controller_that_is_gone(api: DeviceApi, http: DeviceHttp) -> None:
    fetch(http)
    api.close()
    with pytest.raises(UnavailableError, match=r"controller\.unreachable"):
        fetch(http)


def test_answers_without_our_json_still_become_errors_by_their_status() -> None:
    assert isinstance(refusal(409, b"<html>", "/x"), ConflictError)
    assert isinstance(refusal(418, b"[]", "/x"), InvalidError)
    unavailable = refusal(502, b"bad gateway", "/x")
    assert isinstance(unavailable, UnavailableError)
    assert unavailable.retryable
    assert unavailable.code == "controller.refused"


def test_what_a_controller_writes_fits_into_an_audit_entry() -> None:
    error = refusal(403, b'{"code": "x.\\ud800", "message": "%s\\ud800"}' % (b"a" * 400_000), "/x")
    assert (error.code, len(error.message)) == ("x.?", MAX_ERROR_CHARS)
    error = refusal(403, b'{"code": "x.y", "message": "\\ud800"}', "/x")
    assert error.message == "?"
