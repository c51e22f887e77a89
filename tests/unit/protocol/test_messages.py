import json
from datetime import UTC, datetime

import pytest

from garrison_protocol.errors import InvalidError
from garrison_protocol.fleet import Fleet, FleetKey
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode, parse_message
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.enrolment import EnrolmentString, parse_enrolment
from garrison_protocol.messages.report import Status
from garrison_protocol.messages.streams import MAX_ROWS, Batch, Row
from garrison_protocol.states import KeyPurpose, Stream


def test_a_message_comes_back_as_it_was() -> None:
    status = Status(device="edge-1", connection=3, online=True, sent_at=5)
    assert parse_message(Status, encode(status), device="edge-1") == status


def test_a_message_on_another_boards_topic_is_refused() -> None:
    body = encode(Status(device="edge-1", connection=1, online=True))
    with pytest.raises(InvalidError) as caught:
        parse_message(Status, body, device="edge-2")
    assert caught.value.code == "message.misaddressed"


def test_unknown_fields_and_minor_versions_are_tolerated() -> None:
    body = json.dumps({"v": "1.9", "device": "edge-1", "connection": 1, "online": True, "mood": "good"}).encode()
    assert parse_message(Status, body, device="edge-1").online


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        b'{"v":"2.0","device":"edge-1","connection":1,"online":true}',
        b'{"device":"Edge","connection":1,"online":true}',
        b'{"device":"edge-1","connection":-1,"online":true}',
    ],
)
def test_malformed_messages_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidError) as caught:
        parse_message(Status, body, device="edge-1")
    assert caught.value.code == "message.malformed"


def test_a_batch_is_bounded() -> None:
    rows = [Row(header="{}")] * (MAX_ROWS + 1)
    body = json.dumps(
        {
            "device": "edge-1",
            "stream": "audit",
            "epoch": "0" * 16,
            "first": 1,
            "rows": [row.model_dump() for row in rows],
        }
    ).encode()
    with pytest.raises(InvalidError):
        parse_message(Batch, body, device="edge-1")
    assert Batch(device="edge-1", stream=Stream.AUDIT, epoch="0" * 16, first=1, rows=tuple(rows[:1])).first == 1


def test_a_desired_state_needs_a_counter() -> None:
    with pytest.raises(InvalidError):
        parse_message(Desired, b'{"device":"edge-1","counter":0,"aliases":[]}', device="edge-1")


def test_enrolment_strings_survive_copying() -> None:
    one = EnrolmentString(url="https://10.0.0.1:8443", token="t" * 43, root_sha256="a" * 64, server_ca_sha256="b" * 64)
    assert parse_enrolment(f"  {one.encode()}\n") == one


@pytest.mark.parametrize("text", ["", "garrison-enroll:", "garrison-enroll:e30", "x", "garrison-enroll:\u00fc"])
def test_other_texts_are_no_enrolment(text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        parse_enrolment(text)
    assert caught.value.code == "enrolment.malformed"


def test_a_fleet_key_serves_its_purpose_in_its_time_only() -> None:
    key = SigningKey.generate()
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    fleet = Fleet(
        name="f",
        keys=(FleetKey(purpose=KeyPurpose.DIRECTOR, public=key.public_hex, not_before=start, not_after=end),),
        device_ca="",
        server_ca="",
        floors={"tiny": "1.2"},
    )
    during = datetime(2026, 6, 1, tzinfo=UTC)
    assert fleet.public_key(KeyPurpose.DIRECTOR, key.key_id, during) == key.public_hex
    assert fleet.public_key(KeyPurpose.RECEIPT, key.key_id, during) is None
    assert fleet.public_key(KeyPurpose.DIRECTOR, key.key_id, datetime(2028, 1, 1, tzinfo=UTC)) is None
    assert fleet.below_floor("tiny", "1.1.9")
    assert not fleet.below_floor("tiny", "1.2.0")
    assert not fleet.below_floor("other", "0")
