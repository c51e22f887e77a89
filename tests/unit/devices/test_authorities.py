"""The files of an authority that changes: every step, steps that were cut off, and who is in the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_controller.config import ControllerConfig, KeysConfig
from garrison_controller.db.base import Database
from garrison_controller.devices import authorities, enrolment, pki, probes, queries, rotation, service, tokens
from garrison_controller.devices.authorities import NEXT, OLD
from garrison_controller.devices.ca import Authority, fingerprints
from garrison_controller.devices.enrolment import Admission
from garrison_controller.devices.keyring import find_passphrase
from garrison_controller.devices.tables import Device
from garrison_controller.jobs.certificates import notices
from garrison_controller.signing.online import replace_authorities
from garrison_protocol.errors import ConflictError, GarrisonError, InvalidError, RefusedError, UnavailableError
from garrison_protocol.fleet import Fleet
from garrison_protocol.keys import SigningKey
from tests.unit.devices.boards import Board

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NAMES = ["server-ca", "device-ca"]


class Host:
    """A controller's state, no process."""

    def __init__(self, folder: Path) -> None:
        passphrase = folder / "passphrase"
        passphrase.touch(mode=0o600)
        passphrase.write_text("correct horse battery staple\n")
        self.config = ControllerConfig(
            state_dir=folder / "state",
            public_url="https://127.0.0.1:8443",
            keys=KeysConfig(passphrase_file=passphrase),
        )
        pki.initialise(self.config, NOW, find_passphrase(self.config))
        self.database = Database(self.config.database_url)
        self.database.create_all()

    def stage(self, name: str) -> Authority:
        return authorities.stage(self.config, self.database, name, NOW)

    def use(self, name: str) -> Authority:
        return authorities.use(self.config, self.database, name, NOW, force=True)

    def retire(self, name: str, *, force: bool = True) -> Authority:
        return authorities.retire(self.config, self.database, name, NOW, force=force)

    def settle(self, fleet: Fleet) -> list[str]:
        return authorities.settle(self.config, self.database, fleet, NOW)

    def online(self, name: str) -> str:
        return str(json.loads(pki.online_path(self.config).read_text())[authorities.FIELDS[name]])

    def trusted(self, name: str) -> str:
        return (self.config.pki_dir / f"{name}.pem").read_text()

    def keys(self, name: str) -> list[str]:
        return sorted(path.name for path in self.config.pki_dir.glob(f"{name}*.key"))

    def fleet(self) -> Fleet:
        """Return what signers would publish of ``online.json`` now."""
        return Fleet(name="demo", keys=(), device_ca=self.online("device-ca"), server_ca=self.online("server-ca"))

    def lists(self) -> list[x509.CertificateRevocationList]:
        text = (self.config.pki_dir / pki.REVOCATION_LIST).read_text()
        parts = text.split("-----BEGIN X509 CRL-----")[1:]
        return [x509.load_pem_x509_crl(("-----BEGIN X509 CRL-----" + part).encode()) for part in parts]

    def board(self, name: str, authority: Authority, now: datetime = NOW) -> None:
        with self.database.session() as session:
            _, secret = tokens.create_token(session, "alice", name, group="/", labels={}, hours=24, now=now)
            admission = Admission(authority, SigningKey.generate(), 30, now)
            enrolment.enrol(session, Board().enrol_request(secret), admission)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path)
    monkeypatch.setattr(authorities, "_listed_since", lambda *_: 1)  # published; test_authorities of e2e really does
    yield host
    host.database.close()


@pytest.mark.parametrize("name", NAMES)
def test_from_one_authority_to_the_next(host: Host, name: str) -> None:
    old = pki.load_authority(host.config, name)
    new = host.stage(name)
    assert new.certificate.subject != old.certificate.subject
    assert host.trusted(name) == host.online(name) == old.pem + new.pem
    assert host.keys(name) == [f"{name}.key", f"{name}.next.key"]
    assert b"ENCRYPTED" in (host.config.pki_dir / f"{name}.next.key").read_bytes()
    assert host.stage(name).pem == new.pem
    both = host.fleet()

    assert host.use(name).pem == new.pem
    assert pki.load_authority(host.config, name).pem == new.pem
    leaf = host.config.pki_dir / ("server.pem" if name == "server-ca" else "controller.pem")
    x509.load_pem_x509_certificate(leaf.read_bytes()).verify_directly_issued_by(new.certificate)
    assert host.trusted(name) == host.online(name) == old.pem + new.pem
    assert b"ENCRYPTED" in (host.config.pki_dir / f"{name}.old.key").read_bytes()
    assert host.use(name).pem == new.pem  # again: nothing but new certificates
    assert host.settle(both) == []

    assert host.retire(name).pem == new.pem
    assert (host.online(name), host.trusted(name)) == (new.pem, old.pem + new.pem)
    assert host.settle(both) == []  # signers have not said so yet
    assert host.settle(host.fleet()) == [name]
    assert (host.trusted(name), host.keys(name)) == (new.pem, [f"{name}.key"])
    assert host.settle(host.fleet()) == []


