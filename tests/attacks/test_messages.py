"""Attacks with messages to the controller: forged, misdirected, replayed, and built to exhaust it."""

from __future__ import annotations

import base64
import contextlib
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from garrison_protocol import envelope, topics
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages import desired as desired_state
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.states import DeploymentState, Stream
from garrison_protocol.topics import Up
from tests.attacks import standing
from tests.attacks.target import Target
from tests.unit.loop.rig import DEVICE, DIRECTOR
from tests.unit.rollouts.fleet import FakeBoard, Fleet

PEAK_BYTES = 64 * 1024 * 1024
"""Far below what any of these messages would become, above what one honest message of the largest size takes."""


def tables(fleet: Fleet, *without: str) -> dict[str, list[object]]:
    return standing.controller_tables(Path(fleet.database.url.removeprefix("sqlite:///")), *without)


@contextlib.contextmanager
def refusing(fleet: Fleet, code: str, sender: str = "edge-1", *, times: int = 1) -> Iterator[None]:
    """Assert that the controller refuses so, counts it under its sender, answers nothing, and keeps nothing."""
    before = tables(fleet)
    yield
    assert fleet.refusals() == {(sender, code): times}
    assert tables(fleet) == before


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Assert that the block never holds more than ``PEAK_BYTES``."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


def signed(payload_type: str, payload: bytes, key: SigningKey) -> bytes:
    """Return an envelope over any type and payload: what a thief of ``key`` can make."""
    signature = key.sign(envelope.pae(payload_type, payload))
    outer = {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(outer).encode()


def bomb(kind: str, key: SigningKey) -> bytes:
    """Return a validly signed message of about 300 KiB that would become 300 MB."""
    return signed(f"{envelope.TYPE_PREFIX}{kind}+json+zlib", zlib.compress(bytes(300_000_000), 9), key)


# --- forged and misdirected ------------------------------------------------------------------------------------------


def test_a_board_that_speaks_as_another(fleet: Fleet) -> None:
    """Impersonation: board B signs, with its own key, a status that names board A, on A's topic."""
    first, second = fleet.boards["edge-1"], fleet.boards["edge-2"]
    with refusing(fleet, "envelope.key_unknown"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), second.seal("status", first.status()))


def test_a_board_that_claims_anothers_key_id(fleet: Fleet) -> None:
    """Impersonation: board B signs with its own key, but writes A's key id beside the signature."""
    first, second = fleet.boards["edge-1"], fleet.boards["edge-2"]
    outer = json.loads(second.seal("status", first.status()))
    outer["signatures"][0]["keyid"] = first.key.key_id
    with refusing(fleet, "envelope.bad_signature"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), json.dumps(outer).encode())


def test_a_message_on_anothers_topic(fleet: Fleet) -> None:
    """Misdirection: the broker moves a genuine status of board B to the topic of board A."""
    with refusing(fleet, "envelope.key_unknown"):
        second = fleet.boards["edge-2"]
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), second.seal("status", second.status()))


def test_a_message_about_another_board(fleet: Fleet) -> None:
    """Misdirection: board A signs a status that names board B, on its own topic."""
    with refusing(fleet, "message.misaddressed"):
        first, second = fleet.boards["edge-1"], fleet.boards["edge-2"]
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), first.seal("status", second.status()))


def test_a_message_of_a_stranger(fleet: Fleet) -> None:
    """Stranger: whoever has a client certificate, but was never enrolled, sends a status."""
    stranger = FakeBoard("edge-9")
    with refusing(fleet, "device.unknown", ""):
        fleet.send(stranger, Up.STATUS, stranger.status())


def test_a_message_with_changed_content(fleet: Fleet) -> None:
    """Tampering: the broker changes one digit inside a signed message."""
    board = fleet.boards["edge-1"]
    outer = json.loads(board.seal("status", board.status()))
    payload = base64.b64decode(outer["payload"]).replace(b'"connection":1', b'"connection":9')
    outer["payload"] = base64.b64encode(payload).decode()
    with refusing(fleet, "envelope.bad_signature"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), json.dumps(outer).encode())


def test_a_message_relabelled_as_another_kind(fleet: Fleet) -> None:
    """Kind confusion: the broker moves a genuine message to another topic of the same board."""
    board = fleet.boards["edge-1"]
    with refusing(fleet, "message.misplaced"):
        fleet.ingest.handle(topics.up("edge-1", Up.REPORT), board.seal("status", board.status()))


