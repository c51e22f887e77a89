"""New online keys in a running controller, as a board sees it: nothing is lost, and the old key is refused after."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from garrison_agent.registry import trust
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_controller.devices import rotation
from garrison_controller.devices.keyring import Keyring, KeyStore, find_passphrase, public_hex
from garrison_controller.rollouts import desired
from garrison_controller.rollouts.tables import DesiredState
from garrison_controller.wiring import Controller
from garrison_protocol.envelope import Opened, seal, unseal
from garrison_protocol.errors import ConflictError, GarrisonError
from garrison_protocol.fleet import parse_fleet
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.enrolment import parse_enrolment
from garrison_protocol.messages.streams import RECEIPT_KIND
from garrison_protocol.states import KeyPurpose
from tests.integration.releases import Release, published_release
from tests.unit.devices.boards import Board

pytestmark = pytest.mark.integration
DEVICE = "edge-1"
EVENTS = "/api/v1/access/events?limit=100"


class Believer:
    """A board's trust: the agent's own verification, over HTTPS, from the root that it pinned."""

    def __init__(self, release: Release, folder: Path) -> None:
        self._source = HttpSource(HttpsOpener(release.served.url, release.served.ca))
        self._folder = folder
        self._root = self._source.metadata("1.root.json", 1_000_000)
        self._marks: dict[str, int] = {}
        self.at = datetime.now(UTC)
        self.refresh()

    def refresh(self) -> None:
        view = trust.refresh(
            self._source, self._folder, bootstrap=self._root, high_water=self._marks, floor=self.at, want=()
        )
        self._marks = dict(view.high_water)
        assert view.fleet is not None
        self.fleet = parse_fleet(view.fleet)

    def open(self, envelope: bytes, purpose: KeyPurpose = KeyPurpose.DIRECTOR) -> Opened:
        return unseal(envelope, lambda signer: self.fleet.public_key(purpose, signer, self.at))

    def refuses(self, envelope: bytes, purpose: KeyPurpose = KeyPurpose.DIRECTOR) -> bool:
        with pytest.raises(GarrisonError) as caught:
            self.open(envelope, purpose)
        return caught.value.code == "envelope.key_unknown"


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    """A published registry, and one board with a desired state."""
    with published_release(tmp_path) as release:
        with release.served.principal("dora", "device-admin") as dora:
            answer = dora.post("/api/v1/enrolment/tokens", {"name": DEVICE, "group": "/demo/"})
        with release.served.board_http() as http:
            request = Board().enrol_request(parse_enrolment(answer["enrolment"]).token)
            http.post("/device/v1/enroll", json=request.model_dump()).raise_for_status()
        controller = release.served.controller
        with controller.database.session() as session:
            desired.issue(session, [DEVICE], controller.keys.director, datetime.now(UTC))
            row = session.get(DesiredState, DEVICE)
            assert row is not None
            row.published_at = datetime.now(UTC)
        yield release


@pytest.fixture
def board(release: Release, tmp_path: Path) -> Believer:
    return Believer(release, tmp_path / "board")


def rotate(release: Release, purpose: str, *options: str) -> None:
    """Stage a key on the controller's host and prepare the change for the signers."""
    config = release.served.controller.config
    rotation.stage(config, purpose)
    words = ("--online", str(config.state_dir / "online.json"), "--workspace", release.workspace)
    release.run("registry", "key", "rotate", purpose, *words, *options)


def publish(release: Release, *signers: str) -> None:
    for name in signers:
        release.sign(name)
    release.run("registry", "push", "--workspace", release.workspace)


def desired_state(controller: Controller) -> DesiredState:
    with controller.database.reading() as session:
        row = session.get(DesiredState, DEVICE)
        assert row is not None
        session.expunge(row)
        return row


def key_files(controller: Controller, purpose: str) -> list[str]:
    return sorted(path.name for path in controller.config.keys_dir.glob(f"{purpose}*"))


def test_a_new_director_key_reaches_boards_without_a_gap(release: Release, board: Believer) -> None:
    controller = release.served.controller
    before = desired_state(controller)
    old = controller.keys.director.public_hex
    assert board.open(before.envelope).body == before.body

    rotate(release, "director")
    board.refresh()
    assert board.open(desired_state(controller).envelope).body == before.body  # staged, and nothing else changed
    assert controller.keys.director.public_hex == old

    publish(release, "dan", "erin")
    after = desired_state(controller)
    assert (after.body, after.counter, after.sha256) == (before.body, before.counter, before.sha256)
    assert after.published_at is None  # goes out again
    assert board.refuses(after.envelope)  # it asks for fresh metadata then
    board.refresh()
    assert board.open(after.envelope).body == before.body
    assert board.refuses(before.envelope)
    assert controller.keys.director.public_hex != old
    assert key_files(controller, "director") == ["director.key"]
    store = KeyStore(controller.config.keys_dir, find_passphrase(controller.config))
    assert public_hex(store.load_ed25519("director")) == controller.keys.director.public_hex
    events = release.served.admin.get(EVENTS)["events"]
    assert any((one["action"], one["subject"]) == ("key.switch", "director") for one in events)