def test_each_device_ca_has_its_revocation_list(host: Host) -> None:
    old = pki.load_authority(host.config, "device-ca")
    host.board("edge-1", old)
    with host.database.session() as session:
        service.revoke(session, "alice", "edge-1", "stolen", NOW)

    def signed_by() -> list[bool]:
        known = {one.certificate.subject: one for one in (old, new)}
        lists = host.lists()
        assert all(len(list(one)) == 1 for one in lists)
        return [one.is_signature_valid(known[one.issuer].certificate.public_key()) for one in lists]  # type: ignore[arg-type]

    new = host.stage("device-ca")
    assert signed_by() == [True, True]
    host.use("device-ca")
    authorities.write_revocation_lists(host.config, host.database, NOW)
    assert signed_by() == [True, True]
    host.retire("device-ca")
    host.settle(host.fleet())
    assert signed_by() == [True]


@pytest.mark.parametrize("name", NAMES)
def test_a_staged_authority_can_be_taken_back(host: Host, name: str) -> None:
    old = pki.load_authority(host.config, name)
    host.stage(name)
    assert authorities.discard(host.config, host.database, name, NOW).pem == old.pem
    assert host.trusted(name) == host.online(name) == old.pem
    assert (host.keys(name), len(host.lists())) == ([f"{name}.key"], 1)
    with pytest.raises(ConflictError, match=r"key\.nothing_staged"):
        authorities.discard(host.config, host.database, name, NOW)
    with pytest.raises(ConflictError, match=r"key\.nothing_staged"):
        host.use(name)
    with pytest.raises(ConflictError, match=r"ca\.nothing_to_retire"):
        host.retire(name)


def test_one_change_after_the_other(host: Host) -> None:
    host.stage("server-ca")
    host.use("server-ca")
    with pytest.raises(ConflictError, match=r"ca\.rotation_unfinished"):
        host.stage("server-ca")
    assert any("retire-ca server-ca" in notice for notice in notices(host.config, host.database, NOW))
    host.stage("device-ca")  # the other one has nothing to do with it


def test_steps_that_were_cut_off_are_done_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise OSError("the power went away")

    monkeypatch.setattr(authorities, "_write_trusted", die)
    with pytest.raises(OSError, match="power"):
        host.stage("device-ca")
    monkeypatch.undo()
    monkeypatch.setattr(authorities, "_listed_since", lambda *_: 1)
    new = host.stage("device-ca")
    assert len(fingerprints(host.trusted("device-ca"))) == 2

    monkeypatch.setattr("garrison_controller.devices.keyring.KeyStore.settle", die)
    with pytest.raises(OSError, match="power"):
        host.use("device-ca")
    assert host.keys("device-ca") == ["device-ca.key", "device-ca.next.key", "device-ca.old.key"]
    assert host.settle(host.fleet()) == []
    monkeypatch.undo()
    monkeypatch.setattr(authorities, "_listed_since", lambda *_: 1)
    assert host.use("device-ca").pem == new.pem

    host.retire("device-ca")
    monkeypatch.setattr(authorities, "record_event", die)
    with pytest.raises(OSError, match="power"):
        host.settle(host.fleet())
    monkeypatch.undo()
    assert host.keys("device-ca") == ["device-ca.key", "device-ca.old.key"]
    assert authorities.find(host.config, "device-ca", OLD) is None
    assert host.settle(host.fleet()) == ["device-ca"]
    assert host.keys("device-ca") == ["device-ca.key"]


