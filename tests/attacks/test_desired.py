"""Attacks on what a board is told to run: by the broker, by a thief of the director key, by a careless director."""

from __future__ import annotations

import pytest

from garrison_agent.events import Tick
from garrison_agent.owner.inbound import HINTS, HINTS_IN_S
from garrison_agent.registry.trust import Refresh
from garrison_protocol import topics
from garrison_protocol.envelope import seal
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import PackageRef, Requirements
from garrison_protocol.messages import desired as desired_state
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import Desired
from garrison_protocol.messages.streams import Receipt
from garrison_protocol.states import Engine, KeyPurpose, Stream
from tests.attacks.target import Target
from tests.fakes.packages import Package, make_package
from tests.unit.loop.rig import BOARD, DEVICE, DIRECTOR, RECEIPTS, entry, fleet_json, package

DESIRED = topics.down(DEVICE, topics.Down.DESIRED)
RECEIPT = topics.down(DEVICE, topics.Down.RECEIPT)


def needing(requirements: Requirements, *, engine: Engine = Engine.LLAMA_CPP) -> Package:
    """Return ``chat:3.0``, which needs that of a board."""
    made = make_package("chat", "3.0", engine=engine)
    variant = made.variant.model_copy(update={"requirements": requirements})
    return Package(made.manifest.model_copy(update={"variants": (variant,)}), made.blobs)


# --- by the broker, without a key ------------------------------------------------------------------------------------


def test_replay_of_an_older_desired_state(board: Target) -> None:
    """Rollback of desired state: the broker shows the board a genuine desired state from before the current one."""
    older = board.desire(entry(package("1.0").ref, "r1"))
    board.settle()
    board.deploy(package("2.0"), "r2")
    with board.refusing_message("desired.counter_not_newer"):
        board.receive(DESIRED, older)
    assert board.models.running == ["chat:2.0"]


def test_replay_of_the_current_desired_state(board: Target) -> None:
    """Replayed desired state: the broker repeats the current one, a thousand times, to wear the board out."""
    current = board.desire(entry(package("1.0").ref, "r1"))
    board.settle()
    before, audit = board.standing(), board.audit()
    for _ in range(1000):
        board.receive(DESIRED, current)
    board.settle()
    assert (board.standing(), board.audit()) == (before, audit)
    assert not board.refused


def test_replay_of_the_current_desired_state_after_a_restart(board: Target) -> None:
    """Replayed desired state: an older one is shown again after the agent was restarted."""
    older = board.desire(entry(package("1.0").ref, "r1"))
    board.settle()
    board.deploy(package("2.0"), "r2")
    board.restart()
    board.connect()
    with board.refusing_message("desired.counter_not_newer"):
        board.receive(DESIRED, older)


def test_a_desired_state_of_another_board(board: Target) -> None:
    """Misdirection: the broker hands this board the genuine desired state of another one."""
    other = seal(desired_state.KIND, encode(Desired(device="edge-2", counter=99, aliases=())), DIRECTOR)
    with board.refusing_message("message.misaddressed"):
        board.receive(DESIRED, other)


def test_a_desired_state_on_another_boards_topic(board: Target) -> None:
    """Misdirection: a message for another board's topic reaches this one."""
    other = seal(desired_state.KIND, encode(Desired(device="edge-2", counter=99, aliases=())), DIRECTOR)
    with board.refusing_message("message.misaddressed"):
        board.receive(topics.down("edge-2", topics.Down.DESIRED), other)


def test_a_board_signing_desired_state_for_its_neighbour(board: Target) -> None:
    """Stolen board: the identity key of an enrolled board signs desired state."""
    with board.refusing_message("envelope.key_unknown"):
        board.desire(entry(package("2.0").ref, "r2"), counter=50, key=BOARD)


def test_the_receipt_key_signing_desired_state(board: Target) -> None:
    """Key misuse: the stolen receipt key signs desired state."""
    with board.refusing_message("envelope.key_unknown"):
        board.desire(entry(package("2.0").ref, "r2"), counter=50, key=RECEIPTS)


def test_a_receipt_passed_off_as_desired_state(board: Target) -> None:
    """Kind confusion: something else that the director signed is put on the topic of desired state."""
    with board.refusing_message("envelope.kind_unexpected"):
        board.receive(DESIRED, seal("anchor", encode(Desired(device=DEVICE, counter=99, aliases=())), DIRECTOR))


