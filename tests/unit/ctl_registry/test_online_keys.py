"""Online keys that are being replaced: the active one and the staged one, whichever the metadata names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from securesystemslib.signer import CryptoSigner

from garrison_controller.registry.online import OnlineSigners
from garrison_controller.registry.rules import Current, OwnKeys, check_upload
from garrison_protocol.errors import GarrisonError
from garrison_protocol.fleet import Fleet
from garrison_protocol.keys import SigningKey
from garrison_protocol.states import KeyPurpose
from tests.fakes.ceremony import NOW, Ceremony
from tests.fakes.published import PublishedRegistry, upload_of


def current(registry: PublishedRegistry) -> Current:
    published = registry.registry.store.published()
    assert published is not None
    return Current(registry.registry.store.root(), published.targets, fleet=registry.registry.get_fleet())


def own(ceremony: Ceremony, *, staged: str = "", timestamp: str = "") -> OwnKeys:
    root = ceremony.workspace.published_root()
    assert root is not None
    online = {role: [*root.signed.roles[role].keyids] for role in ("snapshot", "timestamp")}
    purposes = {
        KeyPurpose.DIRECTOR: {ceremony.online.director} | ({staged} if staged else set()),
        KeyPurpose.RECEIPT: {ceremony.online.receipt},
        KeyPurpose.LOG: {ceremony.online.log},
    }
    return OwnKeys(online["snapshot"], [*online["timestamp"], *([timestamp] if timestamp else [])], purposes)


def renamed(fleet: Fleet, purpose: KeyPurpose, public: str) -> Fleet:
    """Return ``fleet`` with another key for one purpose."""
    keys = tuple(key.model_copy(update={"public": public}) if key.purpose is purpose else key for key in fleet.keys)
    return fleet.model_copy(update={"keys": keys})


def test_fleet_may_name_the_staged_key_instead(ceremony: Ceremony, published: PublishedRegistry) -> None:
    staged = SigningKey.generate().public_hex
    fleet = renamed(ceremony.workspace.fleet(), KeyPurpose.DIRECTOR, staged)
    assert ceremony.workspace.change_fleet(fleet, days=30, now=NOW) == 2
    ceremony.sign("dan", "erin")
    upload = upload_of(ceremony.workspace)

    accepted = check_upload(current(published), upload, own(ceremony, staged=staged), NOW)
    assert accepted.targets.signed.version == 2
    with pytest.raises(GarrisonError) as caught:
        check_upload(current(published), upload, own(ceremony), NOW)
    assert caught.value.code == "registry.fleet_lacks_keys"


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_the_key_of_an_online_role_is_replaced_in_the_next_root(
    ceremony: Ceremony, published: PublishedRegistry, role: str
) -> None:
    before = ceremony.workspace.published_root()
    assert before is not None
    new = CryptoSigner.generate_ed25519()
    public = new.public_key.keyval["public"]
    assert ceremony.workspace.change_online_role(role, public, days=730, now=NOW) == 2
    ceremony.sign("alice", "bob")
    pending = ceremony.workspace.pending_root()
    assert pending is not None
    assert pending.signed.roles[role].keyids == [new.public_key.keyid]
    assert pending.signed.roles["root"].keyids == before.signed.roles["root"].keyids
    active = OnlineSigners(CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519())
    signers = replace(active, **{f"staged_{role}": new})

    assert signers.keyids(role) == {getattr(active, role).public_key.keyid, new.public_key.keyid}
    assert getattr(signers.named_by(pending.signed), role) is new
    assert getattr(signers.named_by(before.signed), role) is getattr(active, role)
    staged = own(ceremony, timestamp=new.public_key.keyid)
    staged = replace(staged, snapshot=[*staged.snapshot, new.public_key.keyid])
    assert check_upload(current(published), upload_of(ceremony.workspace), staged, NOW).roots[0][0] == 2
    with pytest.raises(GarrisonError) as caught:
        check_upload(current(published), upload_of(ceremony.workspace), own(ceremony), NOW)
    assert caught.value.code == "registry.online_keys_not_delegated"


def test_what_a_push_put_in_force_is_announced(ceremony: Ceremony, empty: PublishedRegistry) -> None:
    told: list[tuple[int, str]] = []
    empty.registry.on_published = lambda root, fleet: told.append((root.version, fleet.name))
    ceremony.sign("alice", "bob", "dan", "erin")
    upload = upload_of(ceremony.workspace)
    empty.push()
    empty.registry.accept_metadata(upload, "id-anna", "anna", NOW)

    assert told == [(1, "demo")]
