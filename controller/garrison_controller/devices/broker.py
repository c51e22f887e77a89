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
SESSION_DAYS = 7
_COMMAND = "garrison broker config mosquitto"


def write_broker_config(config: ControllerConfig, folder: Path, *, user: str = "") -> list[Path]:
    """Write ``mosquitto.conf`` and ``acl`` for this controller's PKI into ``folder``; return their paths.

    ``user``: who the broker becomes when root starts it; empty for whoever owns the broker's private key.

    Raises:
        InvalidError: ``broker.path_unusable`` if a path, or the user, holds a line break.
    """
    folder.mkdir(parents=True, exist_ok=True)
    acl, conf = folder / "acl", folder / "mosquitto.conf"
    data = folder / "data"
    data.mkdir(exist_ok=True)
    account = user or _account(config)
    replace_file(acl, acl_text(config.mqtt.identity).encode(), 0o644)
    replace_file(conf, conf_text(config, acl.resolve(), data.resolve(), account).encode(), 0o644)
    return [conf, acl]


def conf_text(config: ControllerConfig, acl: Path, data: Path, account: str) -> str:
    """Return the content of ``mosquitto.conf``; paths must be absolute.

    ``account``: who the broker becomes when root starts it, since it must read the private key; empty to leave that to
    the broker (``mosquitto``) or to another line.

    Raises:
        InvalidError: ``broker.path_unusable``.
    """
    pki = config.pki_dir.resolve()
    for value in (str(pki), str(acl), str(data), account):
        if any(character in value for character in "\n\r"):
            raise InvalidError("broker.path_unusable", f"{value:.80} has a line break", hint="use another folder")
    user = f"user {account}" if account else "# user: none is set; Mosquitto's own account must be able to read keyfile"
    return f"""\
# Written by `{_COMMAND}`. Write it anew rather than change it here.
# Reload (SIGHUP, `systemctl reload mosquitto`) reads acl_file and crlfile again: do so after a board was revoked or
# replaced. Everything else needs a restart.

# When root starts the broker it becomes this account, which must be able to read keyfile below.
{user}

# The one door: TLS with client certificates. There is no listener for passwords or without TLS.
listener {config.mqtt.port} {config.mqtt.host}
tls_version tlsv1.2

# What the broker shows: clients check it against the server CA that they pinned at enrolment.
certfile {pki / SERVER}.pem
keyfile {pki / SERVER}.key

# What clients must show: a certificate of the device CA, and of no other. The server CA certifies no client.
cafile {pki / DEVICE_CA}.pem
require_certificate true

# Revoked certificates. The list names its own end, ten years away: a list past its end shuts everyone out.
crlfile {pki / REVOCATION_LIST}

# The certificate's common name is the user name, for acl_file, and the client id: whatever a client calls itself, it
# can neither act as another, nor end another's connection, nor take another's queue.
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false

# Which topics are whose. What no line there allows is refused, $SYS and shared subscriptions of it included.
acl_file {acl}

# A message is below 512 KiB (docs/protocol.md, "Envelope") or a chunk of 256 KiB. Who sends more is cut off.
max_packet_size {MAX_PACKET_BYTES}

# For one client that is away, at most this much is kept, and its session at most so long. Nothing is lost by either
# bound: boards keep rows until a signed receipt covers them, and desired state is retained.
max_queued_messages {QUEUED_MESSAGES}
persistent_client_expiration {SESSION_DAYS}d

# Retained messages survive a restart. The folder may be deleted: boards and controller send again what matters.
persistence true
persistence_location {data}/

# To the journal: failures, and who connects.
log_dest stderr
log_type error
log_type warning
log_type notice
"""


def acl_text(identity: str) -> str:
    """Return the content of ``acl``: the controller everywhere, each board on its own topics."""
    registry = REGISTRY_TIMESTAMP.rsplit("/", maxsplit=1)[0]
    return f"""\
# Written by `{_COMMAND}`. %u is the common name of the client's certificate.

# The controller. The device CA signs this name for nobody else: no board's name begins with `controller`.
user {identity}
topic readwrite {ROOT}/#

# Every board: it says what it has to say, and hears what is meant for it. It reads nobody's messages.
pattern write {ROOT}/up/%u/#
pattern read {ROOT}/down/%u/#

# The notice that the registry changed; the metadata verifies by itself.
pattern read {registry}/#
"""


def _account(config: ControllerConfig) -> str:
    """Return whose the private keys are; nothing for root, as whom a broker should not run unless told so by hand."""
    owner = (config.pki_dir / f"{SERVER}.key").stat().st_uid
    try:
        return pwd.getpwuid(owner).pw_name if owner else ""
    except KeyError:  # an account without a name, as in some containers
        return ""
