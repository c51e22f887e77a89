"""Attacks with time: on the board's clock, with frozen metadata, and by a thief of the director key."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from garrison_agent.api.commands import LoadModel
from garrison_agent.core.certificate import Validity
from garrison_agent.events import AnchorAnswered, Tick
from garrison_agent.owner.anchor import NONCE_BYTES
from garrison_agent.registry.trust import Refresh
from garrison_protocol.envelope import seal
from garrison_protocol.errors import UnavailableError
from garrison_protocol.fleet import FLEET_TARGET, parse_fleet
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import Lease
from garrison_protocol.messages.base import encode
from garrison_protocol.messages.desired import KIND, Desired
from garrison_protocol.states import Freshness, KeyPurpose
from tests.attacks.target import Target
from tests.fakes.packages import Package
from tests.fakes.tuf_repository import in_days
from tests.unit.loop.rig import BOARD, DEVICE, DIRECTOR, RECEIPTS, entry, package

DAY_S = 86_400.0
Y2100_S = datetime(2100, 1, 1, tzinfo=UTC).timestamp()


def floor_s(board: Target) -> float:
    return board.parts.timekeeper.floor_s()


def power_cycle(board: Target, *, clock_s: float) -> None:
    """Power comes back with another time on the board's clock."""
    board.parts.timekeeper.keep(ending=True)
    board.clock.wall_s = clock_s
    board.restart()


def answer(board: Target, **said: object) -> None:
    """Let somebody answer the nonce of the board's next question."""
    board.disconnect()
    board.answer_with = said
    board.connect()
    board.answer_with = {}


def leased(on_expiry: str) -> Package:
    """Return ``chat:1.0`` with a lease of ten days."""
    made = package("1.0")
    lease = Lease.model_validate({"days": 10, "on_expiry": on_expiry})
    return Package(made.manifest.model_copy(update={"lease": lease}), made.blobs)


# --- the clock -------------------------------------------------------------------------------------------------------


def test_a_clock_at_1970_does_not_make_old_metadata_fresh(board: Target) -> None:
    """Clock put back: after a power cut the clock says 1970, and the metadata of last week is served once more."""
    board.clock.forward(8 * DAY_S)
    power_cycle(board, clock_s=0)
    with board.refusing_metadata("registry.expired"):
        pass
    assert board.parts.trust.view.freshness == "STALE"
    assert board.models.running == ["chat:1.0"]


def test_nothing_is_installed_by_a_clock_that_is_known_to_be_wrong(board: Target) -> None:
    """Clock put back: the clock says 1970, and whoever stands in between withholds the controller's signed time."""
    board.controller_silent = True
    power_cycle(board, clock_s=0)
    board.connect()
    board.repository.add(package("2.0"))
    board.repository.publish()
    board.desire(entry(package("2.0").ref, "r2"))
    board.settle()
    assert (board.state, board.slot.error_code) == ("WAITING", "time.not_anchored")
    assert board.models.running == ["chat:1.0"]
    board.controller_silent = False
    answer(board, time_s=time.time())
    board.forward(60)
    assert board.models.running == ["chat:2.0"]


def test_a_clock_at_2100_installs_nothing_and_stops_nothing(board: Target) -> None:
    """Clock put forward: everything seems to have ended. What runs goes on, and a right clock puts all right."""
    was = board.clock.wall_s
    power_cycle(board, clock_s=Y2100_S)
    board.connect()
    board.look()
    assert board.parts.trust.view.freshness == "STALE"
    assert board.models.running == ["chat:1.0"]
    assert floor_s(board) < was + DAY_S
    power_cycle(board, clock_s=was)
    board.connect()
    board.deploy(package("2.0"), "r2")
    assert board.models.running == ["chat:2.0"]


def test_the_clock_never_raises_the_floor(board: Target) -> None:
    """Clock put forward for a moment: a board that believed it for ever would refuse everything from then on."""
    before = floor_s(board)
    for clock_s in (Y2100_S, 0.0, time.time()):
        power_cycle(board, clock_s=clock_s)
    assert floor_s(board) == pytest.approx(before, abs=1)