def test_with_an_overlap_the_old_key_holds_until_it_ends(release: Release, board: Believer) -> None:
    before = desired_state(release.served.controller)
    rotate(release, "director", "--overlap-days", "7")
    publish(release, "dan", "erin")
    board.refresh()

    assert board.open(before.envelope).body == board.open(desired_state(release.served.controller).envelope).body
    board.at += timedelta(days=8)
    assert board.refuses(before.envelope)
    assert board.open(desired_state(release.served.controller).envelope).body == before.body


def test_a_new_receipt_key(release: Release, board: Believer) -> None:
    keys = release.served.controller.keys
    old = seal(RECEIPT_KIND, b"{}", keys.receipt)
    assert board.open(old, KeyPurpose.RECEIPT)
    rotate(release, "receipt")
    publish(release, "dan", "erin")

    new = seal(RECEIPT_KIND, b"{}", keys.receipt)  # the same object as before: whoever holds it signs with the new key
    assert board.refuses(new, KeyPurpose.RECEIPT)
    board.refresh()
    assert board.open(new, KeyPurpose.RECEIPT)
    assert board.refuses(old, KeyPurpose.RECEIPT)
    assert board.refuses(seal(RECEIPT_KIND, b"{}", keys.director), KeyPurpose.RECEIPT)


def test_a_new_log_key(release: Release, board: Believer) -> None:
    keys = release.served.controller.keys
    old = keys.log.public_hex
    rotate(release, "log")
    publish(release, "dan", "erin")
    board.refresh()

    assert keys.log.public_hex != old
    listed = [key.public for key in board.fleet.keys if key.purpose is KeyPurpose.LOG]
    assert listed == [keys.log.public_hex]


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_a_new_key_of_an_online_role_needs_root_signers(release: Release, board: Believer, role: str) -> None:
    controller = release.served.controller
    old = controller.registry.current_timestamp()
    rotate(release, role)
    release.sign("alice")
    with pytest.raises(GarrisonError, match=r"registry\.threshold_unmet"):
        release.run("registry", "push", "--workspace", release.workspace)
    board.refresh()
    publish(release, "bob")
    board.refresh()

    root = controller.registry.store.root()
    assert root is not None
    assert root.signed.version == 2
    (keyid,) = root.signed.roles[role].keyids
    assert controller.keys.signers().keyids(role) == {keyid}  # the old one is gone
    assert key_files(controller, role) == [f"{role}.key"]
    assert controller.registry.current_timestamp() != old
    controller.registry.refresh_online(datetime.now(UTC) + timedelta(days=2))
    board.refresh()


def test_a_switch_that_was_cut_off_is_made_up_for_at_the_next_start(
    release: Release, board: Believer, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = release.served.controller
    before = desired_state(controller)
    rotate(release, "director")

    def die(*_: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(rotation, "resign_all", die)
    publish(release, "dan", "erin")
    assert desired_state(controller).envelope == before.envelope
    assert key_files(controller, "director") == ["director.key", "director.next.key"]
    monkeypatch.undo()
    with pytest.raises(ConflictError, match=r"key\.published"):  # boards believe only the new one by now
        rotation.discard(controller.config, "director")

    again = Keyring(controller.keys.store)  # what a restarted controller would hold
    root, fleet = controller.registry.store.root(), controller.registry.get_fleet()
    assert root is not None
    now = datetime.now(UTC)
    assert rotation.switch(again, controller.database, root.signed, fleet, now) == ["director"]
    assert rotation.switch(again, controller.database, root.signed, fleet, now) == []
    board.refresh()
    assert board.open(desired_state(controller).envelope).body == before.body
    assert key_files(controller, "director") == ["director.key"]


def test_a_key_that_nobody_staged_is_not_accepted(release: Release) -> None:
    config = release.served.controller.config
    online = release.folder / "online.json"
    text = (config.state_dir / "online.json").read_text()
    stranger = SigningKey.generate().public_hex
    online.write_text(text.replace(release.served.controller.keys.director.public_hex, stranger))
    words = ("--online", str(online), "--workspace", release.workspace)
    release.run("registry", "key", "rotate", "director", *words)
    for name in ("dan", "erin"):
        release.sign(name)

    refused = release.fails("registry", "push", "--workspace", release.workspace)
    assert refused.code == "registry.fleet_lacks_keys"


def test_staging_twice_keeps_the_first_and_can_be_taken_back(release: Release) -> None:
    config = release.served.controller.config
    staged = rotation.stage(config, "receipt")
    assert rotation.stage(config, "receipt") == staged
    assert staged in (config.state_dir / "online.json").read_text()
    current = rotation.discard(config, "receipt")
    assert current == release.served.controller.keys.receipt.public_hex
    assert staged not in (config.state_dir / "online.json").read_text()
    with pytest.raises(ConflictError, match=r"key\.nothing_staged"):
        rotation.discard(config, "receipt")
    words = ("--online", str(config.state_dir / "online.json"), "--workspace", release.workspace)
    for purpose in ("receipt", "timestamp"):
        assert release.fails("registry", "key", "rotate", purpose, *words).code == "signing.online_key_known"
    assert release.fails("registry", "key", "rotate", "device_ca", *words).code == "key.purpose_unknown"
