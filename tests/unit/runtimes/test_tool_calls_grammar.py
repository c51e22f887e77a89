from __future__ import annotations

from typing import Any

import pytest

from garrison_agent.runtimes.openai.tool_calls_grammar import (
    CallForm,
    Constraint,
    ToolUse,
    call_form,
    call_or_answer,
    constraint,
)
from garrison_protocol.errors import InvalidError

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
UNSUPPORTED = {"type": "object", "not": {"type": "string"}}


def use(
    schema: dict[str, Any] = CITY, *, required: bool = False, several: bool = False, strict: bool = False
) -> ToolUse:
    return ToolUse({"f": schema}, {"f"} if strict else (), required=required, several=several)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% for message in messages %}{{ message.content }}{% endfor %}", CallForm.TAGGED),
        ("... <tool_call>\n{name} ...", CallForm.TAGGED),
        ("{{ '[TOOL_CALLS] ' }}", CallForm.LIST),
        ("{% if message.role == 'ipython' %}{{ '\"parameters\": ' }}", CallForm.OBJECT),
    ],
)
def test_the_form_is_the_one_that_the_template_shows(template: str, form: CallForm) -> None:
    assert call_form(template) is form


def test_nothing_asked_holds_to_nothing() -> None:
    assert constraint(None, CallForm.TAGGED, None) == Constraint()


def test_a_call_that_is_required_has_no_trigger() -> None:
    held = constraint(use(required=True), CallForm.TAGGED, None)
    assert held.grammar is not None
    assert held.grammar_triggers == ()


@pytest.mark.parametrize("form", CallForm)
def test_a_call_by_choice_holds_from_its_beginning(form: CallForm) -> None:
    held = constraint(use(), form, None)
    assert held.grammar is not None
    assert held.grammar_triggers == (form.trigger,)
    assert (form.value[0] + '{"name"').startswith(form.trigger), "the trigger is the grammar's first text"


def test_a_schema_that_makes_no_grammar_is_kept_only_if_it_must_be() -> None:
    assert constraint(use(UNSUPPORTED), CallForm.TAGGED, None).grammar is not None
    assert constraint(use(UNSUPPORTED), CallForm.TAGGED, CITY).grammar is not None
    with pytest.raises(InvalidError) as refused:
        constraint(use(UNSUPPORTED, strict=True), CallForm.TAGGED, None)
    assert refused.value.code == "inference.schema_unsupported"


def test_references_of_a_schema_move_with_it() -> None:
    schema = {"$defs": {"Z": {"enum": ["a"]}}, "properties": {"z": {"$ref": "#/$defs/Z"}, "self": {"$ref": "#"}}}
    moved = call_or_answer(use(schema), CallForm.TAGGED, {"$ref": "#/$defs/X", "$defs": {"X": {"type": "null"}}})
    tool = moved["$defs"]["tool0"]
    assert tool["properties"] == {"z": {"$ref": "#/$defs/tool0/$defs/Z"}, "self": {"$ref": "#/$defs/tool0"}}
    assert moved["$defs"]["answer"]["$ref"] == "#/$defs/answer/$defs/X"
