"""Both certificate authorities of a running fleet are replaced: boards go on, and at the end nobody trusts the old."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from demo.fleet import TARGETS_SIGNERS, Board, Fleet
from demo.processes import wait_for
from demo.steps import PEOPLE
from garrison_agent.identity import Folders
from garrison_controller.devices.ca import fingerprint, read_certificates

pytestmark = pytest.mark.e2e


class Changing:
    """A fleet whose authorities change, step by step as docs/operations.md says."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pki = fleet.state / "pki"

    def serve(self, *words: str) -> None:
        self.fleet.garrison("serve", *words, "--config", str(self.fleet.config))

    def refused(self, *words: str) -> str:
        """Run a ``serve`` command on the controller's host that is refused; return what it says."""
        done = self.fleet.try_garrison("serve", *words, "--config", str(self.fleet.config))
        assert done.returncode != 0, done.stdout
        return done.stderr

    def publish(self, name: str) -> None:
        """Have the release signers publish what ``online.json`` says of an authority."""
        online = ("--online", str(self.fleet.state / "online.json"), "--workspace", str(self.fleet.workspace))
        self.fleet.garrison("registry", "key", "rotate", name, *online)
        for signer in TARGETS_SIGNERS:
            self.fleet.sign(signer)
        self.fleet.push_registry(who="piet")

    def restart(self) -> None:
        self.fleet.controller.stop()
        self.restart_broker()
        self.fleet.start_controller()

    def restart_broker(self) -> None:
        self.fleet.broker.stop()
        self.fleet.start_broker()

    def string(self, name: str) -> str:
        words = ("device", "token", "create", name, "--group", "/demo/")
        return str(self.fleet.json(*words, who="dora")["enrolment"])

    def board(self, name: str, string: str = "") -> Board:
        """Return a new enrolled board, not started."""
        board = Board(self.fleet, name)
        self.fleet.boards.append(board)
        board.configure()
        board.enrol(string or self.string(name))
        return board

    def authorities(self, name: str) -> list[str]:
        """Return the fingerprints in ``pki/<name>.pem``."""
        return [fingerprint(one) for one in read_certificates(self.pki / f"{name}.pem")]

    def keys(self, name: str) -> list[str]:
        return sorted(path.name for path in self.pki.glob(f"{name}*.key"))

    def in_online(self, field: str) -> int:
        document = json.loads((self.fleet.state / "online.json").read_text())
        return len(x509.load_pem_x509_certificates(document[field].encode()))


def pinned(board: Board) -> list[str]:
    return [fingerprint(one) for one in read_certificates(Folders(board.state).server_ca)]


def issuer(path: Path) -> str:
    return read_certificates(path)[0].issuer.rfc4514_string()


def is_online(board: Board) -> bool:
    return bool(board.status()["connected"])


def comes_online(board: Board) -> None:
    if not board.agent.running():
        board.start()
    wait_for(f"{board.name} online", lambda: is_online(board), timeout_s=60, log=board.log)


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Changing]:
    fleet = Fleet(tmp_path, [])
    try:
        fleet.bring_up(PEOPLE, publisher="piet")
        yield Changing(fleet)
    finally:
        fleet.stop()


