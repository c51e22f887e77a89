"""A model that its maker signed, from packing to what a board could fetch, through the commands and over real TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from garrison_protocol.canonical import sha256_hex
from tests.fakes.makers import FILES, Maker, draft_of, makers_signature, write_files
from tests.integration.releases import published_release

pytestmark = pytest.mark.integration


def test_a_signed_model_is_published_with_its_proof(tmp_path: Path) -> None:
    signature = makers_signature()
    (tmp_path / "model.sig").write_bytes(signature.bundle)
    (tmp_path / "maker.pem").write_text(signature.public_key_pem)
    (tmp_path / "other.pem").write_bytes(Maker().pem)
    (tmp_path / "draft.json").write_bytes(draft_of(*FILES))
    sources = write_files(tmp_path / "model")
    pack = ["model", "pack", "--manifest", str(tmp_path / "draft.json"), "--out", str(tmp_path / "out")]
    pack += [word for name, path in sources.items() for word in ("--file", f"{name}={path}")]
    proof = ["--model-signature", str(tmp_path / "model.sig"), "--model-signature-key"]
    with published_release(tmp_path) as release:
        assert release.fails(*pack, *proof[:2]).code == "provenance.incomplete"
        assert release.fails(*pack, *proof, str(tmp_path / "other.pem")).code == "provenance.bad_signature"
        package = release.run(*pack, *proof, str(tmp_path / "maker.pem"))
        assert package["blobs"] == 2 * len(FILES) + 1
        release.run("model", "add", package["folder"], "--workspace", release.workspace)
        words = ("registry", "targets", "sign", "--workspace", release.workspace, "--yes", "--key")
        for name in ("dan", "erin"):
            _, shown = release.text(*words, release.key(name))
        for fact in (
            "tiny:1.0.0",
            package["manifest_sha256"],
            "Apache-2.0",
            "size_bytes",
            "cases: 1",
            "min_accuracy: 0.5",
        ):
            assert fact in shown
        assert "made by: holder of the key sha256 " in shown
        assert sha256_hex(signature.bundle) in shown

        bundle = Path(package["folder"]) / "blobs" / sha256_hex(signature.bundle)
        genuine = bundle.read_bytes()
        bundle.write_bytes(Maker().sign().bundle)
        publish = ("model", "publish", package["folder"], "--workspace", release.workspace)
        assert release.fails(*publish).code == "provenance.bad_signature"
        bundle.write_bytes(genuine)
        assert release.run(*publish)["packages"] == ["tiny:1.0.0"]
        kept = release.served.controller.registry.blobs.path(sha256_hex(signature.bundle))
        assert kept.read_bytes() == signature.bundle
        keys = release.run("registry", "key", "list", "--workspace", release.workspace)["keys"]
        assert sorted(one["name"] for one in keys if one["use"] == "targets") == ["dan", "erin"]
        assert sorted(one["use"] for one in keys if one["name"] == "controller") == ["director", "log", "receipt"]