def test_a_lease_does_not_start_again_when_the_clock_is_put_back(board: Target) -> None:
    """Clock put back: a model that had to stop for want of news is revived by a false clock and a restart."""
    board.deploy(leased("stop"), "r2")
    began = board.clock.wall_s
    board.controller_silent = board.work.offline_now = True
    board.disconnect()
    board.clock.forward(11 * DAY_S)
    board.owner.handle(Tick.HEARTBEAT)
    assert board.models.running == []
    for clock_s in (began, 0.0):
        power_cycle(board, clock_s=clock_s)
        assert board.models.running == []
        assert board.slot.barred
    with pytest.raises(UnavailableError, match=r"model\.lease_expired"):
        board.ask(LoadModel("chat")).result(0)
    board.controller_silent = board.work.offline_now = False
    board.repository.expires |= {"snapshot": in_days(60), "timestamp": in_days(40)}
    board.repository.publish()
    board.connect()
    board.look()
    assert board.models.running == ["chat:1.0"]


# --- freeze ----------------------------------------------------------------------------------------------------------


def test_a_freeze_ends_a_lease(board: Target) -> None:
    """Indefinite freeze: news is withheld for longer than a model may serve without; it says so, then serves on."""
    board.deploy(leased("warn"), "r2")
    board.clock.forward(11 * DAY_S)
    board.look()
    board.forward(1)
    assert board.parts.trust.view.freshness == "STALE"
    assert board.statuses()[-1].registry.freshness is Freshness.LEASE_EXPIRED
    assert board.reported().lease_expired
    assert board.headers("lease.ended")[-1]["stops"] is False
    assert board.models.running == ["chat:1.0"]


# --- anchors ---------------------------------------------------------------------------------------------------------


def test_a_replayed_anchor(board: Target) -> None:
    """Replay: an anchor of before is given as the answer to a new nonce, to tell an earlier time and counter."""
    kept = board.answers[-1]
    board.disconnect()
    before = floor_s(board)
    with board.refusing_message("anchor.nonce_unknown", kind="message.refused"):
        board.replay = kept
        board.connect()
    board.replay = None
    assert floor_s(board) == before


def test_an_anchor_that_nobody_asked_for(board: Target) -> None:
    """Injection: an anchor that the director signed over a nonce of somebody else's choice."""
    with board.refusing_message("anchor.nonce_unknown", kind="message.refused"):
        board.inbox.put(AnchorAnswered(board.anchor("0" * 2 * NONCE_BYTES), None))


def test_an_anchor_for_another_board(board: Target) -> None:
    """Misdirection: another board's anchor over this board's own nonce."""
    with board.refusing_message("message.misaddressed", kind="message.refused"):
        answer(board, device="edge-2")


@pytest.mark.parametrize("key", [RECEIPTS, BOARD, SigningKey.generate()], ids=["receipt", "board", "stranger"])
def test_an_anchor_by_a_key_that_may_not_tell_the_time(board: Target, key: SigningKey) -> None:
    """Forgery: an anchor signed by the receipt key, by the board's own key, or by a stranger's."""
    with board.refusing_message("envelope.key_unknown", kind="message.refused"):
        answer(board, key=key, time_s=board.clock.wall_s + 90 * DAY_S)


def test_a_desired_state_passed_off_as_an_anchor(board: Target) -> None:
    """Type confusion: a genuine desired state in the place of an anchor."""
    other = seal(KIND, encode(Desired(device=DEVICE, counter=9, aliases=())), DIRECTOR)
    board.disconnect()
    with board.refusing_message("envelope.kind_unexpected", kind="message.refused"):
        board.replay = other
        board.connect()
    board.replay = None


# --- a stolen director key -------------------------------------------------------------------------------------------


def test_a_stolen_director_key_moves_time_back(board: Target) -> None:
    """Stolen director key: an anchor says that it is yesterday, so that what ended today holds again."""
    before = floor_s(board)
    answer(board, time_s=board.clock.wall_s - DAY_S / 2)
    assert floor_s(board) == before


@pytest.mark.parametrize("days", [-30, 400])
def test_a_stolen_director_key_tells_a_time_outside_of_its_validity(board: Target, days: int) -> None:
    """Stolen director key: an anchor before the key's first day, or after its last."""
    with board.refusing_message("anchor.beyond_key", kind="message.refused"):
        answer(board, time_s=board.clock.wall_s + days * DAY_S)


