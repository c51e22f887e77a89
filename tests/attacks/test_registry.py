"""TUF's attacks on the registry's metadata, by whoever answers in the controller's place, with and without keys.

Names as in the TUF specification, section 1.5.2, and Uptane's standard, section 4.3.
"""

from __future__ import annotations

import shutil
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot

from garrison_agent.registry import verifier as verifier_process
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_agent.registry.verifier import TrustVerifier
from garrison_protocol.errors import UnavailableError
from garrison_protocol.states import Freshness
from tests.attacks import standing
from tests.attacks.target import RegistryWork, Target
from tests.fakes.memory_source import MemorySource
from tests.fakes.registry_server import serve
from tests.fakes.tuf_repository import FakeRepository, in_days
from tests.unit.loop.rig import entry, package

DAY_S = 86_400.0


def work(board: Target) -> RegistryWork:
    assert isinstance(board.work, RegistryWork)
    return board.work


def mirror(board: Target) -> MemorySource:
    """Return who answers in the controller's place; its fields are its faults."""
    source = work(board).source
    assert isinstance(source, MemorySource)
    return source


# --- without any key -------------------------------------------------------------------------------------------------


def test_arbitrary_installation_by_a_registry_with_keys_of_its_own(board: Target) -> None:
    """Arbitrary software installation: a stranger serves a complete registry that its own keys signed."""
    stranger = FakeRepository()
    stranger.add(package("6.6"))
    stranger.publish(versions=dict.fromkeys(stranger.signers, 9))
    with board.refusing_metadata("registry.bad_signature"):
        work(board).source = MemorySource(stranger.content)
    assert board.models.running == ["chat:1.0"]


def test_arbitrary_installation_by_a_forged_new_root(board: Target) -> None:
    """Arbitrary software installation: a stranger offers a next root that hands every role to its own keys."""
    stranger = FakeRepository()
    stranger.publish_root()
    with board.refusing_metadata("registry.bad_signature"):
        board.content["2.root.json"] = stranger.content.metadata["2.root.json"]
    assert not (board.folder / "state/registry/roots/2.root.json").exists()


def test_endless_metadata_ends_at_the_bound(board: Target, tmp_path: Path) -> None:
    """Endless data: the controller's place is taken by a server whose answers never end."""
    with serve(board.repository.content, tmp_path / "server") as server:
        server.endless = True
        tracemalloc.start()
        try:
            with board.refusing_metadata("source.too_long"):
                work(board).source = HttpSource(HttpsOpener(server.url, server.ca_path))
            assert tracemalloc.get_traced_memory()[1] < 8_000_000
        finally:
            tracemalloc.stop()


