from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from garrison_agent.adapters import enrolment
from garrison_agent.adapters.carried_renewal import CarriedRenewal
from garrison_agent.adapters.certificates import checked_pair, new_key, request_pem
from garrison_agent.identity import Identity, save_pair
from garrison_controller.config import ControllerConfig
from garrison_controller.devices import pki
from garrison_controller.devices.ca import Authority
from garrison_protocol import keys
from garrison_protocol.errors import InsufficientError, RefusedError, UnavailableError
from garrison_protocol.messages.enrolment import RenewResponse, renewal_bytes
from tests.fakes.device_api import DeviceApi
from tests.fakes.pki import FleetPki

NOW = datetime.now(UTC)


@pytest.fixture
def identity(tmp_path: Path) -> Iterator[Identity]:
    with DeviceApi(FleetPki(tmp_path / "pki")) as api:
        yield enrolment.enrol(tmp_path / "state", api.line(), judge_at=lambda: NOW)


def authority(folder: Path) -> tuple[Authority, str]:
    config = ControllerConfig(state_dir=folder, public_url="https://127.0.0.1:8443")
    pki.initialise(config, NOW)
    return pki.load_authority(config, pki.DEVICE_CA), (config.pki_dir / f"{pki.DEVICE_CA}.pem").read_text()


def answer(ca: Authority, identity: Identity, csr_pem: str, days: int = 30) -> RenewResponse:
    issued = ca.issue_device(identity.device, csr_pem, days, NOW)
    return RenewResponse(certificate_pem=issued.pem, mqtt_host="elsewhere.example", mqtt_port=1)


def test_the_same_key_asks_until_it_is_answered(identity: Identity, tmp_path: Path) -> None:
    renewal = CarriedRenewal(identity)
    first, second = renewal.request(7), CarriedRenewal(identity).request(8)
    assert first.csr_pem == second.csr_pem
    assert (first.nonce, second.nonce) == ("stick:7", "stick:8")
    signed = renewal_bytes(identity.device, second.nonce, second.csr_pem)
    assert keys.verify(identity.signing_key.public_hex, bytes.fromhex(second.proof), signed)
    key = identity.folders.identity / "carried.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    ca, ca_pem = authority(tmp_path / "controller")
    before, broker = identity.folders.tls_pair.read_bytes(), identity.broker()
    assert renewal.answered(answer(ca, identity, first.csr_pem), ca_pem, NOW)
    assert identity.folders.tls_pair.read_bytes() != before
    assert identity.broker() == broker  # a stick does not say where the broker is
    assert not key.exists()
    assert renewal.request(9).csr_pem != first.csr_pem


def test_a_certificate_by_somebody_else_is_refused_and_the_key_waits_on(identity: Identity, tmp_path: Path) -> None:
    renewal = CarriedRenewal(identity)
    csr_pem = renewal.request(7).csr_pem
    _, ca_pem = authority(tmp_path / "controller")
    foreign, _ = authority(tmp_path / "foreign")
    before = identity.folders.tls_pair.read_bytes()
    with pytest.raises(RefusedError) as refused:
        renewal.answered(answer(foreign, identity, csr_pem), ca_pem, NOW)
    assert refused.value.code == "renewal.wrong_certificate"
    assert identity.folders.tls_pair.read_bytes() == before
    assert renewal.request(8).csr_pem == csr_pem


def test_a_certificate_that_ended_on_the_way_makes_room_for_another(identity: Identity, tmp_path: Path) -> None:
    renewal = CarriedRenewal(identity)
    csr_pem = renewal.request(7).csr_pem
    ca, ca_pem = authority(tmp_path / "controller")
    before = identity.folders.tls_pair.read_bytes()
    assert not renewal.answered(answer(ca, identity, csr_pem), ca_pem, NOW + timedelta(days=40))
    assert identity.folders.tls_pair.read_bytes() == before
    assert renewal.request(8).csr_pem != csr_pem


def test_an_old_stick_does_not_bring_back_a_certificate_that_ends_sooner(identity: Identity, tmp_path: Path) -> None:
    renewal = CarriedRenewal(identity)
    ca, ca_pem = authority(tmp_path / "controller")
    old = answer(ca, identity, renewal.request(7).csr_pem, days=5)
    key_pem = new_key()  # meanwhile the board was renewed over the network
    issued = ca.issue_device(identity.device, request_pem(key_pem), 30, NOW)
    save_pair(identity.state_dir, checked_pair(issued.pem, key_pem, identity.device))
    before = identity.folders.tls_pair.read_bytes()
    assert not renewal.answered(old, ca_pem, NOW)
    assert identity.folders.tls_pair.read_bytes() == before
    assert not (identity.folders.identity / "carried.key").exists()


def test_an_answer_that_nobody_waits_for(identity: Identity, tmp_path: Path) -> None:
    ca, ca_pem = authority(tmp_path / "controller")
    other = CarriedRenewal(identity)
    csr_pem = other.request(1).csr_pem
    given = answer(ca, identity, csr_pem)
    assert other.answered(given, ca_pem, NOW)
    assert not other.answered(given, ca_pem, NOW)


def test_a_request_that_a_full_disk_cut_off_is_made_anew(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, list[int]()

    def full_at_the_request(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:  # the key, its folder, and now the request
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_request)
    with pytest.raises(InsufficientError, match=r"disk\.full"):
        CarriedRenewal(identity).request(1)
    monkeypatch.undo()
    assert not (identity.folders.identity / "carried.csr").exists()
    asked = CarriedRenewal(identity).request(2)
    assert x509.load_pem_x509_csr(asked.csr_pem.encode()).is_signature_valid


def test_a_key_that_cannot_be_read_is_an_error_not_a_crash(identity: Identity, tmp_path: Path) -> None:
    (identity.folders.identity / "carried.key").mkdir()
    ca, ca_pem = authority(tmp_path / "controller")
    csr_pem = request_pem(new_key())
    with pytest.raises(UnavailableError, match=r"disk\.failed"):
        CarriedRenewal(identity).answered(answer(ca, identity, csr_pem), ca_pem, NOW)
