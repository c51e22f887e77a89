"""What a fetch can bring besides files: an anchor, a nonce, and with it a certificate."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from garrison_controller.access.tables import AdminEvent
from garrison_controller.bus.answers import BoardAnswers
from garrison_controller.config import ControllerConfig, MqttConfig
from garrison_controller.devices.ca import Authority
from garrison_controller.devices.sessions import Sessions
from garrison_controller.devices.tables import Device
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.store import RegistryStore
from garrison_protocol.envelope import unseal
from garrison_protocol.errors import GarrisonError
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.anchor import Anchor
from garrison_protocol.messages.base import parse_message
from garrison_protocol.messages.enrolment import NonceResponse, RenewRequest, RenewResponse
from garrison_protocol.messages.fetch import Fetch, FetchKind
from tests.unit.devices.boards import Board
from tests.unit.rollouts.fleet import Fleet

NONCE = "ab" * 16


class Rig:
    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.board, self.director = fleet, Board(), SigningKey.generate()
        self.device = next(iter(fleet.boards))
        with fleet.database.session() as session:
            device = session.get_one(Device, self.device)
            device.identity_public = self.board.identity.public_hex
            device.cert_not_after = datetime.now(UTC)
        config = ControllerConfig(
            state_dir=folder, public_url="https://127.0.0.1:1", mqtt=MqttConfig(public_host="broker", public_port=8883)
        )
        self.answers = BoardAnswers(
            config,
            fleet.database,
            store=RegistryStore(config.metadata_dir),
            blobs=BlobFolder(config.blobs_dir),
            sessions=Sessions(time.time),
            device_ca=Authority.create("Garrison device CA", datetime.now(UTC)),
            director=self.director,
            now=lambda: datetime.now(UTC),
        )

    def ask(self, kind: FetchKind, *, name: str = "", body: str = "") -> bytes:
        fetch = Fetch(device=self.device, request="0" * 16, kind=kind, name=name, body=body)
        return self.answers.document(fetch)

    def renewal(self, device: str | None = None) -> RenewRequest:
        nonce = NonceResponse.model_validate_json(self.ask(FetchKind.NONCE)).nonce
        return self.board.renew_request(device or self.device, nonce)


@pytest.fixture
def rig(fleet: Fleet, tmp_path: Path) -> Rig:
    return Rig(fleet, tmp_path / "state")


def test_an_anchor_is_signed_for_this_board_and_this_nonce(rig: Rig) -> None:
    opened = unseal(rig.ask(FetchKind.ANCHOR, name=NONCE), {rig.director.key_id: rig.director.public_hex}.get)
    anchor = parse_message(Anchor, opened.body, device=rig.device)
    assert anchor.nonce == NONCE


def test_a_nonce_buys_one_certificate(rig: Rig) -> None:
    body = rig.renewal().model_dump_json()
    answer = RenewResponse.model_validate_json(rig.ask(FetchKind.CERTIFICATE, body=body))
    assert answer.certificate_pem.startswith("-----BEGIN CERTIFICATE-----")
    assert (answer.mqtt_host, answer.mqtt_port) == ("broker", 8883)
    assert refused(rig, FetchKind.CERTIFICATE, body=body) == "session.nonce_invalid"


def test_what_is_malformed_or_for_another_board_is_refused(rig: Rig) -> None:
    assert refused(rig, FetchKind.ANCHOR, name="AB" * 16) == "fetch.malformed"
    assert refused(rig, FetchKind.CERTIFICATE, body="{}") == "fetch.malformed"
    other = next(device for device in rig.fleet.boards if device != rig.device)
    body = rig.renewal(other).model_dump_json()
    assert refused(rig, FetchKind.CERTIFICATE, body=body) == "message.misaddressed"


def test_a_refused_renewal_is_recorded(rig: Rig) -> None:
    with rig.fleet.database.session() as session:
        session.get_one(Device, rig.device).cert_not_after = datetime(2020, 1, 1, tzinfo=UTC)
    body = rig.renewal().model_dump_json()
    assert refused(rig, FetchKind.CERTIFICATE, body=body) == "renewal.grace_over"
    with rig.fleet.database.reading() as session:
        renewals = session.scalars(select(AdminEvent).where(AdminEvent.action == "device.renew"))
        assert [event.detail["code"] for event in renewals] == ["renewal.grace_over"]


def refused(rig: Rig, kind: FetchKind, **what: str) -> str:
    with pytest.raises(GarrisonError) as caught:
        rig.ask(kind, **what)
    return caught.value.code
