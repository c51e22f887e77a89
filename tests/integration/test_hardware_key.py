"""A signer whose key lies in a PKCS#11 token: imported, shown, used, and refused with a wrong PIN or another key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from garrison_controller.signing.keys import load_public
from garrison_controller.signing.workspace import RoleKeys, Workspace
from tests.fakes.ceremony import NOW, make_online, make_signer
from tests.fakes.softhsm import PIN, Token

pytestmark = pytest.mark.integration


def garrison(token: Token, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: a PKCS#11 driver reads its configuration once for each process."""
    command = [sys.executable, "-m", "garrison_controller", *words, "-o", "json"]
    environment = {**os.environ, **token.environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_a_key_in_a_token_signs_the_root(tmp_path: Path) -> None:
    token, other = Token(tmp_path / "hsm", "alice"), Token(tmp_path / "other", "mallory")
    pin = tmp_path / "pin"
    pin.write_text(f"{PIN}\n")
    keys = tmp_path / "keys"
    imported = garrison(token, "registry", "key", "import", "alice", "--key", token.uri, "--out", str(keys))
    assert imported.returncode == 0, imported.stderr
    public = keys / "alice.pub.json"
    key = load_public(public)
    assert (key.scheme, sorted(path.name for path in keys.iterdir())) == ("ecdsa-sha2-nistp256", ["alice.pub.json"])

    dan = make_signer(keys, "dan")
    workspace = Workspace.create(
        tmp_path / "release",
        online=make_online(tmp_path / "online"),
        fleet="demo",
        root=RoleKeys("root", (key,), 1),
        targets=RoleKeys("targets", (load_public(keys / "dan.pub.json"),), 1),
        root_days=730,
        targets_days=365,
        online_days=1095,
        now=NOW,
    )
    workspace.sign(dan)
    sign = ["registry", "root", "sign", "--workspace", str(workspace.folder), "--yes", "--key", token.uri]
    sign += ["--public-key", str(public), "--passphrase-file"]
    wrong_pin = tmp_path / "wrong"
    wrong_pin.write_text("654321\n")
    refused = garrison(token, *sign, str(wrong_pin))
    assert (refused.returncode, "signing.key_unusable" in refused.stderr) == (6, True), refused.stderr
    elsewhere = garrison(other, *sign, str(pin))
    assert (elsewhere.returncode, "signing.key_unusable" in elsewhere.stderr) == (6, True), elsewhere.stderr
    renamed = garrison(other, *(word.replace("label=alice", "label=mallory") for word in sign), str(pin))
    assert (renamed.returncode, "signing.key_mismatch" in renamed.stderr) == (6, True), renamed.stderr
    with pytest.raises(Exception, match=r"registry\.threshold_unmet"):
        workspace.completed()

    signed = garrison(token, *sign, str(pin))
    assert signed.returncode == 0, signed.stderr
    assert json.loads(signed.stdout)["signed"] == [{"role": "root", "version": 1, "new": True}]
    assert set(workspace.completed()) == {"root", "targets"}
