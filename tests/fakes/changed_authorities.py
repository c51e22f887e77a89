"""A controller whose authorities were changed by real ceremonies, and copies of the old ones, as a thief has them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from demo.processes import free_port
from garrison_controller.config import ControllerConfig, MqttConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import authorities, pki
from garrison_controller.devices.ca import Authority
from garrison_controller.signing.keys import load_public
from garrison_controller.signing.metadata import parse_root, parse_targets
from garrison_controller.signing.online import read_online_keys, replace_authorities
from garrison_controller.signing.workspace import RoleKeys, Workspace
from garrison_controller.wiring import Controller
from tests.fakes.ceremony import RELEASE_SIGNERS, ROOT_SIGNERS, make_signer
from tests.fakes.published import upload_of


class ChangedAuthorities:
    """``stolen`` are the authorities that were made at first, keys and all."""

    def __init__(self, folder: Path) -> None:
        self.config = ControllerConfig(
            state_dir=folder / "state", public_url="https://127.0.0.1:8443", mqtt=MqttConfig(port=free_port())
        )
        pki.initialise(self.config, datetime.now(UTC))
        self.stolen = {name: pki.load_authority(self.config, name) for name in authorities.TITLES}
        database = Database(self.config.database_url)
        database.create_all()
        database.close()
        keys = folder / "signers"
        self._signers = {name: make_signer(keys, name) for name in (*ROOT_SIGNERS, *RELEASE_SIGNERS)}
        roles = [
            RoleKeys(role, tuple(load_public(keys / f"{name}.pub.json") for name in names), 2)
            for role, names in (("root", ROOT_SIGNERS), ("targets", RELEASE_SIGNERS))
        ]
        self._workspace = Workspace.create(
            folder / "release",
            online=read_online_keys(pki.online_path(self.config)),
            fleet="demo",
            root=roles[0],
            targets=roles[1],
            root_days=730,
            targets_days=365,
            online_days=1095,
            now=self._now(),
        )
        self._publish(*ROOT_SIGNERS, *RELEASE_SIGNERS)

    def authority(self, name: str) -> Authority:
        """Return the authority in force."""
        return pki.load_authority(self.config, name)

    def introduce(self, name: str) -> None:
        """Publish a new authority beside the old one, and put it in force."""
        database = Database(self.config.database_url)
        authorities.stage(self.config, database, name, self._now())
        self._change(name)
        authorities.use(self.config, database, name, self._now(), force=True)
        database.close()

    def retire(self, name: str) -> None:
        """Publish that the old authority is gone."""
        database = Database(self.config.database_url)
        authorities.retire(self.config, database, name, self._now(), force=True)
        database.close()
        self._change(name)

    def _change(self, name: str) -> None:
        field = authorities.FIELDS[name]
        online = read_online_keys(pki.online_path(self.config))
        changed = replace_authorities(self._workspace.fleet(), field, str(getattr(online, field)))
        self._workspace.change_fleet(changed, days=365, now=self._now())
        self._publish(*RELEASE_SIGNERS)

    def _publish(self, *signers: str) -> None:
        """Sign what is pending, and push it to a controller that has just been started."""
        for name in signers:
            self._workspace.sign(self._signers[name])
        complete = self._workspace.completed()
        controller = Controller(self.config)
        try:
            controller.registry.accept_metadata(upload_of(self._workspace), "id-anna", "anna", self._now())
        finally:
            controller.stop()
        for role, data in complete.items():
            version = parse_root(data).signed.version if role == "root" else parse_targets(data, role).signed.version
            self._workspace.record_published(role, version, data)

    @staticmethod
    def _now() -> datetime:
        return datetime.now(UTC).replace(microsecond=0)
