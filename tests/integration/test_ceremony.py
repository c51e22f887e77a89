"""docs/security.md, "The key ceremony": the shell session of the page, word for word, and a board after it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from demo.processes import free_port
from garrison_agent.registry import trust
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_controller.signing.keys import load_signer
from garrison_controller.signing.metadata import parse_root
from garrison_controller.signing.workspace import Workspace
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import RefusedError
from garrison_protocol.fleet import parse_fleet
from garrison_protocol.manifest import parse_manifest, target_path
from garrison_protocol.states import KeyPurpose
from tests.integration.controllers import wait_until

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ["bash", "--noprofile", "--norc", "-euo", "pipefail"]


def session() -> str:
    """Return every shell block of the section, in order."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text.partition("<!-- ceremony: begin -->")[2].partition("<!-- ceremony: end -->")[0])
    assert len(blocks) == 9
    return "\n".join(blocks)


class Held:
    """The folder in which the ceremony was held, its controller still running."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.source = HttpSource(HttpsOpener(f"https://127.0.0.1:{port}", folder / "state/pki/server-ca.pem"))


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """Run the page in an empty folder."""
    folder, home, port = tmp_path_factory.mktemp("ceremony"), tmp_path_factory.mktemp("home"), free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "HTTP_PORT": str(port)}
    log = home / "session.log"
    with log.open("w") as output:
        shell = subprocess.Popen(
            [*SHELL, "-c", session()],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=240)
            assert status == 0, log.read_text()[-4000:]
            yield Held(folder, port)
        finally:
            stop_group(shell.pid)


def stop_group(group: int) -> None:
    """End the session's own processes: the shell, and the controller that it left running."""
    try:
        os.killpg(group, signal.SIGTERM)
        wait_until(lambda: not is_alive(group), "the end of the session's controller")
    except ProcessLookupError:
        return


def is_alive(group: int) -> bool:
    """Tell whether a process group has members left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def board_view(held: Held, folder: Path, *want: str) -> trust.Refresh:
    """Return what a board believes that pinned the first root, by the agent's own verification."""
    root = held.source.metadata("1.root.json", 1_000_000)
    now = datetime.now(UTC)
    return trust.refresh(held.source, folder, bootstrap=root, high_water={}, floor=now, want=want)


def test_a_board_follows_the_whole_ceremony(held: Held, tmp_path: Path) -> None:
    path = target_path("tiny", "1.0.0")
    view = board_view(held, tmp_path, path)
    assert (view.root, view.targets) == (3, 3)
    model = parse_manifest(view.manifests[path]).variants[0].files[0]
    assert model.sha256 == sha256_hex((held.folder / "tiny.gguf").read_bytes())


def test_the_stolen_root_key_is_worth_nothing(held: Held) -> None:
    root = parse_root(held.source.metadata("3.root.json", 1_000_000)).signed
    names = {root.keys[keyid].unrecognized_fields["x-garrison-signer"] for keyid in root.roles["root"].keyids}
    assert names == {"rita", "ravi", "rune"}
    workspace = Workspace(held.folder / "rune/release")
    workspace.rotate_root(add=[], remove=[], thresholds={}, days=730, now=datetime.now(UTC))
    rosa = load_signer(
        held.folder / "rosa/keys/rosa.key", (held.folder / "rosa/passphrase").read_text().splitlines()[0]
    )
    with pytest.raises(RefusedError, match=r"signing\.key_has_no_role"):
        workspace.sign(rosa)


def test_the_director_key_is_a_new_one(held: Held, tmp_path: Path) -> None:
    view = board_view(held, tmp_path)
    assert view.fleet is not None
    directors = [key.public for key in parse_fleet(view.fleet).keys if key.purpose is KeyPurpose.DIRECTOR]
    online = (held.folder / "state/online.json").read_text()
    assert [public in online for public in directors] == [True]
    assert sorted(path.name for path in (held.folder / "state/keys").glob("director*")) == ["director.key"]


def test_no_private_key_is_left_open_or_passed_on(held: Held) -> None:
    for path in held.folder.rglob("*.key"):
        assert path.stat().st_mode & 0o077 == 0, path
        plain = path.parent.name == "pki" and path.name in ("server.key", "controller.key")
        assert (b"ENCRYPTED" in path.read_bytes()) is not plain, path
    assert list(held.folder.glob("*/release/**/*.key")) == []
    assert list((held.folder / "handed-in").glob("*.key")) == []
