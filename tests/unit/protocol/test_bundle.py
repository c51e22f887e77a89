from __future__ import annotations

import pytest

from garrison_protocol import bundle
from garrison_protocol.bundle import Kind, Place
from garrison_protocol.envelope import MAX_ENVELOPE_BYTES
from garrison_protocol.errors import InvalidError
from garrison_protocol.states import Stream

SHA = "ab" * 32


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("bundle.json", Place(Kind.HEAD)),
        (bundle.metadata_path("12.root.json"), Place(Kind.METADATA, name="12.root.json")),
        (bundle.metadata_path("timestamp.json"), Place(Kind.METADATA, name="timestamp.json")),
        (bundle.metadata_path("3.family-smollm.json"), Place(Kind.METADATA, name="3.family-smollm.json")),
        (bundle.target_path("fleet.json", SHA), Place(Kind.TARGET, name="fleet.json", sha256=SHA)),
        (
            bundle.target_path("models/aux/1.0.0/manifest.json", SHA),
            Place(Kind.TARGET, name="models/aux/1.0.0/manifest.json", sha256=SHA),
        ),
        (bundle.blob_path(SHA), Place(Kind.BLOB, sha256=SHA)),
        (bundle.device_path("edge-1", Kind.DESIRED), Place(Kind.DESIRED, "edge-1")),
        (bundle.device_path("con", Kind.ANCHOR), Place(Kind.ANCHOR, "con")),
        (bundle.device_path("edge-1", Kind.RENEWAL), Place(Kind.RENEWAL, "edge-1")),
        (bundle.home_path("edge-1", Kind.REQUEST), Place(Kind.REQUEST, "edge-1")),
        (
            bundle.batch_path("lpt1", Stream.AUDIT, "0123456789abcdef", 17),
            Place(Kind.AUDIT, "lpt1", epoch="0123456789abcdef", first=17),
        ),
        (
            bundle.batch_path("edge-1", Stream.TELEMETRY, "0123456789abcdef", 2**53 - 1),
            Place(Kind.TELEMETRY, "edge-1", epoch="0123456789abcdef", first=2**53 - 1),
        ),
    ],
)
def test_what_is_built_is_parsed_again(path: str, place: Place) -> None:
    assert bundle.parse(path) == place


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/bundle.json",
        "bundle.json/",
        "./bundle.json",
        "metadata/../bundle.json",
        "metadata/0.root.json",
        "metadata/root.json",
        "metadata/TIMESTAMP.JSON",
        "metadata/1.root.json\n",
        "targets/" + SHA,
        "targets/" + SHA + "/",
        "targets/" + SHA + "/models/../../x",
        "targets/" + SHA + "/models//x",
        "targets/" + SHA + "/aux",
        "targets/" + SHA + "/plain_",
        "targets/" + SHA.upper() + "/fleet.json",
        "blobs/sha256/aa/" + SHA,
        "blobs/sha256/ab/" + SHA + ".part",
        "devices/con/desired.dsse",
        "devices/edge-1_/desired.dsse",
        "devices/controller-1/desired.dsse",
        "devices/edge-1/status.dsse",
        "devices/EDGE-1/desired.dsse",
        "home/edge-1/desired.dsse",
        "home/edge-1/audit/0123456789abcdef-1.dsse",
        "home/edge-1/audit/0123456789ABCDEF-000000000001.dsse",
        "home/edge-1/audit/0123456789abcdef-00000000001.dsse",
        "home/edge-1/audit/0123456789abcdef-0000000000001.dsse",
        "home/edge-1/audit/0123456789abcdef-0000000000000001.dsse",
        "home/edge-1/audit/0123456789abcdef-12345678901234567.dsse",
        "home/edge-1/other/0123456789abcdef-000000000001.dsse",
        "metadata/" + "1" * 500 + ".json",
    ],
)
def test_everything_else_is_no_file_of_a_bundle(path: str) -> None:
    with pytest.raises(InvalidError) as refused:
        bundle.parse(path)
    assert refused.value.code == "bundle.name_unknown"


def test_names_of_dos_devices_are_set_apart() -> None:
    assert bundle.device_path("nul", Kind.DESIRED) == "devices/nul_/desired.dsse"
    assert bundle.target_path("models/com1.x/1.0/manifest.json", SHA).split("/")[3] == "com1.x_"
    assert bundle.device_of("nul_") == "nul"
    assert bundle.device_of("nul") is None
    assert bundle.device_of("edge-1") == "edge-1"
    assert bundle.device_of("..") is None


def test_every_kind_has_a_bound() -> None:
    assert bundle.parse(bundle.device_path("edge-1", Kind.DESIRED)).max_bytes == MAX_ENVELOPE_BYTES
    assert bundle.parse("bundle.json").max_bytes == bundle.MAX_HEAD_BYTES


def test_another_format_is_refused() -> None:
    with pytest.raises(InvalidError) as refused:
        bundle.parse_document(bundle.Head, b'{"format": "garrison-bundle/v2", "fleet": "x"}', "bundle.json")
    assert refused.value.code == "bundle.malformed"
