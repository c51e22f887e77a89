"""The broker's configuration: who may connect and which topics are theirs.

Written for Mosquitto 2. The common name of a client certificate is both user name and client id, so a board can
neither act nor reconnect as another. Source: docs/operations.md, "Broker".
"""

from __future__ import annotations

import pwd
from pathlib import Path

from garrison_controller.config import ControllerConfig
from garrison_controller.devices.pki import DEVICE_CA, REVOCATION_LIST, SERVER, replace_file
from garrison_protocol.errors import InvalidError
from garrison_protocol.topics import REGISTRY_TIMESTAMP, ROOT

MAX_PACKET_BYTES = 1048576
QUEUED_MESSAGES = 10_000


def write_broker_config(config: ControllerConfig, folder: Path) -> list[Path]:
    """Write ``mosquitto.conf`` and ``acl`` for this controller's PKI into ``folder``; return their paths.

    Raises:
        InvalidError: ``broker.path_unusable`` if a path holds a line break.
    """
    folder.mkdir(parents=True, exist_ok=True)
    acl, conf = folder / "acl", folder / "mosquitto.conf"
    data = folder / "data"
    data.mkdir(exist_ok=True)
    replace_file(acl, acl_text(config.mqtt.identity).encode(), 0o644)
    replace_file(conf, conf_text(config, acl.resolve(), data.resolve(), _account(config)).encode(), 0o644)
    return [conf, acl]


def conf_text(config: ControllerConfig, acl: Path, data: Path, account: str) -> str:
    """Return the content of ``mosquitto.conf``; paths must be absolute.

    ``account``: who the broker becomes when root starts it, since it must read the private key; empty to leave that to
    the broker (``mosquitto``) or to another line.

    Raises:
        InvalidError: ``broker.path_unusable``.
    """
    pki = config.pki_dir.resolve()
    for path in (pki, acl, data):
        if any(character in str(path) for character in "\n\r"):
            raise InvalidError("broker.path_unusable", f"{path!s:.80} has a line break", hint="use another folder")
    user = f"user {account}\n" if account else ""
    return f"""\
# Written by `garrison serve broker-config`. After a revocation send the broker SIGHUP.
{user}listener {config.mqtt.port} {config.mqtt.host}
cafile {pki / DEVICE_CA}.pem
certfile {pki / SERVER}.pem
keyfile {pki / SERVER}.key
crlfile {pki / REVOCATION_LIST}
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {acl}
persistence true
persistence_location {data}/
max_packet_size {MAX_PACKET_BYTES}
max_queued_messages {QUEUED_MESSAGES}
"""


def acl_text(identity: str) -> str:
    """Return the content of ``acl``: the controller everywhere, each board on its own topics."""
    registry = REGISTRY_TIMESTAMP.rsplit("/", maxsplit=1)[0]
    return f"""\
# Written by `garrison serve broker-config`. %u is the common name of the client's certificate.
user {identity}
topic readwrite {ROOT}/#

pattern write {ROOT}/up/%u/#
pattern read {ROOT}/down/%u/#
pattern read {registry}/#
"""


def _account(config: ControllerConfig) -> str:
    """Return whose the private keys are; nothing for root, as whom a broker should not run unless told so by hand."""
    owner = (config.pki_dir / f"{SERVER}.key").stat().st_uid
    try:
        return pwd.getpwuid(owner).pw_name if owner else ""
    except KeyError:  # an account without a name, as in some containers
        return ""