def test_a_new_server_ca(changing: Changing, tmp_path: Path) -> None:
    fleet = changing.fleet
    one, away = changing.board("edge-1"), changing.board("edge-2")
    comes_online(one)
    (old,) = changing.authorities("server-ca")
    early, late = changing.string("edge-3"), changing.string("edge-4")
    shutil.copytree(away.state, tmp_path / "away")

    changing.serve("rotate-key", "server-ca")
    new = changing.authorities("server-ca")[-1]
    assert changing.authorities("server-ca") == [old, new]
    assert changing.in_online("server_ca") == 2
    changing.serve("rotate-key", "server-ca")  # keeps the one that waits
    assert changing.authorities("server-ca") == [old, new]
    assert "ca.not_published" in changing.refused("use-ca", "server-ca")
    assert pinned(changing.board("edge-3", early)) == [old]  # strings made before go on working
    fleet.garrison("device", "revoke", "edge-3", "--reason", "it has served", who="dora")

    changing.publish("server-ca")
    wait_for("edge-1 trusting both", lambda: pinned(one) == [old, new], timeout_s=60, log=one.log)
    behind = changing.refused("use-ca", "server-ca")
    assert "ca.boards_behind" in behind
    assert "edge-2" in behind
    comes_online(away)
    wait_for("edge-2 trusting both", lambda: pinned(away) == [old, new], timeout_s=60, log=away.log)
    words = ("use-ca", "server-ca", "--config", str(fleet.config), "-o", "json")
    wait_for("reports of both", lambda: fleet.try_garrison("serve", *words).returncode == 0, timeout_s=60, log=one.log)
    away.agent.stop()
    assert changing.keys("server-ca") == ["server-ca.key", "server-ca.old.key"]
    assert "ca.still_shown" in changing.refused("retire-ca", "server-ca")

    changing.restart()
    wait_for("edge-1 online again", lambda: is_online(one), timeout_s=60, log=one.log)
    fleet.delivered(one)
    fresh = Board(fleet, "edge-4")
    fresh.configure()
    assert "enrolment.wrong_server_ca" in fresh.try_run("enroll", late).stderr  # names the old one: make a new string
    assert pinned(changing.board("edge-4")) == [new]
    assert "ca.rotation_unfinished" in changing.refused("rotate-key", "server-ca")

    changing.serve("retire-ca", "server-ca")
    changing.publish("server-ca")
    assert (changing.authorities("server-ca"), changing.keys("server-ca")) == ([new], ["server-ca.key"])
    wait_for("edge-1 trusting one", lambda: pinned(one) == [new], timeout_s=60, log=one.log)
    comes_online(away)  # it trusts both, and learns the rest
    wait_for("edge-2 trusting one", lambda: pinned(away) == [new], timeout_s=60, log=away.log)
    comes_online(one)
    assert "ca.nothing_to_retire" in changing.refused("retire-ca", "server-ca")

    away.agent.stop()
    shutil.rmtree(away.state)
    shutil.copytree(tmp_path / "away", away.state)  # as if it had been away all the time: it trusts the old one alone
    stick = tmp_path / "stick"
    fleet.garrison("registry", "export", "--bundle", str(stick), "--devices", "name=edge-2", who="rolf")
    away.start()
    assert (is_online(away), pinned(away)) == (False, [old])
    away.run("import", str(stick), "--wait", "60")
    assert pinned(away) == [new]
    comes_online(away)


def test_a_new_device_ca(changing: Changing) -> None:
    fleet = changing.fleet
    one, two = changing.board("edge-1"), changing.board("edge-2")
    comes_online(one)
    (old,) = changing.authorities("device-ca")
    before = issuer(Folders(one.state).tls_pair)

    changing.serve("rotate-key", "device-ca")
    new = changing.authorities("device-ca")[-1]
    assert (changing.pki / "device-ca.crl").read_text().count("BEGIN X509 CRL") == 2
    changing.publish("device-ca")
    assert "ca.broker_refuses" in changing.refused("use-ca", "device-ca")  # it has not read the new files
    changing.restart_broker()
    changing.serve("use-ca", "device-ca")
    changing.restart()

    wait_for("edge-1 online with its old certificate", lambda: is_online(one), timeout_s=60, log=one.log)
    assert issuer(Folders(one.state).tls_pair) == before
    three = changing.board("edge-3")
    comes_online(three)
    assert issuer(Folders(three.state).tls_pair) == issuer(changing.pki / "controller.pem") != before

    for board in (two, three):  # by the old authority and by the new one
        comes_online(board)
        fleet.garrison("device", "revoke", board.name, "--reason", "stolen", who="dora")
        board.agent.stop()
    assert (changing.pki / "device-ca.crl").read_text().count("BEGIN X509 CRL") == 2
    os.kill(fleet.broker.pid, signal.SIGHUP)
    for board in (two, three):
        board.start()
    needed = changing.refused("retire-ca", "device-ca")
    assert "ca.still_needed" in needed
    assert "1 boards" in needed
    assert "edge-1" in needed

    changing.serve("retire-ca", "device-ca", "--force")
    changing.publish("device-ca")
    assert (changing.authorities("device-ca"), changing.keys("device-ca")) == ([new], ["device-ca.key"])
    assert (changing.pki / "device-ca.crl").read_text().count("BEGIN X509 CRL") == 1
    wait_for("edge-1's renewal", lambda: issuer(Folders(one.state).tls_pair) != before, timeout_s=60, log=one.log)
    changing.restart_broker()
    wait_for("edge-1 online again", lambda: is_online(one), timeout_s=60, log=one.log)
    fleet.delivered(one)
    found = fleet.json("audit", "list", "--device", "edge-1", "--kind", "certificate.*", who="olga")
    assert [entry["kind"] for entry in found["entries"]] == ["certificate.renewed"]
    assert not any(is_online(board) for board in (two, three))
    assert old not in changing.authorities("device-ca")
