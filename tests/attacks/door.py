"""A controller behind TLS and a broker with its PKI, as boards and strangers meet them: from outside."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel

from demo.processes import free_port
from garrison_controller.access import queries as access
from garrison_controller.cli.app import main
from garrison_controller.cli.client import ApiClient
from garrison_controller.devices import pki
from garrison_controller.devices.ca import Authority, private_pem
from garrison_protocol.messages.enrolment import parse_enrolment
from tests.attacks.standing import controller_tables
from tests.fakes.broker import MosquittoBroker
from tests.integration.controllers import DEADLINE_S, Served, served_controller
from tests.unit.devices.boards import Board

CONNACK_ACCEPTED = b"\x20\x02\x00\x00"
PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"
EVIDENCE = ("admin_event",)


class Door:
    """``operator`` may admit, replace and revoke boards of the whole fleet."""

    def __init__(self, folder: Path, served: Served, operator: ApiClient) -> None:
        self.folder, self.served, self.operator = folder, served, operator
        self.config = served.controller.config
        self.broker_port = free_port()

    @contextmanager
    def broker(self) -> Iterator[MosquittoBroker]:
        """Run Mosquitto with exactly what ``garrison broker config mosquitto`` writes for this controller."""
        toml = self.folder / "controller.toml"
        toml.write_text(
            f'state_dir = "{self.config.state_dir}"\npublic_url = "{self.config.public_url}"\n'
            f"[mqtt]\nport = {self.broker_port}\n"
        )
        user = ("--user", "root") if os.geteuid() == 0 else ()
        out = self.folder / "broker"
        status = main(["broker", "config", "mosquitto", "--config", str(toml), "--out", str(out), *user])
        assert status == 0
        with MosquittoBroker(self.folder, out / "mosquitto.conf", port=self.broker_port) as broker:
            yield broker

    def post(self, path: str, body: BaseModel | dict[str, Any]) -> httpx.Response:
        """Call what boards call, without any credential but what stands in the body."""
        document = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
        with self.served.board_http() as http:
            return http.post(path, json=document)

    def get(self, path: str, **parameters: str) -> httpx.Response:
        with self.served.board_http() as http:
            return http.get(path, params=parameters)

    def nonce(self) -> str:
        return str(self.get("/device/v1/nonce").json()["nonce"])

    def token(self, **fields: object) -> str:
        """Return the secret of a new enrolment token."""
        answer = self.operator.post("/api/v1/enrolment/tokens", {"group": "/demo/", **fields})
        return parse_enrolment(answer["enrolment"]).token

    def rotation(self, name: str) -> str:
        return parse_enrolment(self.operator.post(f"/api/v1/devices/{name}/rotate", {})["enrolment"]).token

    def enrol(self, board: Board, token: str) -> str:
        """Admit a board; return its certificate."""
        answer = self.post("/device/v1/enroll", board.enrol_request(token))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["certificate_pem"])

    def admitted(self, name: str) -> tuple[Board, str]:
        board = Board()
        return board, self.enrol(board, self.token(name=name))

    def revoke(self, name: str) -> None:
        self.operator.post(f"/api/v1/devices/{name}/revoke", {"reason": "attack"})

    def standing(self) -> dict[str, list[object]]:
        """Return everything in the controller's database but its evidence."""
        return controller_tables(self.config.state_dir / "controller.db", *EVIDENCE)

    def refused(self) -> list[tuple[str, str, object]]:
        """Return (who, action, code) of every refusal in the record of events."""
        with self.served.controller.database.reading() as session:
            return [
                (event.principal, event.action, event.detail.get("code"))
                for event in access.events(session, limit=1000)
                if event.outcome == "refused"
            ]

    def knock(self, certificate: str | None, key: ec.EllipticCurvePrivateKey, client_id: str) -> ssl.SSLSocket | None:
        """Connect to the broker with MQTT 3.1.1; return the open connection, or None where it was refused."""
        context = ssl.create_default_context(cafile=str(self.config.pki_dir / "server-ca.pem"))
        if certificate is not None:
            pair = self.folder / "pair.pem"
            pair.write_bytes(certificate.encode() + private_pem(key))
            context.load_cert_chain(pair)
        raw = socket.create_connection(("127.0.0.1", self.broker_port), timeout=DEADLINE_S)
        try:
            connection = context.wrap_socket(raw, server_hostname="127.0.0.1")
        except (ssl.SSLError, ConnectionError):
            raw.close()
            return None
        try:
            connection.sendall(connect_packet(client_id))
            if connection.recv(4) == CONNACK_ACCEPTED:
                return connection
        except (ssl.SSLError, ConnectionError):
            pass  # with TLS 1.3 a client hears of its certificate's refusal only now
        connection.close()
        return None

    def refuses(self, certificate: str | None, key: ec.EllipticCurvePrivateKey, client_id: str) -> bool:
        """Tell whether the broker turns this client away."""
        connection = self.knock(certificate, key, client_id)
        if connection is not None:
            connection.close()
        return connection is None


@contextmanager
def open_door(folder: Path) -> Iterator[Door]:
    """Run a controller and give what stands before it."""
    with served_controller(folder) as served, served.principal("dora", "device-admin") as operator:
        yield Door(folder, served, operator)


def device_ca(door: Door) -> Authority:
    """Return the key that an attacker never has; tests make certificates with it that the controller would not."""
    return pki.load_authority(door.config, pki.DEVICE_CA)


def connect_packet(client_id: str) -> bytes:
    """Return an MQTT 3.1.1 CONNECT with a clean session and a keep-alive of a minute."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(name).to_bytes(2, "big") + name
    return bytes([0x10, len(body)]) + body


def alive(connection: ssl.SSLSocket) -> bool:
    """Tell whether the broker still serves a connection."""
    try:
        connection.sendall(PINGREQ)
        return connection.recv(2) == PINGRESP
    except (ssl.SSLError, OSError):
        return False


def now() -> datetime:
    return datetime.now(UTC)