def test_a_message_whose_type_was_changed(fleet: Fleet) -> None:
    """Kind confusion: the broker changes the type that is written beside the payload."""
    board = fleet.boards["edge-1"]
    outer = json.loads(board.seal("status", board.status()))
    outer["payloadType"] = outer["payloadType"].replace("status", "report")
    with refusing(fleet, "envelope.bad_signature"):
        fleet.ingest.handle(topics.up("edge-1", Up.REPORT), json.dumps(outer).encode())


def test_a_message_without_a_signature(fleet: Fleet) -> None:
    """Stripping: the signature is taken away."""
    board = fleet.boards["edge-1"]
    outer = json.loads(board.seal("status", board.status()))
    with refusing(fleet, "envelope.key_unknown"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), json.dumps({**outer, "signatures": []}).encode())


def test_the_controllers_own_messages_reflected(fleet: Fleet) -> None:
    """Reflection: the broker sends the controller's desired state and receipts back to it as a board's messages."""
    desired = encode(Desired(device="edge-1", counter=1, aliases=()))
    receipt = encode(Receipt(device="edge-1", stream=Stream.AUDIT, epoch="0" * 16, up_to=0))
    with refusing(fleet, "envelope.key_unknown", times=2):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), envelope.seal(desired_state.KIND, desired, fleet.director))
        fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), envelope.seal("receipt", receipt, fleet.receipt_key))


# --- replayed --------------------------------------------------------------------------------------------------------


def test_replay_of_audit_rows_within_an_epoch(fleet: Fleet) -> None:
    """Replay: genuine audit rows are sent a hundred times."""
    board = fleet.boards["edge-1"]
    for _ in range(3):
        board.record()
    message = board.seal("audit", board.batch())
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), message)
    before = tables(fleet, "device", "stream_state")  # when a board was heard of, and how many rows came twice
    for _ in range(100):
        receipt = fleet.receipt(fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), message))
        assert receipt.up_to == 3
    assert tables(fleet, "device", "stream_state") == before
    assert not fleet.refusals()
    assert not fleet.alarms()


def test_replay_of_audit_rows_of_an_earlier_epoch(fleet: Fleet) -> None:
    """Replay across epochs: rows from before a board lost its store are sent after it began anew."""
    board = fleet.boards["edge-1"]
    board.record()
    old = board.seal("audit", board.batch())
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), old)
    board.epoch, board.entries = "00000000000000bb", []
    board.record()
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", board.batch()))
    alarms, before = fleet.alarms(), tables(fleet, "device", "stream_state")
    receipt = fleet.receipt(fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), old))
    assert (receipt.epoch, receipt.up_to) == ("00000000000000aa", 1)
    assert (tables(fleet, "device", "stream_state"), fleet.alarms()) == (before, alarms)


def test_rows_of_one_epoch_passed_off_as_anothers(fleet: Fleet) -> None:
    """Replay across epochs: a stolen identity key signs old rows again under a new epoch."""
    board = fleet.boards["edge-1"]
    board.record()
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", board.batch()))
    rows = tables(fleet)["stream_row"]
    forged = board.batch().model_copy(update={"epoch": "00000000000000bb"})
    receipt = fleet.receipt(fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", forged)))
    assert (receipt.epoch, receipt.up_to, receipt.hash) == ("00000000000000bb", 0, None)
    assert "stream.broken" in fleet.alarms()
    assert tables(fleet)["stream_row"] == rows


def test_two_histories_under_one_number(fleet: Fleet) -> None:
    """Rewriting history: a stolen identity key signs another audit row under a number that is taken."""
    board = fleet.boards["edge-1"]
    board.record(alias="chat")
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", board.batch()))
    rows = tables(fleet)["stream_row"]
    board.entries.clear()
    board.record(alias="other")
    fleet.ingest.handle(topics.up("edge-1", Up.AUDIT), board.seal("audit", board.batch()))
    assert fleet.alarms() == ["stream.fork"]
    assert tables(fleet)["stream_row"] == rows


def test_replay_of_an_old_death(fleet: Fleet) -> None:
    """Replay: the Last Will of an earlier connection is sent again, so that a board looks dead."""
    board = fleet.boards["edge-1"]
    death = board.seal("status", board.status(online=False))
    board.connection = 2
    fleet.send(board, Up.STATUS, board.status())
    before = tables(fleet)
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), death)
    assert tables(fleet) == before


