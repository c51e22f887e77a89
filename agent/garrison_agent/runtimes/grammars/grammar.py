"""Grammars that hold a model to a form: JSON, a JSON schema, tool calls. GBNF text for llama.cpp, root rule ``root``.

llama-cpp-python brings a converter of its own (``llama_cpp.llama_grammar``). It is not used: it ignores ``minimum``,
``uniqueItems``, ``patternProperties``, and whatever else it does not know; loses ``properties`` beside
``"type": ["object", "null"]``; lets raw line ends into strings and half-escaped names into its own rules; takes two
``$ref`` that end in the same word for one; and has no bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from garrison_agent.runtimes.grammars.gbnf import Grammar, Part, Repeat, literal
from garrison_agent.runtimes.grammars.schema_grammar import SchemaRules, check_size, refuse

MAX_TOOLS = 128
MAX_CALLS = 64

Tool = tuple[str, object]
"""A tool's name and the schema of its parameters; None: it takes none."""


def json_object_grammar() -> str:
    """Return the grammar of any one JSON object: whitespace and nesting are bounded, so no model blanks for ever."""
    grammar = Grammar()
    text = grammar.render([grammar.any_object()])
    assert text is not None
    return text


def json_schema_grammar(schema: object) -> str:
    """Return the grammar of texts that are valid under ``schema``, a JSON Schema of the supported subset.

    Supported: type (also a list), properties, required, additionalProperties, items, prefixItems, enum, const, anyOf,
    oneOf of schemas that exclude each other, allOf of one, $ref inside the document, minimum, maximum, their
    exclusive forms, multipleOf 1, 0.1, ..., min- and maxLength, min- and maxItems, pattern (a plain subset), and the
    formats of ``string_formats.FORMATS``.

    Raises:
        InvalidError: ``inference.schema_unsupported``: something else, beyond the bounds, or nothing can satisfy the
            schema; ``fields["param"]`` is the dotted path of the keyword inside it.
    """
    check_size(schema)
    grammar = Grammar()
    return _rendered(grammar, [SchemaRules(schema, grammar).root()])


def tool_call_grammar(
    tools: Sequence[Tool],
    *,
    open_text: str = "",
    close_text: str = "",
    max_calls: int = 1,
    separator: str = "\n",
    arguments_key: str = "arguments",
) -> str:
    """Return the grammar of one to ``max_calls`` calls: ``{"name": <a tool's>, "arguments": {...}}``.

    Each stands between ``open_text`` and ``close_text``; ``separator`` stands between two of them.

    Raises:
        InvalidError: ``inference.schema_unsupported``, ``fields["param"]`` beginning with ``<index>.parameters``.
    """
    if not 1 <= len(tools) <= MAX_TOOLS:
        refuse("", f"a request has 1 to {MAX_TOOLS} tools")
    if not 1 <= max_calls <= MAX_CALLS:
        refuse("", f"an answer has 1 to {MAX_CALLS} calls")
    grammar = Grammar()
    ws = grammar.builtin("ws")
    calls: list[list[Part]] = []
    for index, (name, parameters) in enumerate(tools):
        schema = {"type": "object", "properties": {}} if parameters is None else parameters
        check_size(schema)
        rules = SchemaRules(schema, grammar, path=f"{index}.parameters")
        head = f'"{{" {ws} {_quoted("name")} ":" " "? {_quoted(name)} "," {ws} {_quoted(arguments_key)} ":" " "?'
        calls.append([head, rules.root(), f'{ws} "}}"'])
    call = grammar.add(*calls)
    wrapped = grammar.add([*_text(open_text), call, *_text(close_text)])
    more = grammar.add([*_text(separator), wrapped])
    return _rendered(grammar, [wrapped, Repeat(more.rule, 0, max_calls - 1)] if max_calls > 1 else [wrapped])


def _rendered(grammar: Grammar, root: Sequence[Part]) -> str:
    text = grammar.render(root)
    if text is None:
        refuse("", "nothing can satisfy this schema")
    return text


def _quoted(name: str) -> str:
    if not name.isascii() or not name.isprintable() or '"' in name or "\\" in name:
        refuse("", f"a tool's name is plain text, not {name[:32]!r}")
    return literal(f'"{name}"')


def _text(text: str) -> list[Part]:
    return [literal(text)] if text else []