def test_a_stolen_director_key_moves_time_forward_until_it_is_replaced(board: Target) -> None:
    """Stolen director key: an anchor says that it is months later, so that nothing honest is fresh for ever after."""
    before = floor_s(board)
    answer(board, time_s=board.clock.wall_s + 300 * DAY_S)
    board.look()
    assert board.parts.trust.view.freshness == "STALE"
    assert (floor_s(board) - before) // DAY_S == 300
    assert board.models.running == ["chat:1.0"]
    power_cycle(board, clock_s=board.clock.wall_s)
    assert (floor_s(board) - before) // DAY_S == 300, "a restart heals nothing"
    board.controller_silent = True
    board.look()
    assert board.parts.trust.view.freshness == "STALE", "the key is still named: its word stands"
    board.director = board.repository.director = SigningKey.generate()
    board.repository.set_fleet()
    board.repository.publish()
    board.look()
    assert board.parts.trust.view.freshness == "FRESH"
    assert floor_s(board) < before + DAY_S
    assert board.headers("time.key_gone")[-1]["signers"] == DIRECTOR.key_id
    board.controller_silent = False
    board.connect()
    board.work.publish(package("2.0"))
    board.desire(entry(package("2.0").ref, "r2"), key=board.director)
    board.forward(60)
    assert board.models.running == ["chat:2.0"]


def test_frozen_metadata_does_not_make_a_board_forget_the_time(board: Target) -> None:
    """Freeze and clock put back: metadata from before the signed time is served, to make the board doubt that time."""
    answer(board, time_s=board.clock.wall_s + 30 * DAY_S)
    before = floor_s(board)
    power_cycle(board, clock_s=0)
    with board.refusing_metadata("registry.expired"):
        pass
    assert floor_s(board) == pytest.approx(before, abs=1)


def test_a_stolen_director_key_tells_a_counter_that_no_desired_state_reaches(board: Target) -> None:
    """Stolen director key: an anchor names the highest counter, so that every honest desired state seems old."""
    board.signed_counter = 2**53 - 1
    answer(board)
    board.desire(entry(package("1.0").ref, "r1"))
    board.settle()
    assert board.refused == {"desired.below_anchor": 1}
    board.signed_counter = board.counter
    answer(board)
    board.deploy(package("2.0"), "r2")
    assert board.models.running == ["chat:2.0"]


def test_a_thief_of_two_director_keys_moves_time_forward_until_both_are_replaced(board: Target) -> None:
    """Stolen controller amid a rotation: both director keys say that it is months later; one doubt is not enough."""
    second, before = SigningKey.generate(), floor_s(board)
    fleet = parse_fleet(board.repository.targets[FLEET_TARGET])
    keys = [key for key in fleet.keys if key.purpose is KeyPurpose.DIRECTOR]
    both = (*fleet.keys, keys[0].model_copy(update={"public": second.public_hex}))
    board.repository.targets[FLEET_TARGET] = fleet.model_copy(update={"keys": both}).model_dump_json().encode()
    board.repository.publish()
    board.look()
    for key in (DIRECTOR, second):
        answer(board, key=key, time_s=board.clock.wall_s + 300 * DAY_S)
    board.controller_silent = True
    board.look()
    assert board.parts.trust.view.freshness == "STALE", "the keys are still named: their word stands"
    board.director = board.repository.director = SigningKey.generate()
    board.repository.set_fleet()
    board.repository.publish()
    board.look()
    assert board.parts.trust.view.freshness == "FRESH"
    assert floor_s(board) < before + DAY_S


def test_a_stolen_director_key_makes_every_server_seem_ended(board: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stolen director key: it says that the controller's own certificate has ended, to keep the way back shut."""
    ends_s, refresh = board.clock.wall_s + 100 * DAY_S, board.work.refresh

    def over_tls(want: list[str], high_water: dict[str, int], judged_s: float) -> Refresh:
        if max(judged_s, board.clock.wall_s) > ends_s:
            raise UnavailableError("source.unreachable", "the server's certificate expired", retryable=True)
        return refresh(want, high_water, judged_s)

    monkeypatch.setattr(board.work, "refresh", over_tls)
    answer(board, time_s=board.clock.wall_s + 300 * DAY_S)
    board.controller_silent = True
    board.look()
    assert board.parts.trust.last_error == "source.unreachable"
    board.director = board.repository.director = SigningKey.generate()
    board.repository.set_fleet()
    board.repository.publish()
    board.look()
    assert board.parts.trust.view.freshness == "FRESH"
    assert floor_s(board) < ends_s


def test_a_stolen_director_key_makes_a_board_renew_without_end(board: Target) -> None:
    """Stolen director key: a month is gone, it says, so that every new certificate of the board is due at once."""
    board.renew.validity = Validity(board.clock.wall_s, board.clock.wall_s + 30 * DAY_S)
    board.restart()
    answer(board, time_s=board.clock.wall_s + 31 * DAY_S)
    for _ in range(24 * 6):
        board.renew.now_s = board.clock.wall_s
        board.forward(600)
        board.owner.handle(Tick.HEARTBEAT)
        board.settle()
    assert 1 <= board.renew.tries <= 10
    assert board.models.running == ["chat:1.0"]