def test_an_emptied_retained_desired_state(board: Target) -> None:
    """Deletion: the broker replaces the retained desired state by an empty message."""
    before, audit = board.standing(), board.audit()
    board.receive(DESIRED, b"")
    board.settle()
    assert (board.standing(), board.audit()) == (before, audit)


def test_two_desired_states_with_one_counter(board: Target) -> None:
    """Split view: a stolen director key signs a second desired state under a counter that is taken."""
    counter = board.parts.inbound.applied.counter
    with board.refusing_message("desired.conflict"):
        board.desire(entry(package("2.0").ref, "r2"), counter=counter)
    assert "alarm.desired_conflict" in board.audit()


def test_a_flood_of_forgeries_leaves_few_entries(board: Target) -> None:
    """Flood: ten thousand forged messages are to fill the disk with refusals."""
    before = board.standing()
    for _ in range(10_000):
        board.receive(DESIRED, b"{}")
        board.step()
    board.settle()
    assert board.refused["envelope.malformed"] == 10_000
    assert board.audit().count("desired.refused") == 1
    assert board.standing() == before


# --- receipts --------------------------------------------------------------------------------------------------------


def test_a_forged_receipt(board: Target) -> None:
    """Evidence destruction: a receipt by a key that is no receipt key tells the board that its audit rows arrived."""
    head = board.parts.journal.heads()["audit"]
    body = Receipt(device=DEVICE, stream=Stream.AUDIT, epoch=head.epoch, up_to=head.seq, hash=head.hash)
    with board.refusing_message("envelope.key_unknown", kind="message.refused"):
        board.receive(RECEIPT, seal("receipt", encode(body), DIRECTOR))
    assert board.parts.journal.heads()["audit"].acked == head.acked


def test_a_receipt_for_rows_that_never_were(board: Target) -> None:
    """Evidence destruction: a stolen receipt key confirms rows beyond the board's last one."""
    head = board.parts.journal.heads()["audit"]
    body = Receipt(device=DEVICE, stream=Stream.AUDIT, epoch=head.epoch, up_to=head.seq + 1000, hash=head.hash)
    before = board.standing()
    board.receive(RECEIPT, seal("receipt", encode(body), RECEIPTS))
    board.settle()
    assert board.parts.journal.heads()["audit"].acked == head.acked
    assert any(kind.startswith("alarm.") for kind in board.audit())
    assert board.standing() == before


# --- by a thief of the director key ----------------------------------------------------------------------------------


