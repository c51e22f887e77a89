"""The registry end to end: the ceremony through the commands, uploads, and what boards fetch, over real TLS."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from garrison_controller.access import queries as access_queries
from garrison_controller.cli.client import ApiClient
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import DeniedError, GarrisonError, UnauthenticatedError
from garrison_protocol.messages.enrolment import parse_enrolment
from tests.integration.releases import Release, published_release
from tests.unit.devices.boards import Board

pytestmark = pytest.mark.integration

MODEL = bytes(range(256)) * 4096 * 3
"""3 MiB: several pieces of every buffer on the way."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """Keys of all signers, and a published registry without models."""
    with published_release(tmp_path_factory.mktemp("release")) as release:
        yield release


@pytest.fixture(scope="module")
def published(release: Release) -> str:
    """The folder of a published model, ``tiny:1.0.0``."""
    package = release.pack("tiny", "1.0.0", MODEL)
    release.run("model", "add", package, "--workspace", release.workspace)
    release.sign("dan")
    release.sign("erin")
    answer = release.run("model", "publish", package, "--workspace", release.workspace)
    assert answer["packages"] == ["tiny:1.0.0"]
    return package


@pytest.fixture(scope="module")
def board(release: Release, published: str) -> Iterator[httpx.Client]:
    """What an enrolled board calls with."""
    with release.served.principal("dora", "device-admin") as dora:
        answer = dora.post("/api/v1/enrolment/tokens", {"name": "edge-1", "group": "/demo/"})
    enrolment, board = parse_enrolment(answer["enrolment"]), Board()
    with release.served.board_http() as http:
        http.post("/device/v1/enroll", json=board.enrol_request(enrolment.token).model_dump()).raise_for_status()
        request = board.session_request("edge-1", http.get("/device/v1/nonce").json()["nonce"])
        bearer = http.post("/device/v1/session", json=request.model_dump()).json()["token"]
    with release.served.board_http(bearer) as http:
        yield http


class HttpFetcher(FetcherInterface):
    """python-tuf's transport over the boards' endpoints; nothing else of it is changed."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def _fetch(self, url: str) -> Iterator[bytes]:
        answer = self._http.get(httpx.URL(url).path)
        if answer.status_code != 200:
            raise DownloadHTTPError(url, answer.status_code)
        return iter([answer.content])


def publisher(release: Release) -> ApiClient:
    token = release.served.admin.post("/api/v1/access/tokens", {"principal": "paula"})["token"]
    return release.served.client(token)


def test_boards_verify_what_the_ceremony_published(release: Release, published: str, tmp_path: Path) -> None:
    with release.served.board_http() as http:
        first = http.get("/device/v1/metadata/1.root.json").content
        url = "https://controller/device/v1/metadata/"
        updater = Updater(str(tmp_path), url, None, None, HttpFetcher(http), bootstrap=first)
        target = updater.get_targetinfo("models/tiny/1.0.0/manifest.json")
        assert target is not None
        manifest = http.get(f"/device/v1/targets/{target.hashes['sha256']}/{target.path}").content
    assert sha256_hex(manifest) == target.hashes["sha256"]
    assert manifest == (Path(published) / "manifest.json").read_bytes()
    status = release.run("registry", "status", "--workspace", release.workspace)
    assert status["first_root_sha256"] == sha256_hex(first) == release.run("registry", "status")["first_root_sha256"]


def test_model_files_come_whole_and_in_parts(board: httpx.Client) -> None:
    path = f"/device/v1/blobs/{sha256_hex(MODEL)}"
    head, whole = board.head(path), board.get(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(MODEL)), b"")
    assert (whole.status_code, whole.content) == (200, MODEL)
    assert whole.headers["etag"] == f'"{sha256_hex(MODEL)}"'
    assert "immutable" in whole.headers["cache-control"]
    middle = board.get(path, headers={"Range": f"bytes=1000000-{2**21 - 1}"})
    assert (middle.status_code, middle.content) == (206, MODEL[1000000 : 2**21])
    assert middle.headers["content-range"] == f"bytes 1000000-{2**21 - 1}/{len(MODEL)}"
    rest = board.get(path, headers={"Range": "bytes=3000000-"})
    assert rest.content == MODEL[3000000:]
    assert board.get(path, headers={"Range": f"bytes={len(MODEL)}-"}).status_code == 416
    missing = board.get(f"/device/v1/blobs/{'0' * 64}")
    assert (missing.status_code, missing.json()["code"]) == (404, "blob.not_found")
    assert board.get("/device/v1/blobs/nonsense").json()["code"] == "blob.name_malformed"


