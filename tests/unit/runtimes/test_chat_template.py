"""Chat templates, honest and hostile, rendered by the real process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psutil
import pytest

from garrison_agent.runtimes.openai import chat_template
from garrison_agent.runtimes.openai.chat_template import ChatTemplate
from garrison_protocol.errors import GarrisonError, InvalidError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]
T = TypeVar("T")


def with_template(source: str, use: Callable[[ChatTemplate], Awaitable[T]], end_text: str = "</s>") -> T:
    """Return what ``use`` returns; the process never outlives it."""

    async def run() -> T:
        template = ChatTemplate()
        try:
            await template.load(source, begin_text="<s>", end_text=end_text)
            return await use(template)
        finally:
            template.close()

    return asyncio.run(run())


def render(source: str, messages: list[dict[str, Any]] = HELLO, **more: Any) -> str:
    return with_template(source, lambda template: template.render(messages, **more))


def test_messages_become_a_prompt() -> None:
    assert render(PLAIN + "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == "user: hello\n<s></s>True"


def test_what_hugging_face_gives_templates_is_there() -> None:
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{{ tools | tojson }}", tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'
    assert render("{{ tools is none }}") == "True"
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"


def test_what_a_template_knows_is_found_out() -> None:
    assert with_template("{% if tools %}{% endif %}", takes_tools)
    assert not with_template("{{ 'tools' }}", takes_tools)


async def takes_tools(template: ChatTemplate) -> bool:
    return template.takes_tools


def test_a_developer_is_the_system_where_templates_know_only_that() -> None:
    turn = [{"role": "developer", "content": "x"}]
    assert render(PLAIN, turn) == "system: x\n"
    assert render(PLAIN + "{# developer #}", turn) == "developer: x\n"


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 5000, "{% if 1 %}" * 3000 + "{% endif %}" * 3000])
def test_what_is_no_template_is_refused_when_it_is_loaded(source: str) -> None:
    with pytest.raises(InvalidError) as refused:
        render(source)
    assert refused.value.code == "model.load_failed"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system here') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('{0.__class__}' | format_map) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ '\\ud800' }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_template_may_not_do_refuses_the_messages(source: str) -> None:
    with pytest.raises(InvalidError) as refused:
        render(source)
    assert refused.value.code in ("inference.messages_refused", "model.load_failed")
    assert "root:" not in refused.value.message


BOUNDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10**9 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%01000000000d' % 1 }}",
    "{{ ('a' * 10**6) | replace('a', 'a' * 10**6) }}",
    "{{ range(99999) | join('a' * 100000) }}",
    "{{ (messages * 10**9) | tojson }}",
]


@pytest.mark.parametrize("source", BOUNDLESS)
def test_a_template_without_bounds_is_stopped_and_the_next_one_is_served(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop goes on meanwhile: another template renders while this one runs."""
    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_S", 0.5)

    async def use(template: ChatTemplate) -> None:
        honest = ChatTemplate()
        await honest.load(PLAIN, begin_text="", end_text="")
        try:
            runs = asyncio.ensure_future(template.render(HELLO))
            assert await honest.render(HELLO) == "user: hello\n"
            with pytest.raises(GarrisonError) as stopped:
                await runs
            assert stopped.value.code == "inference.template_failed"
            assert stopped.value.http_status == 500
        finally:
            honest.close()

    with_template(source, use)


def test_a_template_that_failed_once_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_S", 0.5)
    source = "{% if messages[0].content == 'x' %}" + BOUNDLESS[0] + "{% endif %}" + PLAIN

    async def use(template: ChatTemplate) -> str:
        with pytest.raises(GarrisonError):
            await template.render([{"role": "user", "content": "x"}])
        return await template.render(HELLO)

    assert with_template(source, use) == "user: hello\n"


def test_a_caller_that_gives_up_does_not_shift_the_answers() -> None:
    source = "{% if messages[0].content == 'x' %}" + BOUNDLESS[0] + "{% endif %}" + PLAIN

    async def use(template: ChatTemplate) -> str:
        gone = asyncio.ensure_future(template.render([{"role": "user", "content": "x"}]))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        return await template.render(HELLO)

    assert with_template(source, use) == "user: hello\n"


def test_no_process_stays_behind() -> None:
    before = set(psutil.Process().children())
    render(PLAIN)
    assert set(psutil.Process().children()) == before
