"""Enrolment without a token, and without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_agent.adapters import enrolment
from garrison_agent.adapters.enrolment import Waiting
from garrison_agent.adapters.offline_enrolment import accept, make_request, read_response
from garrison_agent.identity import Folders, Identity
from garrison_protocol import keys
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, InvalidError, NotFoundError, RefusedError, UnavailableError
from garrison_protocol.messages.enrolment import OfflineRequest, key_fingerprint, proof_bytes
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki


def now() -> datetime:
    return datetime.now(UTC)


enrol = partial(enrolment.enrol, judge_at=now)


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return FleetPki(tmp_path / "pki")


@pytest.fixture
def api(pki: FleetPki) -> Iterator[DeviceApi]:
    with DeviceApi(pki) as api:
        yield api


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_an_invited_board_waits_until_it_is_approved(api: DeviceApi, state: Path) -> None:
    seen: list[Waiting] = []

    def wait(waiting: Waiting) -> None:
        seen.append(waiting)
        if len(seen) == 3:
            (asked,) = api.pending
            api.approved[asked] = "edge-9"

    identity = enrol(state, api.line(""), name="edge-nine", wait=wait)
    assert identity.device == "edge-9"
    fingerprint = key_fingerprint(identity.signing_key.public_hex)
    assert {(one.fingerprint, one.name, one.error) for one in seen} == {(fingerprint, "edge-nine", None)}
    assert enrol(state, api.line("")).device == "edge-9"  # the same line again changes nothing
    with pytest.raises(ConflictError, match=r"enrolment\.already_enrolled"):
        enrol(state, api.line())


def test_who_does_not_wait_comes_back_with_the_same_keys(api: DeviceApi, state: Path) -> None:
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"enrolment\.pending") as caught:
            enrol(state, api.line(""))
    assert caught.value.exit_status == 8
    (asked,) = api.pending  # one key, however often it asks
    assert str(caught.value.fields["fingerprint"]) == key_fingerprint(asked)
    assert key_fingerprint(asked) in caught.value.hint
    api.approved[asked] = "edge-9"
    assert enrol(state, api.line("")).signing_key.public_hex == asked


def test_a_controller_that_goes_away_meanwhile_is_waited_for(api: DeviceApi, state: Path) -> None:
    seen: list[Waiting] = []

    def wait(waiting: Waiting) -> None:
        seen.append(waiting)
        api.close()
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enrol(state, api.line(""), wait=wait)
    assert [one.error is None for one in seen] == [True, False, False]
    assert not Folders(state).record.exists()


def test_a_controller_that_was_never_there_is_not_waited_for(api: DeviceApi, state: Path) -> None:
    with pytest.raises(UnavailableError, match=r"controller\.unreachable"):
        enrol(state, api.line("", url="https://127.0.0.1:1"), wait=lambda _: pytest.fail("nothing was asked yet"))


# --- without a network -----------------------------------------------------------------------------------------------

ROOT = b'{"signed": {"_type": "root"}}'


def respond(pki: FleetPki, request: OfflineRequest, *, device: str = "edge-5", **other: str) -> bytes:
    """Return what an operator carries back, as `garrison device enroll approve --request` writes it."""
    public_key = x509.load_pem_x509_csr(request.csr_pem.encode()).public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    certificate = pki.device_ca.sign(device, public_key)
    body = {
        "format": "garrison-offline-response/v1",
        "device": device,
        "url": "https://controller.example:8443",
        "certificate_pem": certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "mqtt_host": "broker.example",
        "mqtt_port": 8883,
        "root": ROOT.decode(),
        "server_ca_pem": pki.server_ca.pem.read_text(),
        "anchor": "{}",
        **other,
    }
    return json.dumps(body, indent=2).encode()


def test_a_request_proves_its_key_and_stays_the_same(state: Path) -> None:
    request = make_request(state, "edge-5")
    proven = proof_bytes("", request.csr_pem)
    assert keys.verify(request.identity, bytes.fromhex(request.proof), proven)
    assert make_request(state, "edge-5") == request
    renamed = make_request(state, "edge-6")
    assert (renamed.identity, renamed.nonce, renamed.name) == (request.identity, request.nonce, "edge-6")


def test_a_request_cut_off_between_its_files_is_made_again(state: Path) -> None:
    request = make_request(state)
    Folders(state).offline_request.write_bytes(b"{")
    again = make_request(state)
    assert again.identity == request.identity
    assert again.nonce != request.nonce


def test_a_response_enrols_the_board(pki: FleetPki, state: Path) -> None:
    data = respond(pki, make_request(state))
    identity = accept(state, data, sha256_hex(ROOT))
    assert (identity.device, identity.url) == ("edge-5", "https://controller.example:8443")
    assert identity.broker() == ("broker.example", 8883)
    assert identity.folders.root.read_bytes() == ROOT
    identity.mqtt_context(now)
    assert accept(state, data, sha256_hex(ROOT)).device == "edge-5"
    with pytest.raises(ConflictError, match=r"enrolment\.already_enrolled"):
        accept(state, data + b"\n", sha256_hex(ROOT))
    with pytest.raises(ConflictError, match=r"enrolment\.already_enrolled"):
        make_request(state)


class Cut(BaseException):
    """The process ended."""


@pytest.mark.parametrize("offline", [False, True])
def test_cut_off_before_any_rename_it_is_repeated_with_the_same_keys(
    api: DeviceApi, pki: FleetPki, state: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    left = 0

    def cut_at_zero(rename: Callable[[str, str], None], old: str, new: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Cut
        rename(old, new)

    monkeypatch.setattr(os, "rename", partial(cut_at_zero, os.rename))
    monkeypatch.setattr(os, "replace", partial(cut_at_zero, os.replace))
    publics: set[str] = set()
    for renames in range(20):
        left = renames
        try:
            if offline:
                request = make_request(state)
                publics.add(request.identity)
                identity = accept(state, respond(pki, request), sha256_hex(ROOT))
            else:
                identity = enrol(state, api.line())
        except Cut:
            with pytest.raises(NotFoundError, match=r"identity\.not_enrolled"):
                Identity.load(state)
            continue
        break
    assert renames > 4
    assert identity.device == ("edge-5" if offline else "edge-1")
    assert publics <= {identity.signing_key.public_hex}
    identity.mqtt_context(now)
    assert not identity.folders.tls_key.exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"root": '{"another": 1}'}, "enrolment.wrong_root"),
        ({"server_ca_pem": "nonsense"}, "enrolment.wrong_server_ca"),
        ({"certificate_pem": "nonsense"}, "enrolment.wrong_certificate"),
        ({"device": "edge-6"}, ""),
    ],
)
def test_a_response_that_does_not_fit_changes_no_identity(
    pki: FleetPki, state: Path, change: dict[str, str], code: str
) -> None:
    request = make_request(state)
    if not code:
        data = json.dumps(json.loads(respond(pki, request)) | change).encode()
        code = "enrolment.wrong_certificate"
    else:
        data = respond(pki, request, **change)
    with pytest.raises(RefusedError) as caught:
        accept(state, data, sha256_hex(ROOT))
    assert caught.value.code == code
    assert not Folders(state).record.exists()
    assert accept(state, respond(pki, request), sha256_hex(ROOT)).device == "edge-5"


def test_a_board_that_asked_for_nothing_takes_nothing(pki: FleetPki, state: Path, tmp_path: Path) -> None:
    data = respond(pki, make_request(tmp_path / "other"))
    with pytest.raises(NotFoundError, match=r"enrolment\.no_request"):
        accept(state, data, sha256_hex(ROOT))
    assert not state.exists()


def test_what_is_no_response(state: Path) -> None:
    with pytest.raises(InvalidError, match=r"enrolment\.response_malformed"):
        read_response(b"hello")