def test_only_the_timestamp_may_change_in_caches(release: Release, published: str) -> None:
    with release.served.board_http() as http:
        assert http.get("/device/v1/metadata/timestamp.json").headers["cache-control"] == "no-cache"
        assert "immutable" in http.get("/device/v1/metadata/1.root.json").headers["cache-control"]
        absent = http.get("/device/v1/metadata/2.root.json")
        assert (absent.status_code, absent.json()["code"]) == (404, "registry.metadata_not_found")
        assert http.get("/device/v1/metadata/..%2f..%2fcontroller.db").status_code == 404
        assert http.get(f"/device/v1/targets/{'0' * 64}/..%2f..%2fcontroller.db").status_code == 404


def test_a_published_model_is_listed_with_its_publisher(release: Release, published: str) -> None:
    (listed,) = [one for one in release.run("model", "list")["models"] if one["name"] == "tiny"]
    assert (listed["id"], listed["published_by"], listed["below_floor"]) == ("tiny:1.0.0", "paula", False)
    shown = release.run("model", "show", "tiny")
    assert shown["manifest"]["variants"][0]["files"][0]["sha256"] == sha256_hex(MODEL)
    assert release.fails("model", "show", "tiny:9").code == "model.not_found"
    assert release.fails("model", "show", "unknown").code == "model.not_found"
    assert "tiny:1.0.0" in release.text("model", "list")[0]
    root_line = release.text("registry", "status")[0].splitlines()[1]
    assert root_line.split()[:2] == ["root", "1"]
    assert root_line.rstrip().endswith("2 of 3")


def test_a_signer_sees_what_is_signed_and_may_decline(release: Release, published: str) -> None:
    package = release.pack("shown", "1.0.0", b"weights")
    release.run("model", "add", package, "--workspace", release.workspace)
    words = ("registry", "sign", "--workspace", release.workspace, "--key", release.key("dan"))

    declined = release.fails(*words, stdin="n\n")
    assert declined.code == "signing.not_confirmed"
    output, review = release.text(*words, stdin="y\n")
    for fact in ("model shown:1.0.0", "Apache-2.0", sha256_hex(b"weights"), "0 of 2 needed", "Sign this?"):
        assert fact in review
    assert "signed targets version" in output
    assert "was signed before" in release.text(*words, "--yes")[0]

    half_signed = release.fails("model", "publish", package, "--workspace", release.workspace)
    assert (half_signed.code, half_signed.exit_status) == ("registry.threshold_unmet", 6)
    release.sign("erin")
    assert release.run("model", "publish", package, "--workspace", release.workspace)["packages"] == ["shown:1.0.0"]


def test_a_wrong_passphrase_signs_nothing(release: Release, published: str, tmp_path: Path) -> None:
    release.run("model", "add", release.pack("secret", "1.0.0", b"x"), "--workspace", release.workspace)
    wrong = tmp_path / "passphrase"
    wrong.write_text("not the passphrase\n")
    words = ("registry", "sign", "--workspace", release.workspace, "--key", release.key("dan"), "--yes")

    error = release.fails(*words, "--passphrase-file", str(wrong))
    assert (error.code, error.exit_status) == ("signing.wrong_passphrase", 6)
    status = release.run("registry", "status", "--workspace", release.workspace)
    assert list(status["pending"][0]["progress"][0]["signed"]) == []


def test_an_interrupted_upload_continues_where_it_stopped(release: Release, tmp_path: Path) -> None:
    data = b"0123456789" * 100_000
    file, name = tmp_path / "blob", sha256_hex(data)
    file.write_bytes(data)
    path = f"/api/v1/registry/blobs/{name}"
    with publisher(release) as client:
        assert client.head(path) is None
        part = {"Content-Range": f"bytes 0-399999/{len(data)}"}
        assert client.request("PUT", path, content=data[:400_000], headers=part)["complete"] is False
        known = client.head(path)
        assert known is not None
        assert (known["x-offset"], known["x-complete"]) == ("400000", "false")
        sent: list[int] = []
        answer = client.upload_file(path, file, lambda done, _: sent.append(done), offset=400_000)
        assert answer == {"sha256": name, "offset": len(data), "complete": True}
        assert sent[-1] == len(data)
        assert (client.head(path) or {})["x-complete"] == "true"
        assert client.upload_file(path, file)["complete"] is True
    assert release.served.controller.registry.blobs.path(name).read_bytes() == data


