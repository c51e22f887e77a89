"""The controller's ``/device/v1`` endpoints over real TLS, small enough to read and to break on purpose."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import PROTOCOL_TLS_SERVER, SSLContext

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_protocol import keys
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.messages.enrolment import (
    EnrolmentString,
    EnrolRequest,
    RenewRequest,
    SessionRequest,
    key_fingerprint,
    proof_bytes,
    renewal_bytes,
    session_bytes,
)
from tests.fakes.pki import FleetPki, Issued


class DeviceApi:
    """Enrols boards, renews their certificates, serves ``blobs`` to sessions; ``requests`` is what came, in order."""

    def __init__(self, pki: FleetPki, *, server: Issued | None = None) -> None:
        """``server`` is what it shows in TLS instead of the fleet's own server certificate."""
        self.pki = pki
        server = server or pki.server
        self.root = b'{"signed": {"_type": "root"}}'
        self.server_ca = pki.server_ca.pem.read_bytes()
        self.tokens = {"a-one-time-token-1": "edge-1", "a-one-time-token-2": "edge-2"}
        self.used: dict[str, str] = {}
        self.identities: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.sessions: set[str] = set()
        self.issue_for_other_key = False
        self.issue_for: str | None = None
        """Certify this board instead of the one that asked."""
        self.cut_after_enrolment = False
        self.days = 30.0
        self.broker = ("127.0.0.1", 8883)
        self.approved: dict[str, str] = {}
        """Boards that came without a token, by identity key, and what they are called."""
        self.pending: dict[str, EnrolRequest] = {}
        self.refusal: tuple[int, str] | None = None
        """Status and code for every renewal."""
        self.requests: list[str] = []
        self._nonces: set[str] = set()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.requests.append(f"GET {self.path}")
                api._get(self)

            def do_POST(self) -> None:
                api.requests.append(f"POST {self.path}")
                api._post(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = SSLContext(PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.cert, server.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> DeviceApi:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; again, it does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def line(self, token: str = "a-one-time-token-1", **other: str) -> str:
        """Return an enrolment string for ``token``; ``other`` replaces what it pins."""
        pins = {
            "root_sha256": sha256_hex(self.root),
            "server_ca_sha256": sha256_hex(self.pki.server_ca.pem.read_bytes()),
        }
        return EnrolmentString.model_validate({"url": self.url, "token": token, **pins, **other}).encode()

    def _get(self, request: BaseHTTPRequestHandler) -> None:
        match request.path.removeprefix("/device/v1/").split("/"):
            case ["server-ca.pem"]:
                _answer(request, 200, self.server_ca)
            case ["metadata", "1.root.json"]:
                _answer(request, 200, self.root)
            case ["nonce"]:
                nonce = f"nonce-{self.requests.count(f'GET {request.path}')}"
                self._nonces.add(nonce)
                _answer(request, 200, json.dumps({"nonce": nonce, "time": 0}).encode())
            case ["blobs", digest] if digest in self.blobs:
                if request.headers.get("Authorization", "").removeprefix("Bearer ") in self.sessions:
                    _answer(request, 200, self.blobs[digest])
                else:
                    _refuse(request, 401, "access.no_session")
            case _:
                _answer(request, 404, b"<html>no such page</html>")

    def _post(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        if request.path == "/device/v1/enroll":
            self._enrol(request, EnrolRequest.model_validate_json(body))
        elif request.path == "/device/v1/certificate":
            self._renew(request, RenewRequest.model_validate_json(body))
        else:
            asked = SessionRequest.model_validate_json(body)
            public, signed = self.identities.get(asked.device, ""), session_bytes(asked.device, asked.nonce)
            if asked.nonce not in self._nonces or not keys.verify(public, bytes.fromhex(asked.proof), signed):
                _refuse(request, 403, "device.bad_proof")
                return
            token = f"session-{len(self.sessions)}-{asked.nonce}"
            self.sessions.add(token)
            _answer(request, 200, json.dumps({"token": token, "expires_in": 900}).encode())

    def _enrol(self, request: BaseHTTPRequestHandler, asked: EnrolRequest) -> None:
        if not asked.token and asked.identity not in self.approved:
            self.pending[asked.identity] = asked
            waiting = {"fingerprint": key_fingerprint(asked.identity), "name": asked.name}
            _answer(request, 202, json.dumps(waiting).encode())
            return
        device = self.tokens.get(asked.token) if asked.token else self.approved[asked.identity]
        proof = proof_bytes(asked.token, asked.csr_pem)
        if device is None or (asked.token and self.used.get(asked.token, asked.identity) != asked.identity):
            _refuse(request, 403, "enrolment.token_refused")
            return
        if not keys.verify(asked.identity, bytes.fromhex(asked.proof), proof):
            _refuse(request, 403, "enrolment.bad_proof")
            return
        self.used[asked.token] = self.identities[device] = asked.identity
        if self.cut_after_enrolment:
            self.cut_after_enrolment = False
            request.close_connection = True
            return
        pem = self._certify(device, asked.csr_pem)
        answer = {"device": device, "certificate_pem": pem, "mqtt_host": self.broker[0], "mqtt_port": self.broker[1]}
        _answer(request, 200, json.dumps(answer).encode())

    def _renew(self, request: BaseHTTPRequestHandler, asked: RenewRequest) -> None:
        signed = renewal_bytes(asked.device, asked.nonce, asked.csr_pem)
        if self.refusal is not None:
            _refuse(request, *self.refusal)
        elif asked.nonce not in self._nonces or not keys.verify(
            self.identities.get(asked.device, ""), bytes.fromhex(asked.proof), signed
        ):
            _refuse(request, 403, "session.bad_proof")
        else:
            self._nonces.remove(asked.nonce)
            pem = self._certify(asked.device, asked.csr_pem)
            answer = {"certificate_pem": pem, "mqtt_host": self.broker[0], "mqtt_port": self.broker[1]}
            _answer(request, 200, json.dumps(answer).encode())

    def _certify(self, device: str, csr_pem: str) -> str:
        public_key = x509.load_pem_x509_csr(csr_pem.encode()).public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        if self.issue_for_other_key:
            public_key = ec.generate_private_key(ec.SECP256R1()).public_key()
        certificate = self.pki.device_ca.sign(self.issue_for or device, public_key, days=self.days)
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _answer(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    error = {"code": code, "message": "the fake controller says no", "hint": "", "retryable": False, "fields": {}}
    _answer(request, status, json.dumps(error).encode())
