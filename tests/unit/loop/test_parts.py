"""Parts of the owner on their own: configuration, stored slots, connection numbers, timers."""

from __future__ import annotations

from pathlib import Path

import pytest

from garrison_agent.adapters.database import Database
from garrison_agent.adapters.slots import SlotStore
from garrison_agent.config import load_config
from garrison_agent.events import Tick
from garrison_agent.owner.numbers import BLOCK, ConnectionNumbers
from garrison_agent.owner.timers import Timers
from garrison_protocol.errors import GarrisonError, InvalidError, NotFoundError, UnavailableError
from garrison_protocol.states import DeploymentState as State
from tests.unit.core.slots import slot_in


def test_every_slot_survives_the_store(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db")
    store = SlotStore(database)
    for state in State:
        slot = slot_in(state)
        store.save(slot)
        assert store.load() == {"chat": slot}
    database.connection.execute("UPDATE slot SET record = '{\"alias\": 1}'")
    with pytest.raises(GarrisonError, match=r"database\.damaged"):
        store.load()
    database.close()


def test_connection_numbers_only_grow(tmp_path: Path) -> None:
    low: list[bool] = []
    taken: list[int] = []
    for _ in range(3):
        database = Database(tmp_path / "agent.db")
        numbers = ConnectionNumbers(database, lambda: low.append(True))
        taken += [numbers.take() for _ in range(BLOCK)]
        assert low
        with pytest.raises(UnavailableError):
            numbers.take()
        numbers.reserve()
        taken.append(numbers.take())
        assert numbers.current == taken[-1]
        database.close()
    assert taken == sorted(set(taken))


def test_timers_come_in_order_and_not_before_their_time() -> None:
    now = [0.0]
    timers = Timers(lambda: now[0])
    assert timers.next_s() is None
    timers.after(2.0, Tick.SOAK)
    timers.after(1.0, Tick.PUMP)
    assert (timers.next_s(), timers.due()) == (1.0, None)
    now[0] = 5.0
    assert timers.next_s() == 0.0
    assert [timers.due(), timers.due(), timers.due()] == [Tick.PUMP, Tick.SOAK, None]


def test_a_timer_that_is_moved_comes_once() -> None:
    now = [0.0]
    timers = Timers(lambda: now[0])
    for delay_s in (3.0, 1.0, 2.0):
        timers.move(delay_s, Tick.IDLE)
    timers.after(1.5, Tick.PUMP)
    assert timers.next_s() == 1.5
    now[0] = 9.0
    assert [timers.due(), timers.due(), timers.due()] == [Tick.PUMP, Tick.IDLE, None]


def test_configuration_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('state_dir = "/s"\n[mqtt]\nprotocol = "3.1.1"\n[limits]\nmemory_budget_mb = 512\n')
    config = load_config(path)
    assert (config.database_path, config.mqtt.protocol, config.limits.memory_budget_mb) == (
        Path("/s/agent.db"),
        "3.1.1",
        512,
    )
    assert config.api.port == 5273
    for text in ("[mqtt]\nprotokol = 1\n", "[api]\nport = 70000\n", "state_dir =", "[mqtt]\nprotocol = '4'\n"):
        path.write_text(text)
        with pytest.raises(InvalidError, match=r"config\.invalid"):
            load_config(path)
    with pytest.raises(NotFoundError, match=r"config\.not_found"):
        load_config(tmp_path / "none.toml")
