"""The controller as one object: the only place that builds its adapters and joins them."""

from __future__ import annotations

import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError
from tuf.api.metadata import Root

from garrison_controller.bus.answers import BoardAnswers
from garrison_controller.bus.service import Bus
from garrison_controller.config import ControllerConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import authorities, pki, rotation
from garrison_controller.devices.sessions import Sessions
from garrison_controller.jobs import certificates
from garrison_controller.jobs.schedule import Job, build_scheduler
from garrison_controller.registry.blobs import BlobFolder
from garrison_controller.registry.service import Registry
from garrison_controller.registry.store import RegistryStore
from garrison_controller.rollouts import service as rollouts
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import ConflictError, GarrisonError, NotFoundError
from garrison_protocol.fleet import Fleet

REFRESH_S = 3600
NOTICE_S = 24 * 3600
_LOG = logging.getLogger(__name__)


class Controller:
    """Everything one controller process works with. The database must have the newest schema already."""

    def __init__(self, config: ControllerConfig, *, now_s: Callable[[], float] = time.time) -> None:
        """Build every part; nothing runs before ``start``.

        Raises:
            NotFoundError: ``controller.not_initialised``.
            GarrisonError: As ``pki.load_online_keys``.
        """
        self.config = config
        self._switching = threading.Lock()
        self.keys = pki.load_online_keys(config)
        self.device_ca = pki.load_authority(config, pki.DEVICE_CA)
        self._in_use = authorities.in_use(config, self.device_ca)
        (self.server_ca_pem,) = self._in_use["server_ca"].values()
        self.database = Database(config.database_url)
        self.sessions = Sessions(now_s)
        self.registry = Registry(
            self.database,
            RegistryStore(config.metadata_dir),
            BlobFolder(config.blobs_dir),
            self.keys.signers,
            self.keys.purposes,
            timestamp_days=config.registry.timestamp_days,
            snapshot_days=config.registry.snapshot_days,
            check_fleet=lambda fleet: authorities.check_fleet(fleet, self._in_use),
        )
        self.bus = Bus(
            self.database,
            host=config.mqtt.host,
            port=config.mqtt.port,
            identity=config.mqtt.identity,
            tls=_broker_tls(config),
            protocol=config.mqtt.protocol,
            keepalive_s=config.mqtt.keepalive_s,
            director=self.keys.director,
            receipt_key=self.keys.receipt,
            now=lambda: datetime.fromtimestamp(now_s(), UTC),
            answers=BoardAnswers(
                config,
                self.database,
                store=self.registry.store,
                blobs=self.registry.blobs,
                sessions=self.sessions,
                device_ca=self.device_ca,
                director=self.keys.director,
                now=lambda: datetime.fromtimestamp(now_s(), UTC),
            ),
        )
        self.registry.on_timestamp = self.bus.publish_registry_timestamp
        self.registry.on_published = self._switch_keys
        self.scheduler = build_scheduler(
            (
                Job("rollout-tick", config.rollouts.tick_s, self._tick),
                Job("registry-refresh", REFRESH_S, self._refresh),
                Job("certificate-notices", NOTICE_S, self._notices),
            )
        )

    def start(self) -> None:
        """Start the bus and the scheduled jobs; a broker that is away is tried again for ever."""
        try:  # the last process may have ended between a revocation's commit and the file
            self.write_revocation_list()
        except (GarrisonError, SQLAlchemyError, OSError):
            _LOG.exception("the list of revoked certificates could not be written")
        timestamp = self.registry.current_timestamp()
        if timestamp is not None:
            self.bus.publish_registry_timestamp(timestamp)
        self.bus.start()
        self.scheduler.start()

    def stop(self) -> None:
        """Stop what ``start`` started, after the job and the message at hand, and close the database."""
        if self.scheduler.running:
            self.scheduler.shutdown(wait=True)
            self.bus.stop()
        self.database.close()

    @property
    def server_ca_sha256(self) -> str:
        """The digest, for enrolment strings, of the authority behind what this process shows: ``server_ca_pem``."""
        return sha256_hex(self.server_ca_pem.encode())

    def root_sha256(self) -> str:
        """Return the digest of ``1.root.json``, which boards pin.

        Raises:
            ConflictError: ``registry.not_signed`` before the signing ceremony.
        """
        try:
            return hashlib.sha256(self.registry.first_root()).hexdigest()
        except NotFoundError as error:
            raise ConflictError(
                "registry.not_signed",
                "there is no signed root yet that a board could pin",
                hint="hold the signing ceremony first: `garrison registry init`, `sign`, `push`",
            ) from error

    def write_revocation_list(self) -> None:
        """Write the list of revoked certificates for the broker, from what the database says now."""
        authorities.write_revocation_lists(self.config, self.database, datetime.now(UTC))

    def _tick(self, now: datetime) -> None:
        if rollouts.tick(self.database, self.keys.director, now):
            self.bus.desired_changed()

    def _refresh(self, now: datetime) -> None:
        """Sign what is due again; the first run, at the start, also ends a switch of keys that was cut off."""
        self.registry.refresh_online(now)
        root, published = self.registry.store.root(), self.registry.store.published()
        if root is not None and published is not None:
            self._switch_keys(root.signed, self.registry.get_fleet())

    def _switch_keys(self, root: Root, fleet: Fleet) -> None:
        try:
            with self._switching:
                now = datetime.now(UTC)
                switched = rotation.switch(self.keys, self.database, root, fleet, now)
                retired = authorities.settle(self.config, self.database, fleet, now)
        except (GarrisonError, SQLAlchemyError, OSError):
            # What is published stands, whatever fails here; the next refresh, or the next start, makes up for it.
            _LOG.exception("a new key could not be put in force, or an old authority not be retired, yet")
            return
        for purpose in switched:
            _LOG.warning("the %s key was switched; the old one is deleted", purpose)
        for name in retired:
            _LOG.warning("the old %s is retired, and its key deleted: restart the broker", name)
        if switched:
            self.bus.desired_changed()

    def _notices(self, now: datetime) -> None:
        certificates.notices(self.config, self.database, now)


class _Socket(ssl.SSLSocket):
    """Closes itself where the handshake fails: paho would leave that to the collector, once a try."""

    def do_handshake(self, block: bool = False) -> None:
        """As ``ssl.SSLSocket.do_handshake``."""
        try:
            super().do_handshake(block)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise  # no failure: a socket without a time-out goes on later
        except BaseException:
            self.close()
            raise


def _broker_tls(config: ControllerConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(config.pki_dir / f"{pki.SERVER_CA}.pem"))
    context.load_cert_chain(str(config.pki_dir / f"{pki.CLIENT}.pem"), str(config.pki_dir / f"{pki.CLIENT}.key"))
    context.sslsocket_class = _Socket
    return context
