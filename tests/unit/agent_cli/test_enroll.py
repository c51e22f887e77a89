"""What a person at the board sees of enrolment."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_agent.adapters.enrolment import Waiting
from garrison_agent.cli import enrolment
from garrison_agent.cli.enrolment import Patience
from garrison_agent.cli.main import main
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import UnavailableError
from garrison_protocol.messages.enrolment import OfflineRequest, key_fingerprint
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki
from tests.unit.adapters.test_enrolment_forms import ROOT, respond

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return FleetPki(tmp_path / "pki")


@pytest.fixture
def api(pki: FleetPki) -> Iterator[DeviceApi]:
    with DeviceApi(pki) as api:
        yield api


def run(config: Path, *arguments: object) -> int:
    return main(["--config", str(config), "enroll", *map(str, arguments)])


def test_with_a_token(api: DeviceApi, config: Path, capsys: Capture) -> None:
    assert run(config, api.line()) == 0
    out = capsys.readouterr().out
    assert "enrolled as edge-1" in out
    assert key_fingerprint(api.identities["edge-1"]) in out
    assert "next: systemctl restart garrison-agent" in out
    assert run(config, api.line(), "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["device"] == "edge-1"


def test_the_string_may_come_through_a_pipe(
    api: DeviceApi, config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(api.line() + "\n"))
    assert run(config, "-") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run(config, "-") == 2
    assert "enrolment.empty" in capsys.readouterr().err


def test_a_name_that_no_board_can_have_is_refused_before_anything_is_made(
    api: DeviceApi, config: Path, capsys: Capture
) -> None:
    assert run(config, api.line(""), "--name", "Edge 7", "--no-wait") == 2
    assert "device.name_malformed" in capsys.readouterr().err
    assert api.pending == {}
    assert api.requests == []


def test_a_name_that_was_not_given_is_told(api: DeviceApi, config: Path, capsys: Capture) -> None:
    assert run(config, api.line(), "--name", "edge-70") == 0
    assert "it asked for the name edge-70, and was given edge-" in capsys.readouterr().err


def test_an_invitation_without_waiting_says_how_to_go_on(api: DeviceApi, config: Path, capsys: Capture) -> None:
    assert run(config, api.line(""), "--name", "edge-7", "--no-wait") == 8
    (asked,) = api.pending
    error = capsys.readouterr().err
    assert f"garrison device enroll approve {key_fingerprint(asked)}" in error
    assert "run the same command here again" in error
    assert api.pending[asked].name == "edge-7"
    assert run(config, api.line(""), "--no-wait", "-o", "json") == 8
    fields = json.loads(capsys.readouterr().err)["error"]["fields"]
    assert fields["fingerprint"] == key_fingerprint(asked)
    api.approved[asked] = "edge-7"
    assert run(config, api.line(""), "--no-wait") == 0
    assert "enrolled as edge-7" in capsys.readouterr().out


def test_an_invitation_waits_and_can_be_interrupted(
    api: DeviceApi, config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = 0

    def sleep(_: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            raise KeyboardInterrupt

    moments = iter(range(0, 10_000, 40))
    monkeypatch.setattr(
        enrolment, "Patience", lambda json: Patience(json, sleep=sleep, monotonic_s=lambda: float(next(moments)) / 10)
    )
    assert run(config, api.line("")) == 130
    (asked,) = api.pending
    shown = capsys.readouterr()
    assert key_fingerprint(asked) in shown.out
    assert "Ctrl-C is safe" in shown.out
    assert "waiting for approval ..." in shown.err
    assert "Nothing is lost" in shown.err
    api.approved[asked] = "edge-7"
    assert run(config, api.line("")) == 0


def test_a_terminal_sees_how_long_it_has_waited(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    patience = Patience(False, sleep=sleep, monotonic_s=lambda: now_s)
    for error in (None, UnavailableError("controller.unreachable", "away"), *[None] * 20):
        patience.wait(Waiting("https://c:1", "aaaa-bbbb", "", error))
    patience.end()
    shown = capsys.readouterr()
    assert shown.out.count("aaaa-bbbb") == 2  # once to compare, once in the command to type
    assert "\r\x1b[Kwaiting for approval (4 s)" in shown.err
    assert "the controller does not answer; trying again" in shown.err
    assert shown.err.endswith("\r\x1b[K")
    assert 400 < now_s - 100 < 700  # it asks less often, at most every half minute


def test_by_files(pki: FleetPki, config: Path, tmp_path: Path, capsys: Capture) -> None:
    asked, answered = tmp_path / "request.json", tmp_path / "response.json"
    assert run(config, "--offline", "--out", asked, "--name", "edge-5") == 0
    out = capsys.readouterr().out
    request = OfflineRequest.model_validate_json(asked.read_bytes())
    assert key_fingerprint(request.identity) in out
    assert "garrison device enroll approve --request request.json" in out
    assert "PRIVATE" not in asked.read_text()

    answered.write_bytes(respond(pki, request))
    assert run(config, "--response", answered) == 2
    shown = capsys.readouterr()
    assert sha256_hex(ROOT) in shown.out
    assert "enrolment.root_unconfirmed" in shown.err
    assert run(config, "--response", answered, "--root-sha256", "0" * 64) == 6
    assert "enrolment.wrong_root" in capsys.readouterr().err
    assert run(config, "--response", answered, "--root-sha256", "short") == 2
    assert run(config, "--response", answered, "--root-sha256", f"SHA256:{sha256_hex(ROOT).upper()}") == 0
    out = capsys.readouterr().out
    assert out.index("wants the board to trust") < out.index("enrolled as edge-5")
    assert run(config, "--response", answered, "--root-sha256", sha256_hex(ROOT), "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["device"] == "edge-5"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--offline"],
        ["STRING", "--offline", "--out", "x"],
        ["STRING", "--out", "x"],
        ["STRING", "--root-sha256", "00"],
        ["--response", "x", "--out", "y"],
        ["--response", "x", "--name", "y"],
        ["--offline", "--out", "x", "--no-wait"],
    ],
)
def test_forms_that_do_not_go_together(config: Path, arguments: list[str], capsys: Capture) -> None:
    assert run(config, *arguments) == 2
    assert "enrolment.forms" in capsys.readouterr().err


def test_files_that_cannot_be_used(config: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(config, "--offline", "--out", tmp_path / "no" / "folder") == 2
    assert "cli.file_unusable" in capsys.readouterr().err
    assert run(config, "--response", tmp_path / "missing") == 2
    assert "cli.file_unusable" in capsys.readouterr().err
    (tmp_path / "huge").write_bytes(b"x" * (enrolment.MAX_RESPONSE_BYTES + 1))
    assert run(config, "--response", tmp_path / "huge") == 2
    assert "enrolment.response_malformed" in capsys.readouterr().err


def test_root_makes_no_keys_in_the_agents_folder(
    api: DeviceApi, config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = config.parent / "state"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    real = Path.stat
    others = os.stat_result([*real(state)[:4], 54321, *real(state)[5:10]])
    monkeypatch.setattr(Path, "stat", lambda self, **named: others if self == state else real(self, **named))
    assert run(config, api.line()) == 2
    error = capsys.readouterr().err
    assert "enrolment.wrong_user" in error
    assert "runuser -u 54321 -- garrison-agent enroll" in error
    assert api.requests == []