def test_replay_of_an_old_report(fleet: Fleet) -> None:
    """Replay: a report of an earlier success is sent again for a rollout that has gone on."""
    rollout = fleet.begin()
    fleet.tick()
    board = fleet.boards["edge-1"]
    fleet.report("edge-1", rollout, DeploymentState.DOWNLOADING, 3, revision=5)
    states = fleet.states(rollout)
    board.revision = 4
    fleet.report("edge-1", rollout, DeploymentState.ACTIVE, 9, revision=4)
    assert fleet.states(rollout) == states


# --- built to exhaust ------------------------------------------------------------------------------------------------


def test_a_compression_bomb_for_the_controller(fleet: Fleet) -> None:
    """Compression bomb: an enrolled board signs 300 KiB that decompress to 300 MB."""
    message = bomb("status", fleet.boards["edge-1"].key)
    with refusing(fleet, "envelope.too_large"), bounded_memory():
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), message)


def test_a_compression_bomb_for_a_board(board: Target) -> None:
    """Compression bomb: a stolen director key signs 300 KiB that decompress to 300 MB."""
    message = bomb(desired_state.KIND, DIRECTOR)
    with board.refusing_message("envelope.too_large"), bounded_memory():
        board.receive(topics.down(DEVICE, topics.Down.DESIRED), message)
        board.settle()


def test_a_compression_bomb_by_a_stranger_is_not_even_opened(fleet: Fleet) -> None:
    """Compression bomb: without a trusted key, nothing is decompressed at all."""
    message = bomb("status", SigningKey.generate())
    with refusing(fleet, "envelope.key_unknown"), bounded_memory():
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), message)


@pytest.mark.parametrize("outside", [True, False], ids=["envelope", "body"])
def test_deeply_nested_json_for_the_controller(fleet: Fleet, outside: bool) -> None:
    """Deeply nested JSON: a hundred thousand brackets, as the envelope or, signed by a board, as its body."""
    nested = b"[" * 100_000
    message = nested if outside else envelope.seal("status", nested, fleet.boards["edge-1"].key)
    with refusing(fleet, "envelope.malformed" if outside else "message.malformed"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), message)


@pytest.mark.parametrize("outside", [True, False], ids=["envelope", "body"])
def test_deeply_nested_json_for_a_board(board: Target, outside: bool) -> None:
    """Deeply nested JSON: a hundred thousand brackets, as the envelope or, signed by a stolen key, as desired state."""
    nested = b'{"a":' * 100_000
    message = nested if outside else envelope.seal(desired_state.KIND, nested, DIRECTOR)
    with board.refusing_message("envelope.malformed" if outside else "message.malformed"):
        board.receive(topics.down(DEVICE, topics.Down.DESIRED), message)


def test_an_envelope_with_thousands_of_signatures(fleet: Fleet) -> None:
    """Exhaustion: an envelope carries thousands of signatures, each to be verified; even a good one comes too late."""
    board = fleet.boards["edge-1"]
    outer = json.loads(board.seal("status", board.status()))
    good = outer["signatures"]
    bad = [{"keyid": board.key.key_id, "sig": base64.b64encode(bytes(64)).decode()}]
    outer["signatures"] = bad * 2_800 + good
    with refusing(fleet, "envelope.bad_signature"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), json.dumps(outer).encode())


def test_a_message_above_the_size_limit(fleet: Fleet) -> None:
    """Exhaustion: an envelope larger than any board may send."""
    with refusing(fleet, "envelope.too_large"):
        fleet.ingest.handle(topics.up("edge-1", Up.STATUS), b"x" * (envelope.MAX_ENVELOPE_BYTES + 1))


@pytest.mark.parametrize("number", ["1e400", "1" * 5000, "NaN", "-1", "18446744073709551616"])
def test_numbers_that_no_store_can_hold(fleet: Fleet, number: str) -> None:
    """Number games: a board signs counters that are infinite, negative, or larger than any database takes."""
    board = fleet.boards["edge-1"]
    body = f'{{"device": "edge-1", "connection": {number}, "online": true}}'.encode()
    before = tables(fleet)
    fleet.ingest.handle(topics.up("edge-1", Up.STATUS), envelope.seal("status", body, board.key))
    ((refused, times),) = fleet.refusals().items()
    assert (refused[0], times) == ("edge-1", 1)
    assert refused[1] in {"message.malformed", "message.out_of_range"}
    assert tables(fleet) == before
