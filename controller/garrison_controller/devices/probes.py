"""What broker and controller really do now, asked over TLS from the controller's host: they read files when they like.

TLS 1.2 at most, where a handshake ends only after both sides have judged each other's certificate; nothing is said
after it.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from garrison_controller.config import ControllerConfig
from garrison_controller.devices import pki
from garrison_controller.devices.ca import Authority, private_pem
from garrison_protocol.errors import ConflictError, RefusedError, UnavailableError

TIMEOUT_S = 10.0
PROBE_DAYS = 1


def check_broker_admits(config: ControllerConfig, device_ca: Authority, now: datetime) -> None:
    """Return if the running broker lets in whom ``device_ca`` certifies.

    Raises:
        RefusedError: ``ca.broker_refuses``.
        UnavailableError: ``ca.server_unreachable``.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    issued = device_ca.issue_client(config.mqtt.identity, key.public_key(), PROBE_DAYS, now)
    with tempfile.NamedTemporaryFile() as pair:  # 0600
        pair.write(issued.pem.encode() + private_pem(key))
        pair.flush()
        context = _context(Path(pair.name))
    context.load_verify_locations(cafile=str(config.pki_dir / f"{pki.SERVER_CA}.pem"))
    try:
        _shake_hands(config.mqtt.host, config.mqtt.port, context)
    except (ssl.SSLError, ConnectionError) as error:
        raise RefusedError(
            "ca.broker_refuses",
            f"the broker does not accept certificates by the new device CA: {error}",
            hint="restart the broker, so that it reads pki/device-ca.pem and device-ca.crl again",
        ) from error


def check_servers_show(config: ControllerConfig, server_ca: Authority) -> None:
    """Return if controller and broker show certificates by ``server_ca`` now.

    Raises:
        ConflictError: ``ca.still_shown``.
        UnavailableError: ``ca.server_unreachable``.
    """
    servers = (("controller", config.http.host, config.http.port), ("broker", config.mqtt.host, config.mqtt.port))
    for server, host, port in servers:
        context = _context(config.pki_dir / f"{pki.CLIENT}.pem", config.pki_dir / f"{pki.CLIENT}.key")
        context.load_verify_locations(cadata=server_ca.pem)
        try:
            _shake_hands(host, port, context)
        except (ssl.SSLError, ConnectionError) as error:
            raise ConflictError(
                "ca.still_shown",
                f"the {server} does not show a certificate by the new server CA: {error}",
                hint="restart controller and broker after `garrison serve use-ca server-ca`",
            ) from error


def _context(certificate: Path, key: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # who signed is asked, not whether the addresses here are those that boards use
    context.load_cert_chain(certificate, key)
    return context


def _shake_hands(host: str, port: int, context: ssl.SSLContext) -> None:
    try:
        connection = socket.create_connection((host, port), timeout=TIMEOUT_S)
    except OSError as error:
        raise UnavailableError(
            "ca.server_unreachable",
            f"nobody answers at {host}:{port}: {error.strerror or error}",
            hint="start controller and broker, or give --force",
        ) from error
    with connection, context.wrap_socket(connection):
        pass
