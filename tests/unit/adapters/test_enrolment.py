from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from garrison_agent.adapters import enrolment
from garrison_agent.identity import Folders, Identity, create_keys
from garrison_protocol.errors import (
    ConflictError,
    GarrisonError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki


def now() -> datetime:
    return datetime.now(UTC)


enrol = partial(enrolment.enrol, judge_at=now)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[DeviceApi]:
    with DeviceApi(FleetPki(tmp_path / "pki")) as api:
        yield api


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_a_board_enrols_with_keys_made_here(api: DeviceApi, state: Path) -> None:
    identity = enrol(state, api.line())
    assert (identity.device, identity.url) == ("edge-1", api.url)
    assert (identity.mqtt_host, identity.mqtt_port) == ("127.0.0.1", 8883)
    assert api.identities["edge-1"] == identity.signing_key.public_hex
    assert identity.folders.root.read_bytes() == api.root
    assert identity.server_ca_path.read_bytes() == api.server_ca
    folder = Folders(state).identity
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"identity.key", "tls.pem", "device.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert identity.mqtt_context(now).check_hostname
    assert Identity.load(state).signing_key.public_hex == identity.signing_key.public_hex


def test_the_same_line_again_changes_nothing_and_another_is_refused(api: DeviceApi, state: Path) -> None:
    first = enrol(state, api.line())
    asked = len(api.requests)
    assert enrol(state, api.line()).signing_key.public_hex == first.signing_key.public_hex
    assert len(api.requests) == asked
    with pytest.raises(ConflictError, match=r"enrolment\.already_enrolled"):
        enrol(state, api.line("a-one-time-token-2"))


def test_a_try_cut_off_before_the_answer_is_repeated_with_the_same_keys(api: DeviceApi, state: Path) -> None:
    api.cut_after_enrolment = True
    with pytest.raises(UnavailableError, match=r"controller\.unreachable"):
        enrol(state, api.line())
    with pytest.raises(NotFoundError, match=r"identity\.not_enrolled"):
        Identity.load(state)
    public = create_keys(state)[0].public_hex
    assert enrol(state, api.line()).signing_key.public_hex == public == api.identities["edge-1"]


def test_a_key_file_cut_off_while_it_was_written_is_made_again(api: DeviceApi, state: Path) -> None:
    folder = Folders(state).identity
    folder.mkdir(parents=True, mode=0o700)
    (folder / "identity.key.new").write_bytes(b"-----BEGIN")
    assert enrol(state, api.line()).device == "edge-1"


def test_an_impostor_with_another_ca_is_refused_before_anything_is_sent(api: DeviceApi, state: Path) -> None:
    with pytest.raises(RefusedError, match=r"enrolment\.wrong_server_ca"):
        enrol(state, api.line(server_ca_sha256="0" * 64))
    assert api.requests == ["GET /device/v1/server-ca.pem"]
    assert not Folders(state).server_ca.exists()


def test_the_right_ca_file_does_not_help_a_server_it_did_not_sign(api: DeviceApi, state: Path, tmp_path: Path) -> None:
    with DeviceApi(FleetPki(tmp_path / "impostor")) as impostor:
        impostor.server_ca = api.server_ca  # copied from the real controller: it is public
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            enrol(state, api.line(url=impostor.url))
        assert impostor.requests == ["GET /device/v1/server-ca.pem"]


def test_another_root_is_refused_and_the_token_stays_unused(api: DeviceApi, state: Path) -> None:
    with pytest.raises(RefusedError, match=r"enrolment\.wrong_root"):
        enrol(state, api.line(root_sha256="0" * 64))
    assert api.used == {}
    assert not Folders(state).root.exists()


def test_a_certificate_for_another_key_is_refused(api: DeviceApi, state: Path) -> None:
    api.issue_for_other_key = True
    with pytest.raises(RefusedError, match=r"enrolment\.wrong_certificate"):
        enrol(state, api.line())
    assert not Folders(state).tls_pair.exists()


def test_the_controllers_refusal_keeps_its_own_code(api: DeviceApi, state: Path, tmp_path: Path) -> None:
    enrol(tmp_path / "other", api.line())
    with pytest.raises(RefusedError, match=r"enrolment\.token_refused"):
        enrol(state, api.line())


def test_a_controller_that_cannot_be_reached(api: DeviceApi, state: Path) -> None:
    with pytest.raises(UnavailableError, match=r"controller\.unreachable") as caught:
        enrol(state, api.line(url="https://127.0.0.1:1"))
    assert caught.value.retryable
    assert caught.value.hint


def test_a_line_that_is_none(state: Path) -> None:
    with pytest.raises(InvalidError, match=r"enrolment\.malformed"):
        enrol(state, "hello")


def test_a_damaged_identity_is_told_and_never_taken_for_a_new_board(api: DeviceApi, state: Path) -> None:
    enrol(state, api.line())
    Folders(state).record.write_text("{")
    with pytest.raises(GarrisonError, match=r"identity\.damaged"):
        Identity.load(state)
    with pytest.raises(GarrisonError, match=r"identity\.damaged"):
        enrol(state, api.line())


def test_keys_that_others_can_read_are_refused(api: DeviceApi, state: Path) -> None:
    enrol(state, api.line())
    Folders(state).tls_pair.chmod(0o640)
    with pytest.raises(RefusedError, match=r"key\.readable_by_others"):
        Identity.load(state)
