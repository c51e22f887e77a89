from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from garrison_controller.cli.client import ApiClient, Login, error_from, login_path, read_login
from garrison_protocol.errors import (
    DeniedError,
    GarrisonError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GARRISON_URL", "GARRISON_TOKEN", "GARRISON_CA"):
        monkeypatch.delenv(name, raising=False)


def client(answer: httpx.Response | Exception) -> ApiClient:
    def handle(_request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ApiClient(Login("https://fleet.example", "secret", None), httpx.MockTransport(handle))


def test_the_environment_overrides_the_login_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnauthenticatedError, match=r"login\.missing"):
        read_login()
    login_path().parent.mkdir(parents=True)
    login_path().write_text('url = "https://stored:1/"\ntoken = "stored"\nca = "/stored.pem"\n')
    assert read_login() == Login("https://stored:1", "stored", Path("/stored.pem"))
    monkeypatch.setenv("GARRISON_TOKEN", "other")
    assert read_login() == Login("https://stored:1", "other", Path("/stored.pem"))


def test_a_damaged_login_file_is_named() -> None:
    login_path().parent.mkdir(parents=True)
    login_path().write_text("url = ")
    with pytest.raises(InvalidError, match=r"login\.malformed"):
        read_login()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "access.token_unknown", UnauthenticatedError),
        (403, "access.denied", DeniedError),
        (403, "registry.bad_signature", RefusedError),
        (404, "device.not_found", NotFoundError),
        (422, "filter.malformed", InvalidError),
        (503, "database.busy", UnavailableError),
        (500, "internal", GarrisonError),
    ],
)
def test_the_servers_error_comes_back_as_it_was(status: int, code: str, kind: type[GarrisonError]) -> None:
    body = {"code": code, "message": "what", "hint": "do", "retryable": True, "fields": {"device": "edge-1"}}
    with pytest.raises(kind) as caught:
        client(httpx.Response(status, json=body)).get("/x")
    assert type(caught.value) is kind
    assert caught.value.to_dict() == body


def test_fields_that_would_clash_are_dropped() -> None:
    error = error_from(404, b'{"code":"a.b","message":"m","fields":{"code":"x","hint":"y","device":"d"}}')
    assert (error.code, error.fields) == ("a.b", {"device": "d"})


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"detail": "x"}', b"\xff"])
def test_an_answer_that_is_no_error_document_is_still_an_error(body: bytes) -> None:
    assert error_from(502, body).code == "http.502"


def test_a_denial_without_a_body_is_still_a_denial() -> None:
    error = error_from(403, b"")
    assert (error.exit_status, "roles" in error.message) == (7, True)


def test_a_controller_that_is_away_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"controller\.unreachable: https://fleet\.example"):
        client(httpx.ConnectError("refused")).get("/x")


def test_an_unreadable_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"login\.ca_unreadable"):
        ApiClient(Login("https://fleet.example", "x", tmp_path / "none.pem"))


def test_an_upload_continues_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(bytes(range(256)) * 10)
    seen: dict[str, object] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        seen.update(body=request.read(), place=request.headers["Content-Range"], method=request.method)
        return httpx.Response(200, json={"done": True})

    progress: list[tuple[int, int]] = []
    api = ApiClient(Login("https://fleet.example", "secret", None), httpx.MockTransport(handle))
    assert api.upload_file("/x", file, lambda done, total: progress.append((done, total)), offset=2000) == {
        "done": True
    }
    assert seen == {"body": file.read_bytes()[2000:], "place": "bytes 2000-2559/2560", "method": "PUT"}
    assert progress == [(2560, 2560)]


@pytest.mark.parametrize("url", ["http://plain", "fleet.example", "https://", "https://[bad", "https://a:port"])
def test_an_address_that_cannot_be_called_is_named(url: str) -> None:
    with pytest.raises(InvalidError, match=r"login\.url_malformed"):
        ApiClient(Login(url, "x", None))


@pytest.mark.parametrize("token", ["a\nb", "\u00e9"])
def test_a_token_that_cannot_be_sent_is_not_sent(token: str) -> None:
    with pytest.raises(InvalidError, match=r"login\.token_malformed"):
        ApiClient(Login("https://fleet.example", token, None))
