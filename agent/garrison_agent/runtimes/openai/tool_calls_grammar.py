"""What a model that may or must call tools can write: a grammar made of the tools' own schemas.

A call that is required is held to from the first character on. A call that is the model's choice is held to from the
text on with which calls of this model begin (a lazy grammar), so that what begins as a call is one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any

from garrison_agent.runtimes.grammars.grammar import json_object_grammar, json_schema_grammar, tool_call_grammar
from garrison_agent.runtimes.openai.tool_calls import CLOSE_TAG, LIST_MARK, OPEN_TAG
from garrison_protocol.errors import InvalidError

MAX_CALLS = 8
"""In one answer."""
_CACHED_GRAMMARS = 16
_ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call, with the schemas of their arguments."""

    schemas: Mapping[str, Schema]
    strict: Collection[str]
    """The tools whose schema must be kept; those of others tell the model what is wanted, and are kept if possible."""
    required: bool
    """The answer is a call and nothing else."""
    several: bool
    """It may hold more than one."""


class CallForm(Enum):
    """How calls look in the answers of a model: what stands before, behind, and how arguments are named."""

    TAGGED = (f"{OPEN_TAG}\n", f"\n{CLOSE_TAG}", "arguments")
    OBJECT = ("", "", "parameters")
    LIST = (f"{LIST_MARK}[", "]", "arguments")

    @property
    def trigger(self) -> str:
        """The text with which a call begins."""
        return {CallForm.TAGGED: OPEN_TAG, CallForm.LIST: LIST_MARK, CallForm.OBJECT: '{"name"'}[self]


def call_form(template: str) -> CallForm:
    """Return the form that a chat template shows its model; the generic one is tagged, too."""
    if OPEN_TAG in template:
        return CallForm.TAGGED
    if LIST_MARK in template:
        return CallForm.LIST
    if '"parameters": ' in template and "ipython" in template:
        return CallForm.OBJECT
    return CallForm.TAGGED


@dataclass(frozen=True)
class Constraint:
    """What an answer is held to: the ``grammar`` and ``grammar_triggers`` of ``Options``."""

    grammar: str | None = None
    grammar_triggers: tuple[str, ...] = ()


def constraint(use: ToolUse | None, form: CallForm, answer: Schema | bool | None) -> Constraint:
    """Return what holds an answer to its tools, to the schema ``answer`` (True: any object), or to either of them.

    Takes a while with large schemas; call it outside of the event loop.

    Raises:
        InvalidError: ``inference.schema_unsupported``: ``answer``, or a strict tool's schema, cannot be turned into a
            grammar.
    """
    if use is None:
        if answer is None:
            return Constraint()
        return Constraint(json_object_grammar() if isinstance(answer, bool) else _schema_grammar(json.dumps(answer)))
    if answer is not None and not use.required:
        schema = _ANY_ARGUMENTS if isinstance(answer, bool) else answer
        return Constraint(_schema_grammar(json.dumps(call_or_answer(_kept(use, form), form, schema))))
    grammar = _tools_grammar(use, form)
    return Constraint(grammar) if use.required else Constraint(grammar, (form.trigger,))


def _tools_grammar(use: ToolUse, form: CallForm) -> str:
    try:
        return _calls_grammar(json.dumps(use.schemas), form, use.several)
    except InvalidError:
        return _calls_grammar(json.dumps(_kept(use, form).schemas), form, use.several)


def _kept(use: ToolUse, form: CallForm) -> ToolUse:
    """Return ``use`` with any arguments for tools whose schema makes no grammar and need not be kept."""
    schemas = dict(use.schemas)
    for name, schema in use.schemas.items():
        try:
            _calls_grammar(json.dumps({name: schema}), form, False)
        except InvalidError:
            if name in use.strict:
                raise
            schemas[name] = _ANY_ARGUMENTS
    return replace(use, schemas=schemas)


def call_or_answer(use: ToolUse, form: CallForm, answer: Schema) -> dict[str, Any]:
    """Return the JSON schema of one bare call of a tool, or else of ``answer``."""
    key = form.value[2]
    definitions: dict[str, Any] = {"answer": _moved(answer, "answer")}
    either: list[dict[str, Any]] = []
    for number, (name, schema) in enumerate(use.schemas.items()):
        definitions[f"tool{number}"] = _moved(schema, f"tool{number}")
        either.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: {"$ref": f"#/$defs/tool{number}"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": [*either, {"$ref": "#/$defs/answer"}], "$defs": definitions}


def _moved(schema: Any, name: str) -> Any:
    """Return ``schema`` with its references pointing to where it now stands, under ``$defs``."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value, name) for key, value in schema.items()}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
        return moved
    return [_moved(value, name) for value in schema] if isinstance(schema, list) else schema


@lru_cache(_CACHED_GRAMMARS)
def _schema_grammar(schema: str) -> str:
    return json_schema_grammar(json.loads(schema))


@lru_cache(_CACHED_GRAMMARS)
def _calls_grammar(schemas: str, form: CallForm, several: bool) -> str:
    """Return the grammar of calls; the same tools come with every turn of a conversation."""
    open_text, close_text, key = form.value
    return tool_call_grammar(
        list(json.loads(schemas).items()),
        open_text=open_text,
        close_text=close_text,
        max_calls=MAX_CALLS if several else 1,
        arguments_key=key,
    )
