"""A real HTTPS server of the controller's registry endpoints, with Range, from the standard library."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.fakes.memory_source import RegistryContent

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


class RegistryServer:
    """Serves ``content`` on loopback. The public fields are what it did and what it should do."""

    def __init__(self, content: RegistryContent, folder: Path, *, valid_from: datetime, valid_to: datetime) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.content = content
        self.ca_path = folder / "server-ca.pem"
        self.requests: list[tuple[str, str | None]] = []
        """(path, Range header) of every request."""
        self.authorizations: list[str | None] = []
        """The Authorization header of every request."""
        self.status: int | None = None
        """Answer everything with this."""
        self.ignore_range = False
        self.truncate_to: int | None = None
        """Announce whole bodies, but cut the connection after this many bytes."""
        self.endless = False
        """Bodies have no length and no end."""
        self.trickle_after: int | None = None
        """Send so many bytes of every answer, its headers included, at once, and the rest one by one."""
        self.hold: tuple[str, int] | None = None
        """Of the blob with this SHA-256 send so many bytes of a body, then wait until ``release`` is set."""
        self.release = threading.Event()
        self.holding = threading.Event()
        """Set when an answer has been held."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: the test reads ``requests``."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients of these tests hang up as they like."""

        certificate = _certify(folder, self.ca_path, valid_from, valid_to)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def stop(self) -> None:
        """Close the listening socket and end the thread."""
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.trickle_after is not None:
            request.wfile = _Trickle(request.wfile, self.trickle_after)
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        self.authorizations.append(request.headers.get("Authorization"))
        data = self._find(unquote(request.path))
        if data is None or self.status is not None:
            request.send_response(self.status or 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = 0
        if wanted is None or self.ignore_range:
            request.send_response(200)
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if not self.endless:
            request.send_header("Content-Length", str(len(data) - start))
        request.send_header("Connection", "close")
        request.end_headers()
        request.close_connection = True
        body = memoryview(data)[start:]
        if self.truncate_to is not None:
            request.wfile.write(body[: self.truncate_to])
            return
        if self.hold is not None and request.path.endswith(self.hold[0]):
            request.wfile.write(body[: self.hold[1]])
            request.wfile.flush()
            self.holding.set()
            self.release.wait()
            return
        request.wfile.write(body)
        while self.endless:
            request.wfile.write(bytes(65536))

    def _find(self, path: str) -> bytes | None:
        match path.strip("/").split("/"):
            case ["device", "v1", "metadata", name]:
                return self.content.metadata.get(name)
            case ["device", "v1", "targets", sha256, *rest]:
                return self.content.targets.get((sha256, "/".join(rest)))
            case ["device", "v1", "blobs", sha256]:
                return self.content.blobs.get(sha256)
        return None


class _Trickle(BufferedIOBase):
    """Writes to ``into``: so many bytes as they come, all others one by one, each in a TLS record of its own."""

    def __init__(self, into: BufferedIOBase, at_once: int) -> None:
        self._into, self._at_once = into, at_once

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data)
        begin, rest = view[: self._at_once], view[self._at_once :]
        self._at_once -= len(begin)
        if begin:
            self._into.write(begin)
        for at in range(len(rest)):
            self._into.write(rest[at : at + 1])
        return len(view)


@contextlib.contextmanager
def serve(
    content: RegistryContent, folder: Path, *, valid_from: datetime | None = None, valid_to: datetime | None = None
) -> Iterator[RegistryServer]:
    """Run a server whose certificate is valid in the given time (default: yesterday to tomorrow)."""
    now = datetime.now(UTC)
    server = RegistryServer(
        content,
        folder,
        valid_from=valid_from or now - timedelta(days=1),
        valid_to=valid_to or now + timedelta(days=1),
    )
    try:
        yield server
    finally:
        server.stop()


def _certify(folder: Path, ca_path: Path, valid_from: datetime, valid_to: datetime) -> Path:
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test server CA")])
    dates = (valid_from, valid_to)

    def build(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(dates[0])
            .not_valid_after(dates[1])
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.KeyUsage(True, False, False, False, False, ca, ca, False, False),
                critical=True,
            )
        )
        if not ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    ca_path.write_bytes(build(ca_name, ca_key.public_key(), ca=True).public_bytes(serialization.Encoding.PEM))
    leaf = build(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]), key.public_key(), ca=False
    ).public_bytes(serialization.Encoding.PEM)
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf
    )
    return path