def test_whose_certificates_keep_an_old_device_ca(host: Host) -> None:
    old = pki.load_authority(host.config, "device-ca")
    host.board("edge-1", old, NOW - timedelta(days=20))
    host.board("edge-2", old, NOW - timedelta(days=31))  # ended: it renews by its identity key
    host.board("edge-3", old)
    host.stage("device-ca")
    host.board("edge-4", host.use("device-ca"))
    with host.database.session() as session:
        service.revoke(session, "alice", "edge-3", "gone", NOW)
    with pytest.raises(ConflictError, match=r"ca\.still_needed: 1 boards .* until 2026-12-04.*: edge-1$"):
        host.retire("device-ca", force=False)
    with host.database.reading() as session:
        assert queries.boards_certified_by(session, old.fingerprint, NOW) == {"edge-1": NOW + timedelta(days=10)}


def test_which_boards_have_not_said_that_they_have_the_metadata(host: Host) -> None:
    authority = pki.load_authority(host.config, "device-ca")
    said: list[dict[str, object]] = [{}, {"registry": {"targets": 1}}, {"registry": {"targets": 2}}, {"registry": 3}]
    for number, status in enumerate(said):
        host.board(f"edge-{number}", authority)
        with host.database.session() as session:
            board = session.get(Device, f"edge-{number}")
            assert board is not None
            board.status = status
    with host.database.reading() as session:
        assert queries.boards_before_targets(session, 2) == ["edge-0", "edge-1", "edge-3"]


def test_nobody_answers_a_probe(host: Host) -> None:
    with pytest.raises(UnavailableError, match=r"ca\.server_unreachable"):
        probes.check_servers_show(host.config, pki.load_authority(host.config, "server-ca"))
    with pytest.raises(UnavailableError, match=r"ca\.server_unreachable"):
        probes.check_broker_admits(host.config, pki.load_authority(host.config, "device-ca"), NOW)


def test_a_passphrase_is_changed_for_every_authority(host: Host) -> None:
    host.stage("server-ca")
    changed = rotation.encrypt(host.config, find_passphrase(host.config), b"another passphrase of the same controller")
    assert {path.name for path in changed} >= {"server-ca.key", "server-ca.next.key", "device-ca.key"}


def test_a_fleet_without_an_authority_that_is_in_use_is_refused(host: Host) -> None:
    used = authorities.in_use(host.config, pki.load_authority(host.config, "device-ca"))
    good = host.fleet()
    authorities.check_fleet(good, used)
    for name in NAMES:
        host.stage(name)
        host.use(name)
    authorities.check_fleet(host.fleet(), used)
    for name in NAMES:
        host.retire(name)
    for field in ("device_ca", "server_ca"):  # the running controller still works with the old ones
        ahead = good.model_copy(update={field: getattr(host.fleet(), field)})
        with pytest.raises(RefusedError, match=r"registry\.fleet_lacks_authority"):
            authorities.check_fleet(ahead, used)
    authorities.check_fleet(host.fleet(), authorities.in_use(host.config, pki.load_authority(host.config, "device-ca")))


def test_a_certificate_by_nobody_known_is_no_start(host: Host) -> None:
    stranger = Authority.create("Garrison server CA", NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    (host.config.pki_dir / "server.pem").write_text(stranger.issue_server(["x"], key.public_key(), 30, NOW).pem)
    with pytest.raises(RefusedError, match=r"pki\.issuer_unknown"):
        authorities.in_use(host.config, pki.load_authority(host.config, "device-ca"))


def test_what_signers_may_make_of_online_json(host: Host) -> None:
    first = host.fleet()
    with pytest.raises(ConflictError, match=r"signing\.online_key_known"):
        replace_authorities(first, "server_ca", first.server_ca)
    with pytest.raises(InvalidError, match=r"signing\.online_malformed"):
        replace_authorities(first, "server_ca", "nonsense")
    stranger = Authority.create("another", NOW)
    with pytest.raises(RefusedError, match=r"signing\.authority_without_overlap"):
        replace_authorities(first, "server_ca", stranger.pem)
    both = replace_authorities(first, "server_ca", first.server_ca + stranger.pem)
    assert replace_authorities(both, "server_ca", stranger.pem).server_ca == stranger.pem


def test_a_key_without_its_certificate_counts_for_nothing(host: Host) -> None:
    host.stage("device-ca")
    pki.replace_file(
        host.config.pki_dir / "device-ca.pem", pki.load_authority(host.config, "device-ca").pem.encode(), 0o644
    )
    assert authorities.find(host.config, "device-ca", NEXT) is None
    os.unlink(host.config.pki_dir / "device-ca.key")
    with pytest.raises(GarrisonError, match=r"key\.missing"):
        pki.load_authority(host.config, "device-ca")
