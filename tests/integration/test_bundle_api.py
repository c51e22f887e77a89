"""Bundles through the controller's API and the command line: rights, contents, resuming, and what came home."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Snapshot, Timestamp

from garrison_controller.access import queries as access_queries
from garrison_controller.rollouts import service as rollouts
from garrison_protocol import bundle, chain
from garrison_protocol.bundle import HomeRequest, Kind
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.envelope import seal, unseal
from garrison_protocol.errors import DeniedError, GarrisonError
from garrison_protocol.messages.anchor import Anchor
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.enrolment import RenewResponse, parse_enrolment
from garrison_protocol.messages.streams import Batch, Receipt, Row
from garrison_protocol.states import Stream
from garrison_protocol.stick import Stick
from tests.integration.releases import Release, published_release
from tests.unit.devices.boards import Board

pytestmark = pytest.mark.integration

MODEL = bytes(range(256)) * 4096 * 2
OTHER = bytes(reversed(range(256))) * 4096


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """A controller with two published models."""
    with published_release(tmp_path_factory.mktemp("release")) as release:
        for name, content in (("tiny", MODEL), ("other", OTHER)):
            package = release.pack(name, "1.0.0", content)
            release.run("model", "add", package, "--workspace", release.workspace)
            release.sign("dan")
            release.sign("erin")
            release.run("model", "publish", package, "--workspace", release.workspace)
        with release.served.principal("rolf", "release-manager", "viewer"):
            pass
        token = release.served.admin.post("/api/v1/access/tokens", {"principal": "rolf"})["token"]
        release.environment["GARRISON_TOKEN"] = token
        yield release


def enrol(release: Release, name: str, group: str) -> Board:
    with release.served.principal(f"dora-{name}", "device-admin") as dora:
        answer = dora.post("/api/v1/enrolment/tokens", {"name": name, "group": group})
    board = Board()
    request = board.enrol_request(parse_enrolment(answer["enrolment"]).token)
    with release.served.board_http() as http:
        http.post("/device/v1/enroll", json=request.model_dump()).raise_for_status()
    return board


def desire(release: Release, device: str, model: str) -> None:
    """Have the controller sign a desired state with this model, by an approved rollout."""
    words = ["rollout", "create", f"to-{device}", "--model", model, "--version", "1.0.0"]
    release.run(*words, "--filter", f"name={device}", "--group", "all=*", "--soak", "0s")
    with release.served.principal(f"anna-{device}", "approver", "viewer") as anna:
        shown = anna.get(f"/api/v1/rollouts/to-{device}")
        anna.post(f"/api/v1/rollouts/to-{device}/approve", {"digest": shown["digest"]})
    controller = release.served.controller
    rollouts.tick(controller.database, controller.keys.director, datetime.now(UTC))


@pytest.fixture(scope="module")
def boards(release: Release) -> dict[str, Board]:
    made = {"edge-1": enrol(release, "edge-1", "/north/"), "edge-2": enrol(release, "edge-2", "/south/")}
    desire(release, "edge-1", "tiny")
    desire(release, "edge-2", "other")
    return made


def export(release: Release, stick: Path, devices: str, days: int = 20) -> Any:
    return release.run("registry", "export", "--bundle", str(stick), "--devices", devices, "--valid-days", str(days))


def timestamp(stick: Path) -> Timestamp:
    return Metadata[Timestamp].from_bytes((stick / "metadata" / "timestamp.json").read_bytes()).signed


def test_a_bundle_holds_what_its_boards_need_and_no_other_model(
    release: Release, boards: dict[str, Board], tmp_path: Path
) -> None:
    answer = export(release, tmp_path, "name=edge-1")
    assert answer["devices"] == ["edge-1"]
    assert (tmp_path / bundle.blob_path(sha256_hex(MODEL))).read_bytes() == MODEL
    assert not (tmp_path / bundle.blob_path(sha256_hex(OTHER))).exists()
    assert not (tmp_path / "devices" / "edge-2").exists()
    names = {path.name for path in (tmp_path / "metadata").iterdir()}
    assert {"1.root.json", "timestamp.json"} <= names
    every = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(bundle.parse(str(path.relative_to(tmp_path))) for path in every)
    targets = [path.relative_to(tmp_path / "targets") for path in every if "targets" in path.parts]
    assert {str(path).partition("/")[2] for path in targets} == {"fleet.json", "models/tiny/1.0.0/manifest.json"}


def test_the_carried_timestamp_has_the_published_version_and_lasts_as_asked(
    release: Release, boards: dict[str, Board], tmp_path: Path
) -> None:
    export(release, tmp_path, "name=edge-1")
    carried = timestamp(tmp_path)
    data = release.served.controller.registry.current_timestamp()
    assert data is not None
    published = Metadata[Timestamp].from_bytes(data).signed
    assert (carried.version, carried.snapshot_meta) == (published.version, published.snapshot_meta)
    assert 19 <= (carried.expires - datetime.now(UTC)).days <= 20
    assert (published.expires - datetime.now(UTC)).days < 8
    assert release.served.controller.registry.current_timestamp() == data


def test_a_bundle_never_outlives_its_snapshot_which_is_signed_again_first(
    release: Release, boards: dict[str, Board], tmp_path: Path
) -> None:
    answer = export(release, tmp_path, "name=edge-1", days=300)
    carried = timestamp(tmp_path)
    name = f"{carried.snapshot_meta.version}.snapshot.json"
    snapshot = Metadata[Snapshot].from_bytes((tmp_path / "metadata" / name).read_bytes()).signed
    assert carried.expires == snapshot.expires == datetime.fromisoformat(answer["valid_until"])
    assert (snapshot.expires - datetime.now(UTC)).days >= 29
    again = export(release, tmp_path, "name=edge-1", days=300)
    assert timestamp(tmp_path).version == carried.version  # not again and again
    assert again["valid_until"] == answer["valid_until"]


def test_a_cut_off_export_goes_on_with_what_is_there(
    release: Release, boards: dict[str, Board], tmp_path: Path
) -> None:
    first = export(release, tmp_path, "name=edge-*")
    assert first["copied"] == first["blobs"] == 4
    (tmp_path / "bundle.json").unlink()
    (tmp_path / bundle.blob_path(sha256_hex(OTHER))).write_bytes(b"half of it")
    second = export(release, tmp_path, "name=edge-*")
    assert (second["copied"], second["copied_bytes"]) == (1, len(OTHER))
    assert (tmp_path / bundle.blob_path(sha256_hex(OTHER))).read_bytes() == OTHER
    export(release, tmp_path, "name=edge-1")
    assert not (tmp_path / "devices" / "edge-2" / "desired.dsse").exists()


def test_rights_bound_what_is_carried(release: Release, boards: dict[str, Board]) -> None:
    served = release.served
    with served.principal("nora", "operator", scope="/north/") as nora:
        assert nora.post("/api/v1/bundles", {"devices": "*"})["head"]["devices"] == ["edge-1"]
        with pytest.raises(GarrisonError) as none:
            nora.post("/api/v1/bundles", {"devices": "name=edge-2"})
        assert none.value.code == "bundle.no_device"
        assert nora.fetch(f"/api/v1/bundles/blobs/{sha256_hex(MODEL)}") == MODEL
        with pytest.raises(GarrisonError) as other:
            nora.fetch(f"/api/v1/bundles/blobs/{sha256_hex(OTHER)}")
        assert other.value.code == "bundle.blob_not_needed"
        with pytest.raises(DeniedError):
            nora.request("PUT", "/api/v1/bundles/home/edge-2/status", content=b"{}")
    with served.principal("vera", "viewer") as vera, pytest.raises(DeniedError):
        vera.post("/api/v1/bundles", {"devices": "*"})
    with served.controller.database.reading() as session:
        done = {(event.principal, event.action) for event in access_queries.events(session, limit=1000)}
    assert ("nora", "bundle.export") in done


def audit_batch(board: Board, device: str, count: int) -> tuple[bytes, str]:
    """Return a sealed batch of a new audit chain, and the hash of its last row."""
    epoch, previous, rows = "00000000000000ab", chain.genesis(device, "audit", "00000000000000ab"), []
    for seq in range(1, count + 1):
        entry = chain.build(
            device=device,
            epoch=epoch,
            seq=seq,
            time_ms=1,
            kind="test",
            previous=previous,
            facts={},
            body=None,
            salt=None,
        )
        previous = entry.hash
        rows.append(Row(header=entry.header))
    batch = Batch(device=device, stream=Stream.AUDIT, epoch=epoch, first=1, rows=tuple(rows))
    return seal("audit", encode(batch), board.identity), previous


def test_what_came_home_is_answered_by_the_next_bundle(
    release: Release, boards: dict[str, Board], tmp_path: Path
) -> None:
    board, keys = boards["edge-1"], release.served.controller.keys
    sealed, newest = audit_batch(board, "edge-1", 3)
    nonce = "ab" * 16
    request = HomeRequest(nonce=nonce, renew=board.renew_request("edge-1", "stick:7"))
    with Stick(tmp_path) as stick:
        stick.write(bundle.batch_path("edge-1", Stream.AUDIT, "00000000000000ab", 1), [sealed])
        stick.write(bundle.home_path("edge-1", Kind.REQUEST), [request.model_dump_json().encode()])
        stick.write(bundle.home_path("edge-2", Kind.STATUS), [b"no envelope"])
    first, second = release.run("registry", "import", str(tmp_path))["devices"]
    assert (first["device"], first["new"], first["refused"]) == ("edge-1", 2, 0)
    assert (second["device"], second["refused"]) == ("edge-2", 1)
    assert second["errors"][0]["code"] == "envelope.malformed"
    again = release.run("registry", "import", str(tmp_path))["devices"][0]
    assert (again["new"], again["repeated"]) == (0, 2)

    export(release, tmp_path, "name=edge-1")
    folder = tmp_path / "devices" / "edge-1"
    receipt = Receipt.model_validate_json(
        unseal((folder / "receipt-audit.dsse").read_bytes(), lambda _signer: keys.receipt.public_hex).body
    )
    assert (receipt.up_to, receipt.hash, receipt.resend) == (3, newest, False)
    anchor = Anchor.model_validate_json(
        unseal((folder / "anchor.dsse").read_bytes(), lambda _signer: keys.director.public_hex).body
    )
    assert (anchor.nonce, anchor.desired_counter, anchor.streams["audit"].seq) == (nonce, 1, 3)
    assert (
        "BEGIN CERTIFICATE" in RenewResponse.model_validate_json((folder / "renew.json").read_bytes()).certificate_pem
    )


def test_room_on_the_stick_is_looked_at_before_anything_is_written(
    release: Release, boards: dict[str, Board], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stick, "free_bytes", lambda _self: 1_000_000)
    error = release.fails("registry", "export", "--bundle", str(tmp_path), "--devices", "*")
    assert error.code == "bundle.no_room"
    assert list(tmp_path.iterdir()) == []
