"""What a board does with desired states that a thief of the broker could send: nothing, and it says so."""

from __future__ import annotations

import sqlite3
import ssl
from collections.abc import Iterator
from functools import partial

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from demo.fleet import Board, Fleet
from demo.processes import wait_for
from demo.steps import FILES
from garrison_controller.devices.keyring import read_passphrase
from garrison_protocol.envelope import seal
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import KIND, Desired
from garrison_protocol.topics import Down, down
from tests.e2e.conftest import GOOD, NEXT, Scene

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def board(scene: Scene) -> Iterator[Board]:
    """A board that has accepted two desired states."""
    board = scene.board("target")
    board.start()
    for version in (GOOD, NEXT):
        assert scene.settle(scene.roll_out(board, version))["status"] == "FINISHED"
    yield board
    board.agent.stop()


def publish(fleet: Fleet, board: Board, payload: bytes) -> None:
    """Publish on the board's desired topic with the controller's own client certificate, the controller being down."""
    pki = fleet.state / "pki"
    context = ssl.create_default_context(cafile=str(pki / "server-ca.pem"))
    context.load_cert_chain(pki / "controller.pem", pki / "controller.key")
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="controller-1", protocol=mqtt.MQTTv5)
    client.tls_set_context(context)
    client.connect("127.0.0.1", fleet.mqtt_port)
    client.loop_start()
    try:
        client.publish(down(board.name, Down.DESIRED), payload, qos=1).wait_for_publish(10)
    finally:
        client.disconnect()
        client.loop_stop()


def stored(fleet: Fleet, board: Board) -> bytes:
    """Return the desired state in force, as the controller signed it."""
    with sqlite3.connect(f"file:{fleet.database}?mode=ro", uri=True) as store:
        (envelope,) = store.execute("SELECT envelope FROM desired_state WHERE device_id = ?", (board.name,)).fetchone()
    return bytes(envelope)


def director(fleet: Fleet) -> SigningKey:
    """Return the controller's director key, as a thief of the controller would hold it."""
    return SigningKey.load(fleet.state / "keys" / "director.key", read_passphrase(fleet.passphrase))


def is_refused(board: Board, code: str) -> bool:
    """Tell whether the board has counted such a refusal."""
    return bool(board.status()["refused"].get(code))


def test_forged_replayed_and_foreign_desired_states_are_refused_and_recorded(scene: Scene, board: Board) -> None:
    fleet = scene.fleet
    before = board.status()["desired"]
    fleet.controller.stop()
    try:
        key, counter = director(fleet), before["counter"]
        empty = Desired(device=board.name, counter=counter + 1, aliases=())
        # The key might be newer than the board's fleet.json: this one is judged when fresh metadata can be had.
        publish(fleet, board, seal(KIND, encode(empty), SigningKey.generate()))
        forgeries = {
            "envelope.malformed": encode(empty),
            "message.misaddressed": seal(KIND, encode(empty.model_copy(update={"device": "someone-else"})), key),
            "desired.counter_not_newer": seal(KIND, encode(empty.model_copy(update={"counter": counter - 1})), key),
            "desired.conflict": seal(KIND, encode(empty.model_copy(update={"counter": counter})), key),
            "message.malformed": seal(KIND, b'{"device":"' + board.name.encode() + b'"}', key),
        }
        for code, payload in forgeries.items():
            publish(fleet, board, payload)
            wait_for(f"refusal {code}", partial(is_refused, board, code), timeout_s=15, log=board.log)
        publish(fleet, board, stored(fleet, board))
    finally:
        fleet.start_controller()
    unknown = "envelope.key_unknown"
    wait_for(f"refusal {unknown}", partial(is_refused, board, unknown), timeout_s=90, log=board.log)
    assert board.status()["desired"] == before
    assert board.alias(FILES)["loaded"]
    with sqlite3.connect(f"file:{board.database}?mode=ro", uri=True) as store:
        headers = [row[0] for row in store.execute("SELECT header FROM entry WHERE stream = 'audit'")]
    for code in (*forgeries, unknown):
        assert any(code in header for header in headers), f"{code} is not in the board's audit"