def test_a_tampered_upload_is_refused_and_recorded(release: Release) -> None:
    name = sha256_hex(b"honest bytes")
    with publisher(release) as client:
        with pytest.raises(GarrisonError) as caught:
            client.request("PUT", f"/api/v1/registry/blobs/{name}", content=b"tampered one")
        assert (caught.value.code, caught.value.exit_status) == ("blob.digest_mismatch", 6)
        assert client.head(f"/api/v1/registry/blobs/{name}") is None
        with pytest.raises(GarrisonError) as malformed:
            client.request(
                "PUT", f"/api/v1/registry/blobs/{name}", content=b"x", headers={"Content-Range": "bytes 9-1/5"}
            )
        assert malformed.value.code == "blob.range_malformed"
    with release.served.controller.database.reading() as session:
        events = access_queries.events(session, limit=1000)
        refused = [(one.principal, one.detail["code"]) for one in events if one.outcome == "refused"]
    assert refused[-1] == ("paula", "blob.digest_mismatch")


def test_only_publishers_publish(release: Release) -> None:
    name = sha256_hex(b"honest bytes")
    viewer = release.served.principal("vera", "viewer")
    with viewer as client:
        for method, path in (("PUT", f"/api/v1/registry/blobs/{name}"), ("POST", "/api/v1/registry/metadata")):
            with pytest.raises(DeniedError):
                client.request(method, path, content=b"honest bytes")
        assert client.get("/api/v1/registry")["fleet"] == "demo"
    with release.served.client("garrison_unknown") as stranger, pytest.raises(UnauthenticatedError):
        stranger.get("/api/v1/models")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"roots": ["%"]}', b'{"targets": "AA", "more": 1}', b'{"targets": 1}', b"\xff"]
)
def test_malformed_pushes_are_refused(release: Release, body: bytes) -> None:
    with publisher(release) as client, pytest.raises(GarrisonError) as caught:
        client.request("POST", "/api/v1/registry/metadata", content=body)
    assert caught.value.code in {"registry.upload_malformed", "registry.upload_empty"}


def test_a_signer_elsewhere_pulls_verifies_and_changes(release: Release, published: str, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    digest = release.run("registry", "status")["first_root_sha256"]
    assert release.fails("registry", "pull", "--workspace", elsewhere).code == "signing.first_root_unknown"
    wrong = release.fails("registry", "pull", "--workspace", elsewhere, "--root-sha256", "0" * 64)
    assert wrong.code == "signing.first_root_mismatch"
    pulled = release.run("registry", "pull", "--workspace", elsewhere, "--root-sha256", digest)

    floored = release.run("model", "floor", "tiny", "1.0.0", "--workspace", elsewhere)
    assert floored["targets"] == pulled["targets"] + 1
    for name in ("dan", "erin"):
        release.run("registry", "sign", "--workspace", elsewhere, "--key", release.key(name), "--yes")
    assert release.run("registry", "push", "--workspace", elsewhere)["targets"] == floored["targets"]
    assert release.served.controller.registry.get_fleet().floors == {"tiny": "1.0.0"}

    pending = Path(release.workspace) / "pending"
    if any(pending.iterdir()):  # another test left a change there, which is outdated now
        outdated = release.fails("registry", "pull", "--workspace", release.workspace)
        assert outdated.code == "signing.pending_outdated"
        for path in pending.iterdir():
            path.unlink()
    assert release.run("registry", "pull", "--workspace", release.workspace)["targets"] == floored["targets"]


def test_root_signers_are_replaced(release: Release, published: str) -> None:
    for path in (Path(release.workspace) / "pending").iterdir():
        path.unlink()
    release.run("registry", "pull", "--workspace", release.workspace)
    release.run("registry", "key", "generate", "frank", "--out", str(release.folder / "keys"))
    replaced = ("--remove-root-signer", "carol", "--add-root-key", release.public("frank"))
    release.run("registry", "root", "rotate", "--workspace", release.workspace, *replaced)
    release.sign("alice")
    release.sign("frank")
    assert release.fails("registry", "push", "--workspace", release.workspace).code == "registry.threshold_unmet"
    release.sign("bob")

    assert release.run("registry", "push", "--workspace", release.workspace)["root"] == 2
    with release.served.board_http() as http:
        assert http.get("/device/v1/metadata/2.root.json").status_code == 200


def test_the_timestamp_is_kept_fresh(release: Release, published: str) -> None:
    registry = release.served.controller.registry
    assert not registry.refresh_online(datetime.now(UTC))
