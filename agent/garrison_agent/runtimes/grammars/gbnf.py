"""A grammar as data, checked and written as llama.cpp's GBNF.

Rules are kept as lists of alternatives so that what can never end (an object that requires itself, ``false``) is found
and left out before llama.cpp sees it: its parser accepts such rules, and the answer would then never come to an end.
Rule names are ours alone; nothing from a schema ever becomes one. Source: llama.cpp, grammars/README.md,
src/llama-grammar.cpp (a repetition above 2000 is silently taken for an unbounded one, hence the bounds here).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from garrison_protocol.errors import InvalidError

MAX_GRAMMAR_BYTES = 128 * 1024
MAX_RULES = 10_000
MAX_REPEAT = 1000
_BLOCK = 64
_NESTING = 12
"""How deep arrays and objects without a schema may nest: a small model likes to open brackets for ever."""


@dataclass(frozen=True)
class Ref:
    """The use of a rule."""

    rule: str


@dataclass(frozen=True)
class Repeat:
    """A rule ``low`` to ``high`` times; None: without an end."""

    rule: str
    low: int
    high: int | None


Part = str | Ref | Repeat
"""A string is GBNF text that can always be completed and begins with no rule of ``Grammar``."""

_TEXT = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" escaped)',
    "escaped": r"[0-9a-cefA-CEF] hex hex hex | [dD] [0-7] hex hex",
    "hex": r"[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "digits": r"[0-9]{1,15}",
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,14})',
    "number": r'integer ("." digits)? ([eE] [-+]? [0-9]{1,2})?',
}
"""Any string, without halves of surrogate pairs (raw text says the same), and any number that fits a double."""
_USES = {
    "char": ("escaped", "hex"),
    "string": ("char", "escaped", "hex"),
    "number": ("integer", "digits"),
}


class Grammar:
    """Rules under construction."""

    def __init__(self) -> None:
        self._rules: dict[str, list[tuple[Part, ...]]] = {}
        self._shared: dict[tuple[tuple[Part, ...], ...], str] = {}
        self._builtin: set[str] = set()

    def reserve(self) -> str:
        """Return the name of a rule that ``fill`` will define; so a rule may use itself.

        Raises:
            InvalidError: ``inference.schema_unsupported``: there are too many.
        """
        if len(self._rules) >= MAX_RULES:
            raise InvalidError("inference.schema_unsupported", "the schema makes too large a grammar", param="")
        name = f"r{len(self._rules)}"
        self._rules[name] = []
        return name

    def fill(self, name: str, alternatives: Iterable[Sequence[Part]]) -> None:
        """Define a reserved rule; without alternatives, it can never be satisfied."""
        self._rules[name] = [tuple(alternative) for alternative in alternatives]

    def add(self, *alternatives: Sequence[Part]) -> Ref:
        """Return a rule of these alternatives, the same for the same ones."""
        key = tuple(tuple(alternative) for alternative in alternatives)
        name = self._shared.get(key)
        if name is None:
            name = self._shared[key] = self.reserve()
            self._rules[name] = list(key)
        return Ref(name)

    def builtin(self, name: str) -> str:
        """Return the text that uses one of the fixed rules: ws, char, string, integer, number."""
        self._builtin.update((name, *_USES.get(name, ())))
        return name

    def any_value(self) -> Ref:
        """Return the rule of any JSON value."""
        return self._value(_NESTING)

    def any_object(self) -> Ref:
        """Return the rule of any JSON object."""
        return self._object(self._value(_NESTING - 1))

    def _value(self, depth: int) -> Ref:
        plain: list[list[Part]] = [
            [self.builtin("string")],
            [self.builtin("number")],
            ['"true"'],
            ['"false"'],
            ['"null"'],
        ]
        if depth == 0:
            return self.add(*plain)
        inner = self._value(depth - 1)
        return self.add([self._object(inner)], [self.array(inner)], *plain)

    def _object(self, value: Ref) -> Ref:
        return self.mapping(value, 0, None)

    def mapping(self, value: Ref, low: int, high: int | None) -> Ref:
        """Return the rule of an object of ``low`` to ``high`` members with any names."""
        member = self.add([self.builtin("string"), '":" " "?', value])
        return self._bracketed("{", member, "}", low, high)

    def array(self, item: Ref, low: int = 0, high: int | None = None) -> Ref:
        """Return the rule of an array of ``low`` to ``high`` items."""
        return self._bracketed("[", item, "]", low, high)

    def _bracketed(self, left: str, item: Ref, right: str, low: int, high: int | None) -> Ref:
        ws = self.builtin("ws")
        alternatives: list[list[Part]] = []
        if low == 0:
            alternatives.append([f'"{left}" {ws} "{right}"'])
        if high is None or high > 0:
            more = self.add([f'"," {ws}', item])
            rest = Repeat(more.rule, max(low - 1, 0), None if high is None else high - 1)
            alternatives.append([f'"{left}" {ws}', item, rest, f'{ws} "{right}"'])
        return self.add(*alternatives)

    def text(self, low: int, high: int | None) -> Ref:
        """Return the rule of a quoted string of ``low`` to ``high`` characters."""
        char = self.builtin("char")
        body: list[Part] = []
        blocks, rest = divmod(low, _BLOCK)
        if blocks:
            body.append(Repeat(self._block().rule, blocks, blocks))
        if rest:
            body.append(f"{char}{{{rest}}}")
        if high is None:
            body.append(f"{char}*")
        elif high > low:
            body.append(self._up_to(high - low))
        return self.add([r'"\""', *body, r'"\""'])

    def _block(self) -> Ref:
        return self.add([f"{self.builtin('char')}{{{_BLOCK}}}"])

    def _up_to(self, count: int) -> Ref:
        """Return the rule of at most ``count`` characters: a chain of blocks, not ``count`` nested options."""
        char = self.builtin("char")
        blocks, start = divmod(count - 1, _BLOCK)
        rule = self.add([f"{char}{{0,{start + 1}}}"])
        for _ in range(blocks):
            rule = self.add([f"{char}{{0,{_BLOCK - 1}}}"], [self._block(), rule])
        return rule

    def render(self, root: Sequence[Part]) -> str | None:
        """Return the grammar whose root is ``root``, or None if no text satisfies it.

        Raises:
            InvalidError: ``inference.schema_unsupported``: a rule begins with itself, or the grammar is too large.
        """
        self._rules["root"] = [tuple(root)]
        self._prune()
        if not self._rules["root"]:
            return None
        self._refuse_left_recursion()
        lines = [
            f"{name} ::= " + " | ".join(" ".join(map(_part_text, one)) for one in self._rules[name])
            for name in self._reachable()
        ]
        lines += [f"{name} ::= {_TEXT[name]}" for name in sorted(self._builtin)]
        text = "\n".join(lines) + "\n"
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidError("inference.schema_unsupported", "the schema makes too large a grammar", param="")
        return text

    def _prune(self) -> None:
        """Leave out every alternative that can never be completed."""
        good: set[str] = set()

        def possible(parts: tuple[Part, ...]) -> bool:
            return all(
                isinstance(part, str) or part.rule in good or (isinstance(part, Repeat) and part.low == 0)
                for part in parts
            )

        growing = True
        while growing:
            new = {
                name for name, rule in self._rules.items() if name not in good and any(possible(one) for one in rule)
            }
            good |= new
            growing = bool(new)
        for name, rule in self._rules.items():
            kept = [one for one in rule if possible(one)]
            # What may be there no times at all, and cannot be there even once, is not there.
            self._rules[name] = [tuple(p for p in one if isinstance(p, str) or p.rule in good) for one in kept]

    def _reachable(self) -> list[str]:
        order, seen = ["root"], {"root"}
        for name in order:
            for part in (part for one in self._rules[name] for part in one if not isinstance(part, str)):
                if part.rule not in seen:
                    seen.add(part.rule)
                    order.append(part.rule)
        return order

    def _refuse_left_recursion(self) -> None:
        """Only references and unions begin with a rule, so a cycle of first parts is one of them alone."""
        done: set[str] = set()
        for start in self._reachable():
            path: dict[str, None] = {}
            stack = [(start, False)]
            while stack:
                name, leaving = stack.pop()
                if leaving:
                    path.pop(name)
                    done.add(name)
                    continue
                if name in path:
                    raise InvalidError(
                        "inference.schema_unsupported", "a $ref leads back to itself with nothing between", param="$ref"
                    )
                if name in done:
                    continue
                path[name] = None
                stack.append((name, True))
                stack += [(one[0].rule, False) for one in self._rules[name] if one and not isinstance(one[0], str)]


def literal(text: str) -> str:
    """Return the GBNF literal of exactly ``text``, which is not empty."""
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def char_class(ranges: Iterable[tuple[int, int]]) -> str:
    """Return the GBNF class of the code points in ``ranges`` (both ends included)."""
    return "[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in ranges) + "]"


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    # Parentheses are counted by whoever bounds how deep a grammar nests.
    return letter if " " <= letter <= "~" and letter not in "()" else f"\\U{ord(letter):08X}"


def _part_text(part: Part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Ref):
        return part.rule
    if (part.low, part.high) == (0, None):
        return f"{part.rule}*"
    return f"{part.rule}{{{part.low},{'' if part.high is None else part.high}}}"
