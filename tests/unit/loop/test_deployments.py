"""The owner over fake ports: deployments, from desired state to what serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from garrison_agent.owner.shelf import Shelf
from garrison_protocol.errors import InsufficientError, RefusedError, UnavailableError
from garrison_protocol.states import DeploymentState as State
from garrison_protocol.states import WaitReason
from tests.fakes.packages import Package
from tests.unit.loop.rig import DEVICE, FLEET, Rig, entry, package


def test_from_desired_state_to_service(rig: Rig) -> None:
    rig.connect()
    one = package("1.0")
    rig.work.publish(one)
    rig.desire(entry(one.ref, soak_s=30))
    rig.settle()
    assert rig.state == "SOAKING"
    assert rig.parts.routes.table.find("chat") is not None
    rig.forward(29)
    assert rig.state == "SOAKING"
    rig.forward(2)
    assert rig.state == "ACTIVE"
    assert rig.models.running == ["chat:1.0"]
    report = rig.reported()
    assert (report.state, report.loaded, report.serving) == (State.ACTIVE, True, one.ref)
    assert report.evaluation is not None
    assert report.progress_bytes == report.total_bytes == one.variant.size_bytes
    expected = ["assigned", "downloading", "verifying", "staged", "loading", "evaluating", "soaking", "active"]
    assert [kind.removeprefix("deployment.") for kind in rig.audit() if kind.startswith("deployment.")] == expected
    assert "desired.accepted" in rig.audit()
    assert "model.loaded" in rig.audit()


def test_served_from_disk_after_a_kill_with_no_network(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.work.offline_now = True
    rig.work.log.clear()
    rig.restart()
    assert rig.state == "ACTIVE"
    route = rig.parts.routes.table.find("chat:1.0")
    assert route is not None
    assert route.socket is not None
    assert set(rig.work.log) <= {"offline"}
    assert rig.notified[0].startswith("READY=1")


def update(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    two = package("2.0")
    rig.work.publish(two)
    rig.desire(entry(two.ref, "r2"))


@pytest.mark.parametrize("bad", [False, True])
def test_killed_after_every_event_of_an_update(tmp_path: Path, bad: bool) -> None:
    """SIGKILL after each single thing that happens; the right model serves afterwards, and the record is whole."""
    steps = 0
    while True:
        rig = Rig(tmp_path / str(steps))
        rig.settle()
        if bad:
            rig.work.verdicts["chat:2.0"] = ("gate.accuracy", "worse")
        update(rig)
        finished = not all(rig.step() for _ in range(steps))
        envelope = rig.desire(entry(package("2.0").ref, "r2"), counter=rig.counter)
        rig.restart()
        rig.connect()
        rig.receive(f"garrison/v1/down/{DEVICE}/desired", envelope)
        rig.forward(1)
        assert (rig.state, rig.slot.rollout) == ("ROLLED_BACK" if bad else "ACTIVE", "r2")
        assert rig.models.running == ["chat:1.0" if bad else "chat:2.0"]
        assert rig.audit().count("desired.accepted") == 2
        numbers = rig.database.connection.execute("SELECT seq FROM entry WHERE stream = 'audit' ORDER BY seq")
        assert [number for (number,) in numbers] == list(range(1, len(rig.audit()) + 1))
        rig.database.close()
        if finished:
            break
        steps += 1
    assert steps > 10


def test_a_bad_model_rolls_back_by_itself(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.work.verdicts["chat:2.0"] = ("gate.accuracy", "0 of 2 cases passed")
    rig.deploy(package("2.0"), "r2")
    assert rig.state == "ROLLED_BACK"
    assert rig.models.running == ["chat:1.0"]
    report = rig.reported()
    assert (report.error_code, report.serving) == ("gate.accuracy", package("1.0").ref)


def test_old_and_new_never_together_where_memory_is_short(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0", memory_mb=600), "r1")
    two = package("2.0", memory_mb=700)
    rig.work.publish(two)
    rig.desire(entry(two.ref, "r2"))
    most = 0
    while rig.step():
        most = max(most, len(rig.models.running))
    rig.forward(1)
    assert most == 1
    assert rig.models.running == ["chat:2.0"]


def test_more_than_the_whole_budget_is_rejected(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0", memory_mb=5000), "r1")
    assert (rig.state, rig.slot.error_code) == ("REJECTED", "requirements.not_met")


def test_waits_for_memory_that_others_hold(rig: Rig) -> None:
    rig.connect()
    other, one = package("1.0", name="other", memory_mb=900), package("1.0", memory_mb=300)
    rig.work.publish(other)
    rig.work.publish(one)
    rig.desire(entry(other.ref, alias="other"), entry(one.ref))
    rig.settle()
    waiting = [slot for slot in rig.parts.deployments.slots.values() if slot.state is State.WAITING]
    assert [(slot.wait, slot.error_code) for slot in waiting] == [(WaitReason.BUSY, "memory.busy")]
    rig.desire(entry(one.ref))
    rig.forward(2000)
    assert rig.state == "ACTIVE"
    assert rig.models.running == ["chat:1.0"]


def test_a_network_failure_waits_and_comes_back(rig: Rig) -> None:
    one = package("1.0")
    rig.connect()
    rig.work.publish(one)
    rig.work.download_error = UnavailableError("download.interrupted", "the connection ended", retryable=True)
    rig.desire(entry(one.ref))
    rig.settle()
    assert (rig.state, rig.slot.error_code) == ("WAITING", "download.interrupted")
    rig.work.download_error = None
    rig.forward(10)
    assert rig.state == "ACTIVE"
    assert rig.slot.error_code is None


def test_wrong_bytes_fail_the_deployment_and_the_old_model_never_stops(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.work.download_error = RefusedError("download.digest_mismatch", "chunk 3 is not the one that was signed")
    started = len(rig.models.started)
    rig.deploy(package("2.0"), "r2")
    assert (rig.state, rig.slot.error_code) == ("FAILED", "download.digest_mismatch")
    assert rig.models.running == ["chat:1.0"]
    assert len(rig.models.started) == started


def test_a_full_disk_is_waited_for(rig: Rig) -> None:
    rig.connect()
    rig.work.download_error = InsufficientError("disk.full", "no space left", retryable=True)
    rig.deploy(package("1.0"), "r1")
    assert (rig.state, rig.slot.error_code) == ("WAITING", "disk.full")


def test_nothing_is_installed_that_the_registry_does_not_name(rig: Rig) -> None:
    rig.connect()
    signed, other = package("1.0"), package("1.0", memory_mb=201)
    rig.work.publish(signed)
    rig.desire(entry(other.ref))
    rig.settle()
    assert (rig.state, rig.slot.error_code) == ("FAILED", "registry.manifest_mismatch")
    rig.desire(entry(package("3.0").ref, "r2"))
    rig.settle()
    assert (rig.state, rig.slot.error_code) == ("WAITING", "registry.target_unknown")
    rig.work.publish(package("3.0"))
    rig.receive("garrison/v1/registry/timestamp", b"{}")
    rig.forward(1)
    assert rig.state == "ACTIVE"


def test_a_withdrawn_version_is_refused(rig: Rig) -> None:
    rig.work.fleet = FLEET.replace(b'"floors":{}', b'"floors":{"chat":"2.0"}')
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    assert (rig.state, rig.slot.error_code) == ("FAILED", "registry.below_floor")


def test_a_corrupt_file_is_found_at_the_next_load_and_repaired(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.models.broken["chat:1.0"] = ("model.digest_mismatch", "model.gguf differs")
    rig.work.offline_now = True
    rig.restart()
    rig.connect()
    assert rig.state == "REPAIRING"
    assert rig.reported().loaded is False
    rig.models.broken.clear()
    rig.work.offline_now = False
    rig.forward(30)
    assert rig.state == "ACTIVE"
    assert rig.models.running == ["chat:1.0"]
    kinds = rig.audit()
    assert kinds.index("model.corrupt") < kinds.index("model.repaired")
    assert kinds[kinds.index("model.corrupt") :].count("model.loaded") == 1


def test_a_crashed_worker_is_started_again(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.models.worker("chat:1.0").die(-11)
    rig.settle()
    assert rig.slot.phase.value == "backoff"
    route = rig.parts.routes.table.find("chat")
    assert route is not None
    assert route.socket is None
    rig.forward(2)
    assert rig.slot.phase.value == "ready"
    assert "model.crashed" in rig.audit()


def test_no_longer_desired_is_removed(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.desire()
    rig.forward(1)
    assert rig.state == "REMOVED"
    assert rig.models.running == []
    assert rig.parts.routes.table.routes == ()
    assert rig.reported().state is State.REMOVED
    rig.deploy(package("1.0"), "r1")
    assert rig.state == "ACTIVE"


def test_the_disk_is_made_free_of_what_nobody_uses(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.connect()
    for number in (1, 2):
        rig.deploy(package(f"{number}.0"), f"r{number}")
    three = package("3.0")
    size, reserve = three.variant.size_bytes, 1024 * 1024
    monkeypatch.setattr(rig.shelf.blobs, "free_bytes", lambda: reserve + size - 1)
    rig.deploy(three, "r3")
    assert rig.state == "ACTIVE"
    assert rig.headers("disk.evicted")[0]["models"] == "chat:1.0"
    assert {one.ref.id for one in rig.shelf.packages()} == {"chat:2.0", "chat:3.0"}


def test_too_little_disk_is_noticed_before_the_download(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    rig.work.log.clear()
    monkeypatch.setattr(rig.shelf.blobs, "free_bytes", lambda: 0)
    rig.deploy(package("2.0"), "r2")
    assert (rig.state, rig.slot.error_code) == ("WAITING", "disk.insufficient")
    assert rig.models.running == ["chat:1.0"]
    assert not any(line.startswith("download") for line in rig.work.log)


def test_two_downloads_at_once_share_what_disk_there_is(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.connect()
    chat, code = package("1.0"), package("1.0", "code")
    size, reserve = max(chat.variant.size_bytes, code.variant.size_bytes), 1024 * 1024
    monkeypatch.setattr(rig.shelf.blobs, "free_bytes", lambda: reserve + size)
    for one in (chat, code):
        rig.work.publish(one)
    rig.desire(entry(chat.ref), entry(code.ref, alias="code"))
    rig.settle()
    assert sorted(slot.state.value for slot in rig.parts.deployments.slots.values()) == ["ACTIVE", "WAITING"]
    rig.forward(60)
    assert {slot.state for slot in rig.parts.deployments.slots.values()} == {State.ACTIVE}


def test_after_a_kill_a_candidate_asks_for_memory_last(rig: Rig) -> None:
    rig.connect()
    other = package("1.0", "zebra", memory_mb=600)
    rig.work.publish(other)
    rig.desire(entry(other.ref, alias="zebra"))
    rig.settle()
    rig.forward(1)
    made = package("1.0", memory_mb=600)
    rig.work.publish(made)
    rig.desire(entry(other.ref, alias="zebra"), entry(made.ref))
    while "chat" not in rig.parts.deployments.slots or rig.state != "STAGED":
        assert rig.step()
    rig.restart()
    assert rig.models.running == ["zebra:1.0"]
    assert rig.state == "WAITING"


def test_settings_that_no_engine_takes_fail_the_deployment_only(rig: Rig) -> None:
    rig.connect()
    rig.deploy(package("1.0"), "r1")
    made = package("2.0")
    variant = made.variant.model_copy(update={"model_settings": {"threads": "auto"}})
    made = Package(made.manifest.model_copy(update={"variants": (variant,)}), made.blobs)
    rig.deploy(made, "r2")
    assert (rig.state, rig.slot.error_code) == ("ROLLED_BACK", "manifest.malformed")
    assert rig.models.running == ["chat:1.0"]


def test_a_manifest_that_cannot_be_read_is_repaired(rig: Rig) -> None:
    rig.connect()
    made = package()
    rig.deploy(made, "r1")
    path = rig.shelf.folder(made.ref.name, made.ref.version) / "manifest.json"
    path.unlink()
    path.mkdir()  # an OSError that is not "not found", as for a bad sector
    rig.shelf = Shelf(rig.shelf.root, rig.shelf.blobs)
    rig.restart()
    assert (rig.state, rig.models.running) == ("REPAIRING", [])
    assert "model.corrupt" in rig.audit()
    assert rig.work.log[-1] == "repair chat:1.0"


def test_desired_state_and_slots_are_one_transaction(rig: Rig) -> None:
    """A kill right after the acceptance leaves slots that go on by themselves, for it is not sent to be done again."""
    rig.connect()
    one = package("1.0")
    rig.work.publish(one)
    envelope = rig.desire(entry(one.ref))
    rig.step()
    rig.kill()
    rig.start()
    rig.connect()
    rig.receive(f"garrison/v1/down/{DEVICE}/desired", envelope)
    rig.forward(1)
    assert rig.state == "ACTIVE"
    assert rig.audit().count("desired.accepted") == 1