def test_freeze_with_metadata_that_is_only_old(board: Target) -> None:
    """Indefinite freeze: the same metadata is served for ever, so that news of a bad model never arrives."""
    board.repository.add(package("2.0"))
    board.repository.publish()
    board.look()
    served = board.served
    board.clock.forward(8 * DAY_S)
    board.look()
    assert board.headers("metadata.refused")[-1]["code"] == "registry.expired"
    board.desire(entry(package("2.0").ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "registry.expired")
    assert board.parts.trust.view.freshness is Freshness.STALE
    assert (board.served, board.models.running) == (served, ["chat:1.0"])


@pytest.mark.parametrize("name", ["timestamp.json", "4.snapshot.json", "4.targets.json"])
def test_a_malicious_mirror_that_changes_metadata(board: Target, name: str) -> None:
    """Malicious mirror: one byte of signed metadata is changed on its way."""
    board.repository.publish()
    data = bytearray(board.content[name])
    data[data.index(b'"expires"') + 12] ^= 1
    code = "registry.bad_signature" if name == "timestamp.json" else "registry.damaged"
    with board.refusing_metadata(code):
        board.content[name] = bytes(data)


def test_mix_and_match_of_two_genuine_publications(board: Target) -> None:
    """Mix-and-match: a new snapshot is served with the targets metadata of another, also genuine, publication."""
    board.repository.add(package("2.0"))
    board.repository.publish()
    with board.refusing_metadata("registry.damaged"):
        board.content["4.targets.json"] = board.content["3.targets.json"]


def test_mix_and_match_of_a_new_timestamp_with_an_old_snapshot(board: Target) -> None:
    """Mix-and-match: a new timestamp is served with a genuine snapshot from before."""
    board.repository.publish()
    with board.refusing_metadata("registry.damaged"):
        board.content["4.snapshot.json"] = board.content["3.snapshot.json"]


def test_rollback_of_metadata(board: Target) -> None:
    """Rollback: yesterday's complete and validly signed registry is served again, without the withdrawal of today."""
    yesterday = dict(board.content)
    board.repository.set_fleet(floors={"chat": "1.0"})
    board.repository.publish()
    board.look()
    with board.refusing_metadata("registry.rollback"):
        board.content.clear()
        board.content.update(yesterday)


def test_rollback_of_metadata_to_a_board_whose_cache_was_lost(board: Target) -> None:
    """Lost cache: the metadata cache is deleted (or rots), then old metadata is served: the store still knows."""
    yesterday = dict(board.content)
    board.repository.publish()
    board.look()
    shutil.rmtree(board.folder / "state/registry")
    high_water = standing.board_tables(board.database.connection)["high_water"]
    board.content.clear()
    board.content.update(yesterday)
    board.look()
    assert board.headers("metadata.refused")[-1]["code"] == "registry.rollback"
    assert standing.board_tables(board.database.connection)["high_water"] == high_water
    assert not (board.folder / "state/registry/trusted.json").exists()
    assert board.models.running == ["chat:1.0"]


def test_a_dropped_request_leaves_the_board_as_it_is_and_saying_so(board: Target) -> None:
    """Drop-request: every request of the board to its controller is swallowed, for longer than metadata is valid."""
    mirror(board).unreachable = True
    before = standing.files(board.folder / "state"), board.models.running, board.served
    board.desire(entry(package("2.0").ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "source.unreachable")
    board.clock.forward(40 * DAY_S)
    board.look()
    assert board.parts.trust.view.freshness is Freshness.STALE
    assert (standing.files(board.folder / "state"), board.models.running, board.served) == before
    assert board.headers("deployment.waiting")[-1]["code"] == "source.unreachable"


def test_slow_retrieval_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow retrieval: the answer to a request for metadata begins and then never goes on."""
    repository = FakeRepository()
    folder = tmp_path / "registry"
    with serve(repository.content, folder) as server:
        (folder / verifier_process.ROOT_FILE).write_bytes(repository.bootstrap)
        before = standing.files(folder)
        server.hold = ("timestamp.json", 10)
        with pytest.raises(UnavailableError) as caught:
            TrustVerifier(folder, server.url, timeout_s=1).refresh({}, datetime(2026, 1, 1, tzinfo=UTC), [])
    assert (caught.value.code, caught.value.retryable) == ("registry.verifier_failed", True)
    assert not (folder / "trusted.json").exists()
    assert {name: digest for name, digest in standing.files(folder).items() if name in before} == before


# --- with stolen keys ------------------------------------------------------------------------------------------------


def test_one_of_two_release_signers(board: Target) -> None:
    """Sub-threshold key compromise: one of two release signers' keys, with all online keys, approves a model."""
    with board.refusing_metadata("registry.bad_signature"):
        board.repository.add(package("6.6"))
        board.repository.publish(targets_signers=1)


def test_one_release_signer_signing_twice(board: Target) -> None:
    """Sub-threshold key compromise: one stolen targets key signs twice, to be counted as two."""
    thief = board.repository.signers["targets"][0]
    board.repository.signers["targets"] = [thief, thief]
    with board.refusing_metadata("registry.bad_signature"):
        board.repository.add(package("6.6"))
        board.repository.publish()


def test_one_of_three_root_keys(board: Target) -> None:
    """Sub-threshold key compromise: one of three root keys hands the fleet to other keys."""
    with board.refusing_metadata("registry.bad_signature"):
        board.repository.rotate("targets", signers=1)


def test_online_keys_cannot_sign_for_release_signers(board: Target) -> None:
    """Stolen controller: the keys of timestamp, snapshot, and director sign a model package as targets."""
    online = board.repository.signers
    online["targets"] = [online["timestamp"][0], online["snapshot"][0]]
    with board.refusing_metadata("registry.bad_signature"):
        board.repository.add(package("6.6"))
        board.repository.publish()


def test_a_key_that_was_rotated_out(board: Target) -> None:
    """Stolen old key: a timestamp key that the root has replaced signs once more, and the new root is withheld."""
    old = list(board.repository.signers["timestamp"])
    board.repository.rotate("timestamp")
    board.repository.publish()
    board.look()
    board.repository.signers["timestamp"] = old
    with board.refusing_metadata("registry.bad_signature"):
        board.repository.publish()
        del board.content["2.root.json"]


def test_stolen_online_keys_serve_older_targets(board: Target) -> None:
    """Rollback with stolen online keys: a new snapshot and timestamp name the targets metadata of last week."""
    last_week = board.content["3.targets.json"]
    board.repository.publish()
    board.look()
    snapshot = Snapshot(version=5, expires=in_days(30))
    snapshot.meta["targets.json"] = MetaFile.from_data(3, last_week, ["sha256"])
    board.repository.versions["timestamp"] = 5
    with board.refusing_metadata("registry.rollback"):
        board.repository.snapshot(snapshot)


def test_fast_forward_ends_with_new_keys(board: Target) -> None:
    """Fast-forward: stolen online keys drive versions up, so that honest metadata looks old for ever after."""
    board.repository.publish(versions={"timestamp": 2_000_000, "snapshot": 2_000_000, "targets": 4})
    board.look()
    assert board.parts.trust.view.timestamp == 2_000_000
    for role in ("timestamp", "snapshot"):
        board.repository.rotate(role)
    board.repository.publish(versions={"timestamp": 4, "snapshot": 4})
    board.look()
    assert (board.parts.trust.view.root, board.parts.trust.view.timestamp) == (3, 4)
    board.deploy(package("2.0"), "r2")
    assert board.models.running == ["chat:2.0"]


@pytest.mark.parametrize("version", [2**53, 2**63, 10**400])
def test_fast_forward_beyond_all_numbers(board: Target, version: int) -> None:
    """Fast-forward: stolen online keys sign a version that no store can hold, so that the agent ends at every start."""
    with board.refusing_metadata("registry.damaged"):
        board.repository.publish(versions={"timestamp": version, "snapshot": 4, "targets": 4})
    board.restart()
    assert board.parts.trust.view.timestamp == 3


def test_metadata_that_never_expires_is_still_older_than_newer(board: Target) -> None:
    """Eternal metadata: stolen online keys sign a timestamp for a thousand years; one honest publication ends it."""
    board.repository.expires["timestamp"] = in_days(365_000)
    board.repository.publish()
    board.look()
    eternal = dict(board.content)
    board.repository.expires["timestamp"] = in_days(7)
    board.repository.publish()
    board.look()
    with board.refusing_metadata("registry.rollback"):
        board.content.clear()
        board.content.update(eternal)


def test_a_role_passed_off_as_another(board: Target) -> None:
    """Role confusion: validly signed targets metadata is served where the timestamp is due."""
    board.repository.publish()
    with board.refusing_metadata("registry.damaged"):
        board.content["timestamp.json"] = board.content["4.targets.json"]


def test_signatures_by_keys_that_metadata_brings_along(board: Target) -> None:
    """Bring your own key: the timestamp is signed by a key that only its own signature block names."""
    metadata = Metadata.from_bytes(board.content["timestamp.json"])
    metadata.signatures.clear()
    metadata.sign(CryptoSigner.generate_ed25519())
    with board.refusing_metadata("registry.bad_signature"):
        board.content["timestamp.json"] = metadata.to_bytes()
