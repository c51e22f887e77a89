from __future__ import annotations

import asyncio
import gc
from concurrent.futures import Future

import pytest

from garrison_agent.api.access import ModelAccess
from garrison_agent.api.commands import Command, GetStatus, LoadModel
from garrison_agent.api.routes import RouteTable
from garrison_protocol.errors import ConflictError, NotFoundError, UnavailableError
from tests.fakes.local_owner import LocalOwner, make_route


def test_an_unknown_name_lists_the_known_ones() -> None:
    access = ModelAccess(LocalOwner(make_route()).read, LocalOwner().post)
    with pytest.raises(NotFoundError) as caught:
        access.find("gpt-4")
    assert caught.value.hint == "known here: chat, smollm2:1.0.0"
    assert access.find("chat").alias == "chat"


def test_an_owner_that_is_busy_or_refuses() -> None:
    async def scenario() -> None:
        silent = ModelAccess(RouteTable, LocalOwner().post)
        with pytest.raises(UnavailableError, match=r"agent\.busy"):
            await silent.ask(GetStatus(), 0.01)
        with pytest.raises(UnavailableError, match=r"model\.loading"):
            await silent.ask(LoadModel("chat"), 0.01)
        refusing = ModelAccess(RouteTable, LocalOwner(answer=lambda command: ConflictError("a.b", "no")).post)
        with pytest.raises(ConflictError, match=r"a\.b"):
            await refusing.ask(GetStatus(), 5)

    asyncio.run(scenario())


def test_a_late_refusal_that_nobody_waits_for_is_silent_and_never_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    late: Future[object] = Future()

    def post(command: Command) -> Future[object]:
        return late

    async def scenario() -> None:
        with pytest.raises(UnavailableError):
            await ModelAccess(RouteTable, post).ask(GetStatus(), 0.01)
        assert late.set_running_or_notify_cancel()
        late.set_exception(ConflictError("a.b", "too late"))
        await asyncio.sleep(0)

    asyncio.run(scenario())
    gc.collect()
    assert caplog.text == ""