def test_a_stolen_director_key_sends_a_model_that_nobody_signed(board: Target) -> None:
    """Stolen director key: it names a package that the release signers never approved."""
    before = board.models.running, board.served
    board.desire(entry(package("6.6").ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "registry.target_unknown")
    assert board.headers("deployment.waiting")[-1]["code"] == "registry.target_unknown"
    assert (board.models.running, board.served) == before
    assert not (board.folder / "state/models/chat/6.6").exists()


def test_a_stolen_director_key_sends_another_manifest_under_a_signed_name(board: Target) -> None:
    """Stolen director key: it names a signed package, but another manifest than the one that was signed."""
    board.work.publish(package("2.0"))
    with board.refusing_package("registry.manifest_mismatch"):
        board.desire(entry(package("2.0").ref.model_copy(update={"manifest_sha256": "6" * 64}), "r2"))


def test_a_stolen_director_key_sends_a_withdrawn_version(board: Target) -> None:
    """Rollback of a model: a signed version below the floor that the release signers set is sent again."""
    board.deploy(package("2.0"), "r2")
    board.repository.set_fleet(floors={"chat": "2.0"})
    board.repository.publish()
    with board.refusing_package("registry.below_floor"):
        board.desire(entry(package("1.0").ref, "r3"))


@pytest.mark.parametrize(
    ("requirements", "engine"),
    [
        (Requirements(architectures=("riscv64",)), Engine.LLAMA_CPP),
        (Requirements(memory_mb=10**9), Engine.LLAMA_CPP),
        (Requirements(cpu_features=("made-of-cheese",)), Engine.LLAMA_CPP),
    ],
    ids=["architecture", "memory", "cpu"],
)
def test_a_signed_model_for_other_boards(board: Target, requirements: Requirements, engine: Engine) -> None:
    """Wrong model for the board: the director sends a signed model that is made for other hardware."""
    made = needing(requirements, engine=engine)
    board.work.publish(made)
    with board.refusing_package("requirements.not_met", state="REJECTED"):
        board.desire(entry(made.ref, "r2"))


def test_a_model_that_answers_badly(board: Target) -> None:
    """Sabotage by a signed model: it loads and runs, but answers worse than its manifest promises."""
    board.work.verdicts["chat:2.0"] = ("gate.accuracy", "1 of 9 cases")
    board.work.publish(package("2.0"))
    served = board.served
    board.desire(entry(package("2.0").ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("ROLLED_BACK", "gate.accuracy")
    assert board.headers("deployment.rolled_back")[-1]["code"] == "gate.accuracy"
    assert ([(alias, model) for alias, model, _ in board.served], board.models.running) == (
        [(alias, model) for alias, model, _ in served],
        ["chat:1.0"],
    )


def test_a_stolen_director_key_brings_its_own_fleet_file(board: Target) -> None:
    """Stolen director key: the controller serves a fleet.json of the thief's, with more keys and no floors."""
    forged = fleet_json((KeyPurpose.DIRECTOR, RECEIPTS), (KeyPurpose.RECEIPT, RECEIPTS))
    fleet, served = board.parts.trust.fleet, board.served
    board.repository.set_fleet(floors={"chat": "2.0"})
    board.repository.publish()
    targets = board.repository.content.targets
    for digest, path in list(targets):
        if path == "fleet.json":
            targets[(digest, path)] = forged
    board.look()
    assert board.headers("metadata.refused")[-1]["code"] == "registry.damaged"
    board.desire(entry(package("2.0").ref, "r2"), counter=50, key=RECEIPTS)
    board.settle()
    assert (board.parts.trust.fleet, board.served, board.parts.inbound.applied.counter) == (fleet, served, 1)


def test_a_desired_state_with_more_than_was_ordered(board: Target) -> None:
    """Extraneous dependencies: the registry holds further signed packages, and one that names further files."""
    for extra in (make_package("adapter", "1.0"), make_package("plugin", "1.0")):
        board.repository.add(extra)
    board.deploy(package("2.0"), "r2")
    assert {path.name for path in (board.folder / "state/models").iterdir()} == {"chat"}
    assert board.models.running == ["chat:2.0"]


def test_a_desired_state_with_a_thousand_aliases(board: Target) -> None:
    """Exhaustion: a stolen director key asks for more models than any board can hold."""
    alias = entry(PackageRef(name="chat", version="1.0", manifest_sha256="0" * 64))
    body = Desired.model_construct(device=DEVICE, counter=99, aliases=(alias,) * 1000)
    with board.refusing_message("message.malformed"):
        board.receive(DESIRED, seal(desired_state.KIND, encode(body), DIRECTOR))


def test_a_flood_of_hints_sets_no_pace(board: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flood: false notices and desired states by strangers, each of which makes the board verify metadata anew."""
    refresh, checks = board.work.refresh, list[float]()

    def counted(want: list[str], high_water: dict[str, int], floor_s: float) -> Refresh:
        checks.append(board.clock.monotonic_s)
        return refresh(want, high_water, floor_s)

    monkeypatch.setattr(board.work, "refresh", counted)
    stranger = SigningKey.generate()
    for number in range(100):
        board.receive(topics.REGISTRY_TIMESTAMP, b"%d" % number)
        board.receive(DESIRED, seal(desired_state.KIND, b"{}", stranger))
        board.settle()
    assert len(checks) <= HINTS
    board.forward(HINTS_IN_S)
    board.owner.handle(Tick.HEARTBEAT)
    board.settle()
    assert len(checks) == HINTS + 1, "the last hint is followed all the same"


def test_a_repeated_desired_state_makes_no_board_ask_for_anchors_without_end(board: Target) -> None:
    """Flood: a genuine desired state again and again, to a board that lost its store and gets no anchor."""
    sent = board.desire(entry(package("1.0").ref, "r1"))
    board.settle()
    board.kill()
    for path in board.config.database_path.parent.glob("agent.db*"):
        path.unlink()
    board.controller_silent = True
    board.start()
    board.connect()
    asked = board.asked
    for _ in range(100):
        board.receive(DESIRED, sent)
        board.settle()
    assert board.parts.inbound.held == board.counter
    assert board.asked == asked
